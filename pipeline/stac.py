"""STAC items as a list of tiles: one asset of each. Nothing heavy is imported here.

Items are read as STAC 1.0 and 1.1 write them: an Item is a GeoJSON feature with `assets`, an item collection a feature
collection of such; a server may give it page by page (`links`, rel "next").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.files import is_remote, resolved, tile_name
from segpipe.tasks.remote import fetch, look_up

ENDINGS = frozenset({".json", ".geojson"})
IMAGERY = frozenset({".tif", ".tiff", ".jp2", ".png", ".jpg", ".jpeg", ".vrt"})
"""Endings by which an asset without a media type is known as an image."""
NOT_DATA = frozenset({"thumbnail", "overview"})
"""Roles of assets that are pictures of the data."""
LARGEST_PAGES = 10_000


def is_item_list(path: str) -> bool:
    """Whether a path or URL names JSON; a URL without any ending is asked for its media type."""
    ending = PurePosixPath(tile_name(path)).suffix.lower()
    if ending or not is_remote(path) or path.startswith("s3://"):
        return ending in ENDINGS
    return "json" in look_up(path).media_type


def assets_of(source: str, name: str | None) -> list[str]:
    """Paths or URLs of one asset of each item in a JSON file or URL, in the order of the items.

    name: that of the asset; None: the only one with an image media type that is neither thumbnail nor overview, or the
    only such one with the role "data". A relative href is relative to the item's self link, or else to source.
    UserError, naming the item, where this does not give one file for each item.
    """
    return [_asset(item, where, source, name) for item, where in _items(source)]


def _items(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Items of a document and of the pages after it, and what to call each in an error."""
    page: str | None = source
    seen: set[str] = set()
    while page is not None:
        if page in seen or len(seen) == LARGEST_PAGES:
            raise UserError(f"{source}: its pages do not end; expected links with rel `next` to each page once")
        seen.add(page)
        document = _load(page)
        kind = document.get("type")
        if kind not in ("Feature", "FeatureCollection"):
            raise UserError(
                f"{page}: found type {kind!r}; expected a STAC Item or a FeatureCollection of Items"
                " (those of a Collection are at its `items` link)"
            )
        features = [document] if kind == "Feature" else document.get("features")
        if not isinstance(features, list) or not (features or len(seen) > 1):
            raise UserError(f"{page}: no features in it; expected STAC items")
        for number, item in enumerate(features, 1):
            if not isinstance(item, dict) or not isinstance(item.get("assets"), dict):
                raise UserError(f"{page}: feature {number} has no assets; expected STAC items")
            yield item, f"{page}: item {item.get('id', number)}"
        page = _next_page(document, page) if kind == "FeatureCollection" else None


def _load(source: str) -> dict[str, Any]:
    try:
        document = json.loads(fetch(source) if is_remote(source) else Path(source).read_bytes())
    except TileError as error:
        raise UserError(str(error)) from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{source}: not JSON ({reason}); expected a STAC Item or a FeatureCollection of Items"
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"{source}: not an object; expected a STAC Item or a FeatureCollection of Items")
    return document


def _next_page(document: dict[str, Any], page: str) -> str | None:
    link = _link(document, "next")
    if link is None:
        return None
    if str(link.get("method", "GET")).upper() != "GET":
        raise UserError(
            f"{page}: its next page wants {link.get('method')}; expected GET; cure: save all items in a file"
        )
    try:
        return resolved(str(link["href"]), page)
    except ValueError as error:
        raise UserError(f"{page}: its next page: {error}") from None


def _link(document: dict[str, Any], rel: str) -> dict[str, Any] | None:
    links = document.get("links")
    found = (it for it in links if isinstance(it, dict)) if isinstance(links, list) else ()
    return next((it for it in found if it.get("rel") == rel and isinstance(it.get("href"), str)), None)


def _asset(item: dict[str, Any], where: str, source: str, name: str | None) -> str:
    assets = {key: it for key, it in item["assets"].items() if isinstance(it, dict) and isinstance(it.get("href"), str)}
    if name is None:
        name = _only_image(assets, where)
    elif name not in assets:
        raise UserError(f"{where}: no asset {name}; expected one of {', '.join(assets) or 'at least one asset'}")
    link = _link(item, "self")
    try:
        # A self link may itself be relative to the file that it stands in.
        path = resolved(assets[name]["href"], source if link is None else resolved(str(link["href"]), source))
    except ValueError as error:
        raise UserError(f"{where}: asset {name}: {error}") from None
    if not is_remote(path) and not Path(path).is_file():
        raise UserError(f"{where}: asset {name}: {path} is no file; expected one, or a URL")
    return path


def _only_image(assets: dict[str, dict[str, Any]], where: str) -> str:
    images = [key for key, asset in assets.items() if _is_image(asset) and not NOT_DATA & _roles(asset)]
    data = [key for key in images if "data" in _roles(assets[key])]
    if not images:
        raise UserError(
            f"{where}: no asset is an image; expected `asset:` to name one of {', '.join(assets) or 'none'}"
        )
    if len(data or images) > 1:
        names = ", ".join(data or images)
        raise UserError(
            f"{where}: its images are {names}; expected the one to take in the YAML; cure: `asset: {images[0]}`"
        )
    return (data or images)[0]


def _roles(asset: dict[str, Any]) -> set[str]:
    roles = asset.get("roles")
    return {role for role in roles if isinstance(role, str)} if isinstance(roles, list) else set()


def _is_image(asset: dict[str, Any]) -> bool:
    media_type = asset.get("type")
    if isinstance(media_type, str):
        return media_type.lower().startswith("image/")
    return PurePosixPath(urlsplit(asset["href"]).path).suffix.lower() in IMAGERY
