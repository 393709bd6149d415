"""JSON Schema of the YAML files, for editors that complete and check as one types."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from .config import CityConfig, TrainConfig

KINDS: dict[str, type[BaseModel]] = {"city": CityConfig, "train": TrainConfig}


def schema_text(kind: str) -> str:
    """The JSON Schema of a `city` or a `train` YAML, as text. Keys, types, limits, defaults, and what is expected."""
    schema: dict[str, Any] = _plain(KINDS[kind].model_json_schema(by_alias=True))
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": f"segpipe: {kind}.yaml"}
    return json.dumps(head | schema, ensure_ascii=False, indent=1) + "\n"


def _plain(part: Any) -> Any:
    """The same in words of draft 7, which every editor knows, without titles made of names."""
    if isinstance(part, list):
        return [_plain(item) for item in part]
    if not isinstance(part, dict):
        return part
    # A property may be called title; a title of ours is a text.
    plain = {key: _plain(value) for key, value in part.items() if key != "title" or isinstance(value, dict)}
    plain.pop("discriminator", None)
    if "minLength" in plain and plain.get("type") != "string":
        # Of a list, and of a text that stands for a list of one.
        plain["minItems"] = plain["minLength"]
    items = plain.get("prefixItems")
    if isinstance(items, list):
        del plain["prefixItems"]
        plain["items"] = items[0] if all(item == items[0] for item in items) else items
    if "$ref" in plain and len(plain) > 1:
        # Draft 7 looks at nothing beside a reference.
        plain["allOf"] = [{"$ref": plain.pop("$ref")}]
    return plain
