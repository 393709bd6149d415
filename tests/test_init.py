"""`segpipe init`: what it writes runs as it is, and says what was found."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from click.testing import CliRunner
from conftest import ORIGIN, City, draw_blobs, map_it, write_tile
from PIL import Image

from segpipe.pipeline.cli import main
from segpipe.pipeline.init import write_city_yaml
from segpipe.tasks.errors import UserError

MakeCity = Callable[..., City]

pytestmark = pytest.mark.usefixtures("in_process")

SIDE = 400


def tile(path: Path, number: int = 0, **options: Any) -> Path:
    """The tile of a row of tiles with this number."""
    image = options.pop("image", draw_blobs(SIDE, SIDE, number))
    return write_tile(path, image, ORIGIN[0], ORIGIN[1] + number * SIDE, **options)


def settings(config: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(config.read_text())
    return found


def small(config: Path, bundle: Path) -> tuple[str, ...]:
    """Overrides that make a run of what init wrote quick."""
    return (f"model={bundle}", f"output={config.parent / 'out'}", "grid.chunk_px=256", "grid.block_px=256")


def plain(folder: Path) -> None:
    for number in range(3):
        tile(folder / f"tile{number}.tif", number)


def one_without_crs(folder: Path) -> None:
    plain(folder)
    tile(folder / "tile3.tif", 3, crs=None)


def one_in_degrees(folder: Path) -> None:
    plain(folder)
    place = Affine(4e-6, 0, 15.0 + 0.0, 0, -2.7e-6, 47.845)
    x, y = 0.1 + ORIGIN[1] * 0.3, 0.1 - ORIGIN[0] * 0.3
    from pyproj import Transformer

    lon, lat = Transformer.from_crs("EPSG:32633", "EPSG:4326", always_xy=True).transform(x, y - SIDE * 0.3)
    place = Affine(4e-6, 0, lon, 0, -2.7e-6, lat)
    tile(folder / "degrees.tif", 3, crs="EPSG:4326", transform=place)


def sixteen_bits(folder: Path) -> None:
    for number in range(2):
        image = draw_blobs(SIDE, SIDE, number).astype(np.uint16) * 13
        image[:, :, :90] = 65535
        tile(folder / f"{number}.tif", number, image=image)


def floats_with_nan(folder: Path) -> None:
    image = draw_blobs(SIDE, SIDE).astype(np.float32) / 255
    image[:, 100:150, 30:90] = np.nan
    tile(folder / "a.tif", image=image, nodata=np.nan)


def near_infrared(folder: Path) -> None:
    image = np.concatenate([draw_blobs(SIDE, SIDE), draw_blobs(SIDE, SIDE, 9)[:1]])
    tile(folder / "rgbi.tif", image=image)


def collar(folder: Path) -> None:
    image = draw_blobs(SIDE, SIDE)
    image[:, :, :90] = 255
    tile(folder / "a.tif", image=image)
    tile(folder / "b.tif", 1)


def a_vrt_beside(folder: Path) -> None:
    plain(folder)
    sources = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename relativeToVRT="1">tile0.tif'
        f"</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    (folder / "all.vrt").write_text(f'<VRTDataset rasterXSize="{SIDE}" rasterYSize="{SIDE}">{sources}</VRTDataset>')


def jpeg_2000(folder: Path) -> None:
    tile(folder / "plain.tif")
    with rasterio.open(folder / "plain.tif") as source:
        profile = source.profile | {"driver": "JP2OpenJPEG", "QUALITY": "60"}
        for key in ("compress", "tiled", "interleave", "blockysize", "blockxsize"):
            profile.pop(key, None)
        with rasterio.open(folder / "lossy.jp2", "w", **profile) as target:
            target.write(source.read())
    (folder / "plain.tif").unlink()


def two_tenths(folder: Path) -> None:
    place = Affine(0.2, 0, 0.1 + ORIGIN[1] * 0.3, 0, -0.2, 0.1 - ORIGIN[0] * 0.3)
    tile(folder / "fine.tif", transform=place)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (plain, {"bands": [1, 2, 3], "nodata": []}),
        (one_without_crs, {"images_crs": "EPSG:32633"}),
        (one_in_degrees, {}),
        (sixteen_bits, {"scale": "auto", "nodata": [65535]}),
        (floats_with_nan, {"scale": "auto"}),
        (near_infrared, {"bands": [1, 2, 3]}),
        (collar, {"nodata": [255]}),
        (a_vrt_beside, {}),
        (jpeg_2000, {}),
        (two_tenths, {}),
    ],
)
def test_what_init_writes_runs_as_it_is(
    tmp_path: Path, bundle: Path, make: Callable[[Path], None], expected: dict[str, Any]
) -> None:
    make(tmp_path / "tiles")
    config = tmp_path / "city.yaml"
    plan = write_city_yaml(tmp_path / "tiles", config)
    found = settings(config)
    assert {key: found[key] for key in expected} == expected
    published = map_it(config, *small(config, bundle))
    assert published.valid_px > 0.4 * SIDE**2
    assert not published.skipped
    with Image.open(tmp_path / "city.png") as picture:
        assert max(picture.size) == pytest.approx(min(1200, max(plan.bounds.shape_yx)), rel=0.5)


def test_what_does_not_belong_to_the_city_is_named_and_left_out(tmp_path: Path) -> None:
    plain(tmp_path / "tiles")
    tile(tmp_path / "tiles" / "stray.tif", 400)
    tile(tmp_path / "tiles" / "grey.tif", 1, image=draw_blobs(SIDE, SIDE)[:1])
    (tmp_path / "tiles" / "notes.tif").write_text("no raster")
    config = tmp_path / "city.yaml"
    write_city_yaml(tmp_path / "tiles", config)
    text = config.read_text()
    assert settings(config)["images"] == [f"tiles/tile{number}.tif" for number in range(3)]
    for words in ("stray.tif: lies far", "grey.tif: 1 bands", "notes.tif"):
        assert words in text


def damage(path: Path) -> None:
    """Spoil blocks in the middle, of which no header tells."""
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    path.write_bytes(data)


@pytest.mark.parametrize("overrides", [[], ["nodata=[0]"]])
def test_a_tile_with_a_damaged_block_is_named_and_left_out(tmp_path: Path, overrides: list[str]) -> None:
    plain(tmp_path / "tiles")
    damage(tmp_path / "tiles" / "tile2.tif")
    config = tmp_path / "city.yaml"
    write_city_yaml(tmp_path / "tiles", config, overrides)
    assert settings(config)["images"] == ["tiles/tile0.tif", "tiles/tile1.tif"]
    assert "# left out: tiles/tile2.tif: cannot be read" in config.read_text()


def test_a_folder_of_damaged_tiles_is_refused_in_one_line(tmp_path: Path) -> None:
    damage(tile(tmp_path / "tiles" / "a.tif"))
    with pytest.raises(UserError, match=r"a\.tif: cannot be read: .*, as all 1 tiles looked at") as refused:
        write_city_yaml(tmp_path / "tiles", tmp_path / "city.yaml")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "city.yaml").exists()


def test_bands_may_be_given_by_colour_as_in_a_yaml(tmp_path: Path) -> None:
    tile(tmp_path / "tiles" / "a.tif", photometric="RGB")
    plan = write_city_yaml(tmp_path / "tiles", tmp_path / "city.yaml", ["bands=[blue, green, red]"])
    assert settings(tmp_path / "city.yaml")["bands"] == ["blue", "green", "red"]
    assert plan.tiles[0].bands == (3, 2, 1)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("bands=3", "bands.* 3.*expected a list of band numbers"),
        ("bands=[1, 2, 9]", r"tile0\.tif: has no band 9: .*expected `bands:`"),
        ("bands=[1, 2, pink]", r"tile0\.tif: has no band pink: .*expected `bands:`"),
        ("nodata=black", "nodata.*black.*expected null, a number"),
        ("bnads=[1, 2, 3]", "bnads.*bands"),
    ],
)
def test_what_a_yaml_may_not_hold_is_refused_as_there_before_a_tile_is_read(
    tmp_path: Path, override: str, says: str
) -> None:
    plain(tmp_path / "tiles")
    with pytest.raises(UserError, match=says) as refused:
        write_city_yaml(tmp_path / "tiles", tmp_path / "city.yaml", [override])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "city.yaml").exists()


def test_a_number_may_be_the_name(tmp_path: Path) -> None:
    plain(tmp_path / "tiles")
    write_city_yaml(tmp_path / "tiles", tmp_path / "city.yaml", ["name=2024"])
    assert settings(tmp_path / "city.yaml")["name"] == "2024"


def test_tiles_of_which_none_has_a_crs_ask_for_one(tmp_path: Path) -> None:
    tile(tmp_path / "tiles" / "a.tif", crs=None)
    with pytest.raises(UserError, match="--set images_crs=EPSG"):
        write_city_yaml(tmp_path / "tiles", tmp_path / "city.yaml")
    assert not (tmp_path / "city.yaml").exists()
    write_city_yaml(tmp_path / "tiles", tmp_path / "city.yaml", ["images_crs=EPSG:32633"])
    assert settings(tmp_path / "city.yaml")["images_crs"] == "EPSG:32633"


def test_evidence_for_nodata_is_told_with_the_area(tmp_path: Path) -> None:
    collar(tmp_path / "tiles")
    write_city_yaml(tmp_path / "tiles", tmp_path / "city.yaml")
    (told,) = re.findall("255 in all bands would take away ([0-9,]+) m2", (tmp_path / "city.yaml").read_text())
    assert int(told.replace(",", "")) == pytest.approx(90 * SIDE * 0.3**2, rel=0.002)
    with Image.open(tmp_path / "city.png") as picture:
        hatched = np.asarray(picture)[:, : 90 * picture.width // (2 * SIDE)]
    assert set(map(tuple, hatched[2:-2, 2:-4].reshape(-1, 3))) <= {(150, 150, 150), (214, 214, 214)}


@pytest.mark.parametrize("case", ["no folder", "empty", "exists"])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path: Path, case: str) -> None:
    folder, target = tmp_path / "tiles", tmp_path / "city.yaml"
    if case != "no folder":
        folder.mkdir()
    if case == "exists":
        plain(folder)
        target.write_text("mine")
    result = CliRunner().invoke(main, ["init", str(folder), "--to", str(target)])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert (target.read_text() == "mine") if case == "exists" else not target.exists()
