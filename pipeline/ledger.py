"""The ledger of what is done: a JSON file a stage and unit of work, written last, so that what it names is whole."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .storage import Folder, folder_at


class Ledger:
    """What is done in a run folder. An entry's key says from which inputs and settings."""

    def __init__(self, folder: Folder | Path) -> None:
        self._folder = folder_at(folder)
        self._ahead: dict[str, bytes | None] = {}

    def done(self, stage: str, unit: str, key: str) -> dict[str, Any] | None:
        """The entry of a unit if it was done from the same inputs and settings, else None."""
        entry = self.entry(stage, unit)
        return entry if entry is not None and entry.get("key") == key else None

    def entry(self, stage: str, unit: str) -> dict[str, Any] | None:
        """The entry of a unit, whatever it was done from."""
        name = _name(stage, unit)
        return _entry_of(self._ahead.pop(name) if name in self._ahead else self._folder.read(name))

    def entries(self, stage: str, units: Iterable[str]) -> Iterator[dict[str, Any] | None]:
        """The entries of many units of a stage, in their order; a bucket is asked for several at once."""
        return map(_entry_of, self._folder.each(self._folder.read, (_name(stage, unit) for unit in units)))

    def look_ahead(self, units: Iterable[tuple[str, str]]) -> None:
        """Ask a bucket at once for entries, by stage and unit, that are asked for next, each once; a disk is quick."""
        if self._folder.is_remote:
            names = [_name(stage, unit) for stage, unit in units]
            self._ahead = dict(zip(names, self._folder.each(self._folder.read, names), strict=True))

    def record(self, stage: str, unit: str, key: str, **values: object) -> None:
        """Write a unit's entry. To be called when all that it stands for is written."""
        self._ahead.pop(_name(stage, unit), None)
        self._folder.write(_name(stage, unit), as_json({"key": key, **values}))

    def forget(self, stage: str, unit: str) -> None:
        """Take an entry back: the unit will be done again."""
        self._ahead.pop(_name(stage, unit), None)
        self._folder.remove(_name(stage, unit))


def _entry_of(data: bytes | None) -> dict[str, Any] | None:
    try:
        entry: dict[str, Any] | None = None if data is None else json.loads(data)
    except ValueError:
        return None
    return entry


def _name(stage: str, unit: str) -> str:
    return f"ledger/{stage}/{unit}.json"


def as_json(value: object) -> bytes:
    """A value as the text of a JSON file."""
    return json.dumps(value, ensure_ascii=False, indent=1).encode()
