"""A STAC Item beside what was published: where it lies, what its files are, and their checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pystac
import shapely
from pyproj import CRS, Transformer
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import DataType, RasterBand, RasterExtension

from segpipe.tasks.grid import Lattice, Window
from segpipe.tasks.predict import INVALID

from .beside import written_beside
from .rasters import PROBABILITY_SCALE

ITEM = "item.json"
MEDIA_TYPES = {
    ".tif": pystac.MediaType.COG,
    ".gpkg": pystac.MediaType.GEOPACKAGE,
    ".geojson": pystac.MediaType.GEOJSON,
    ".parquet": pystac.MediaType.VND_APACHE_PARQUET,
    ".fgb": pystac.MediaType.FLATGEOBUF,
    ".png": pystac.MediaType.PNG,
    ".html": pystac.MediaType.HTML,
    ".json": pystac.MediaType.JSON,
}
ROLES = {".png": "thumbnail", ".html": "overview", ".json": "metadata"}


def write_item(
    folder: Path, name: str, names: Sequence[str], lattice: Lattice, window: Window, properties: dict[str, Any]
) -> None:
    """Write item.json, an Item whose assets are the files of these names in folder, with sizes and checksums.

    window: what the rasters cover. The Item's time is that of publishing: when the imagery was taken is not known.
    Raises RunError where a file cannot be read or this one written.
    """
    crs = CRS.from_wkt(lattice.crs_wkt)
    outline = _in_wgs84(shapely.box(*lattice.bounds(window)), crs)
    with written_beside(folder / ITEM) as partial:
        item = pystac.Item(
            id=name,
            geometry=shapely.geometry.mapping(outline),
            bbox=list(outline.bounds),
            datetime=datetime.now(UTC).replace(microsecond=0),
            properties=properties,
        )
        projection = ProjectionExtension.ext(item, add_if_missing=True)
        authority = crs.to_authority()
        projection.apply(
            code=None if authority is None else ":".join(authority),
            wkt2=lattice.crs_wkt,
            bbox=list(lattice.bounds(window)),
            shape=list(window.shape_yx),
            transform=list(lattice.transform(window.row_off, window.col_off))[:6],
        )
        for file in names:
            _add_asset(item, folder, file, lattice)
        partial.write_text(json.dumps(item.to_dict(include_self_link=False), indent=2), encoding="utf-8")


def _add_asset(item: pystac.Item, folder: Path, name: str, lattice: Lattice) -> None:
    suffix = Path(name).suffix
    asset = pystac.Asset(
        href=f"./{name}", media_type=MEDIA_TYPES.get(suffix), roles=[ROLES.get(suffix, "data")], title=name
    )
    item.add_asset(name, asset)
    path = folder / name
    FileExtension.ext(asset, add_if_missing=True).apply(size=path.stat().st_size, checksum=_multihash(path))
    if name in ("mask.tif", "probability.tif"):
        scale = PROBABILITY_SCALE if name == "probability.tif" else None
        band = RasterBand.create(
            nodata=INVALID,
            data_type=DataType.UINT8,
            spatial_resolution=lattice.pixel_size,
            scale=scale,
            offset=None if scale is None else 0.0,
        )
        RasterExtension.ext(asset, add_if_missing=True).apply([band])


def _multihash(path: Path) -> str:
    """SHA-256 as a multihash: code 12 hex, 20 hex bytes, the digest."""
    with path.open("rb") as stream:
        return "1220" + hashlib.file_digest(stream, "sha256").hexdigest()


def _in_wgs84(box: shapely.Polygon, crs: CRS) -> shapely.Polygon:
    """A rectangle of a CRS in longitude and latitude, its sides bent as they are."""
    transformer = Transformer.from_crs(crs, CRS.from_epsg(4326), always_xy=True)
    bent = shapely.segmentize(box, max(box.bounds[2] - box.bounds[0], box.bounds[3] - box.bounds[1]) / 8)
    return shapely.orient_polygons(shapely.transform(bent, transformer.transform, interleaved=False))
