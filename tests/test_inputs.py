"""Laws of the files that a run is made from: what is meant is found, what a run wrote is not, a VRT loses nothing."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.shutil
from conftest import ORIGIN, City, draw_blobs, map_it, outputs, stages_since, tasks_done, write_tile
from servers import serving

from segpipe.pipeline.config import CityConfig, load_city
from segpipe.pipeline.inputs import find_images, stamp
from segpipe.pipeline.manifest import nothing_changed
from segpipe.tasks.errors import UserError

PUBLISHED = ("mask.tif", "probability.tif", "preview.png")
LEFT_BY_A_KILL = ("mask.flat.partial-segpipe.tif", "probability.partial-segpipe.tif")


def images(folder: Path, *patterns: str, **settings: Any) -> list[str]:
    """Paths that patterns of a city.yaml in folder mean, as far as they lie in it relative to it."""
    least = {"name": "vienna", "model": "m", "output": "run", "images": list(patterns)}
    config = CityConfig.model_validate(least | settings)
    config._file = folder / "city.yaml"
    return [os.path.relpath(path, folder.resolve()) for path in find_images(config.images, config)]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


# Globs


@pytest.mark.parametrize("name", ["Wien [2024]", "was?", "a*b", "Größe {1}", "[x", "**"])
def test_a_glob_works_in_a_folder_of_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "city"
    touch(folder, "tiles/tile1.tif", "tiles/tile2.tif", "../x/other.tif")
    (tmp_path / "elsewhere" / "city" / "tiles").mkdir(parents=True)
    (tmp_path / "elsewhere" / "city" / "tiles" / "wrong.tif").write_text("")
    found = ["tiles/tile1.tif", "tiles/tile2.tif"]
    assert images(folder, "tiles/*.tif") == found
    assert images(folder, "**/tile?.tif") == found
    assert images(folder, "tiles/tile[12].tif") == found
    assert images(folder, str(folder / "tiles" / "*.tif")) == found
    assert images(folder, "../x/*.tif") == ["../x/other.tif"]
    assert images(tmp_path, f"{name}/city/tiles/*.tif") == [f"{name}/city/{tile}" for tile in found]
    assert images(folder, "tiles") == found


def test_folders_of_a_glob_may_be_globs_and_its_brackets_escaped(tmp_path: Path) -> None:
    touch(tmp_path, "north/1.tif", "south/1.tif", "set [1]/1.tif", "set 1/1.tif")
    assert images(tmp_path, "*th/*.tif") == ["north/1.tif", "south/1.tif"]
    assert images(tmp_path, "set [[]1]/*.tif") == ["set [1]/1.tif"]
    assert images(tmp_path, "set [0-9]/*.tif") == ["set 1/1.tif"]


def test_a_glob_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images: tiles/x\*\*\.tif: Invalid"):
        images(tmp_path, "tiles/x**.tif")
    with pytest.raises(UserError, match="images: ~nobody-of-this-name/1"):
        find_images(("~nobody-of-this-name/1.tif",), tmp_path)


def test_names_with_digits_that_are_no_numbers_are_put_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "t²1.tif", "t²10.tif", "t²2.tif", "²")
    assert images(tmp_path, "t*") == ["t²1.tif", "t²2.tif", "t²10.tif"]
    assert images(tmp_path, "[²]") == ["²"]


@pytest.mark.parametrize("pattern", ["tiles", "tiles/*.tif", "tiles/stra?e.tif"])
def test_a_name_that_is_no_utf_8_is_refused_in_one_line_that_names_it(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "tiles").mkdir()
    file = os.fsencode(tmp_path / "tiles") + b"/stra\xdfe.tif"
    try:
        Path(os.fsdecode(file)).write_text("")
    except OSError:
        pytest.skip("the file system takes no such name")
    with pytest.raises(UserError, match=r"images: .*/tiles/stra\\xdfe\.tif: .*expected UTF-8; cure: rename") as refused:
        images(tmp_path, pattern)
    assert str(refused.value).isascii()


# What a run has written is no tile of the next


@pytest.mark.parametrize("pattern", ["**/*.tif", "tiles/*", "tiles", "tiles/**/*"])
@pytest.mark.parametrize("output", ["tiles", "tiles/run", "."])
def test_neither_published_nor_unfinished_rasters_are_tiles(tmp_path: Path, pattern: str, output: str) -> None:
    touch(tmp_path, "tiles/a.tif", "tiles/sub/b.tif")
    folder = tmp_path / output
    touch(folder, *PUBLISHED, *LEFT_BY_A_KILL, "store.zarr/image/c/0", "validity/tile1-12.npy", "ledger/x/1.json")
    touch(folder, "ledger/x/1.json.0f.partial", "fragments/1_1.arrow")
    tiles = ["tiles/a.tif"] if pattern in ("tiles", "tiles/*") else ["tiles/a.tif", "tiles/sub/b.tif"]
    assert images(tmp_path, pattern, output=output) == tiles


def test_tiles_with_such_names_elsewhere_are_tiles(tmp_path: Path) -> None:
    touch(tmp_path, "tiles/mask.tif", "tiles/fragments/1.tif", "tiles/a.partial.tif", "run/city/mask.tif")
    assert images(tmp_path, "tiles/**/*.tif") == [
        "tiles/a.partial.tif",
        "tiles/fragments/1.tif",
        "tiles/mask.tif",
    ]
    assert images(tmp_path, "run/city") == ["run/city/mask.tif"]


@pytest.mark.parametrize("pattern", ["tiles", "tiles/*.tif"])
def test_a_run_into_the_folder_of_the_tiles_may_be_run_again(city: City, in_process: type, pattern: str) -> None:
    folder = city.folder / "tiles"
    map_it(city.config, f"images={pattern}", "output=tiles")
    expected = outputs(folder)
    touch(folder, *LEFT_BY_A_KILL)
    assert map_it(city.config, f"images={pattern}", "output=tiles").skipped == {}
    assert outputs(folder) == expected


@pytest.fixture
def city(make_city: Any) -> City:
    made: City = make_city(1, 2, tile_px=144, grid={"chunk_px": 128, "block_px": 128})
    return made


# A VRT


def source(name: str, **changes: str) -> str:
    """A SimpleSource of gdalbuildvrt: a tile of 144 px, beside its neighbour."""
    parts = {
        "name": f'<SourceFilename relativeToVRT="1">{name}</SourceFilename>',
        "band": "<SourceBand>1</SourceBand>",
        "size": '<SourceProperties RasterXSize="144" RasterYSize="144" DataType="Byte"/>',
        "src": '<SrcRect xOff="0" yOff="0" xSize="144" ySize="144"/>',
        "dst": '<DstRect xOff="144" yOff="0" xSize="144.0000001" ySize="144"/>',
        "more": "",
        "tag": "SimpleSource",
    } | changes
    tag = parts.pop("tag")
    return f"<{tag}>{''.join(parts.values())}</{tag}>"


def write_vrt(path: Path, *sources: str, band: str = "", attributes: str = 'dataType="Byte" band="1"') -> Path:
    path.write_text(
        f'<VRTDataset rasterXSize="288" rasterYSize="144"><VRTRasterBand {attributes}>{band}{"".join(sources)}'
        "</VRTRasterBand></VRTDataset>"
    )
    return path


def test_a_vrt_of_whole_tiles_stands_for_them_in_its_order_and_nested_ones_too(tmp_path: Path) -> None:
    touch(tmp_path, "a.tif", "b.tif", "c.tif")
    (tmp_path / "sub").mkdir()
    write_vrt(tmp_path / "sub" / "inner.vrt", source("../b.tif"), source("../a.tif"))
    inner = source("sub/inner.vrt", size='<SourceProperties RasterXSize="288" RasterYSize="144"/>')
    inner = inner.replace('xOff="144"', 'xOff="0"').replace('xSize="144', 'xSize="288')
    write_vrt(tmp_path / "city.vrt", source("c.tif"), inner)
    assert images(tmp_path, "city.vrt") == ["c.tif", "b.tif", "a.tif"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"src": '<SrcRect xOff="16" yOff="0" xSize="64" ySize="64"/>'}, "takes 64 x 64 px of b.tif, which has 144"),
        ({"src": '<SrcRect xOff="16" yOff="0" xSize="144" ySize="144"/>'}, "takes 144 x 144 px of b.tif"),
        ({"dst": '<DstRect xOff="0" yOff="0" xSize="72" ySize="72"/>'}, "makes 72 x 72 px of b.tif"),
        ({"dst": ""}, "makes 288 x 144 px of b.tif"),
        ({"dst": '<DstRect xOff="160" yOff="0" xSize="144" ySize="144"/>'}, "b.tif reaches 16 px over its edge"),
        ({"dst": '<DstRect xOff="0" yOff="-8" xSize="144" ySize="144"/>'}, "b.tif reaches 8 px over its edge"),
        ({"band": "<SourceBand>3</SourceBand>"}, "band 1 is band 3 of b.tif"),
        ({"band": "<SourceBand>mask,1</SourceBand>"}, "band 1 is band mask,1 of b.tif"),
        ({"tag": "ComplexSource", "more": "<ScaleRatio>2</ScaleRatio>"}, r"calculates with b.tif \(ScaleRatio\)"),
        ({"tag": "KernelFilteredSource"}, r"calculates with b.tif \(KernelFilteredSource\)"),
        ({"dst": '<DstRect xOff="0" yOff="x" xSize="72" ySize="72"/>'}, "yOff of DstRect is 'x'; expected a number"),
    ],
)
def test_a_vrt_that_does_more_than_to_place_its_sources_is_refused_with_the_cure(
    tmp_path: Path, change: dict[str, str], says: str
) -> None:
    touch(tmp_path, "a.tif", "b.tif")
    write_vrt(tmp_path / "city.vrt", source("a.tif"), source("b.tif", **change))
    with pytest.raises(UserError, match=says) as refused:
        images(tmp_path, "city.vrt")
    assert "\n" not in str(refused.value)
    assert "number" in says or "cure: gdal_translate city.vrt city.tif, or name the sources" in str(refused.value)


def test_a_window_of_a_tile_is_refused_where_the_vrt_does_not_know_the_tiles_size(tmp_path: Path) -> None:
    write_tile(tmp_path / "b.tif", draw_blobs(144, 144), 0, 0)
    window = '<SrcRect xOff="0" yOff="0" xSize="64" ySize="64"/>'
    write_vrt(tmp_path / "city.vrt", source("b.tif", size="", src=window))
    with pytest.raises(UserError, match=r"takes 64 x 64 px of b\.tif, which has 144 x 144"):
        images(tmp_path, "city.vrt")
    write_vrt(tmp_path / "city.vrt", source("b.tif", size=""))
    assert images(tmp_path, "city.vrt") == ["b.tif"]


def test_a_band_that_is_calculated_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.tif")
    write_vrt(tmp_path / "city.vrt", source("a.tif"), attributes='band="1" subClass="VRTDerivedRasterBand"')
    with pytest.raises(UserError, match=r"calculates with a\.tif"):
        images(tmp_path, "city.vrt")


def test_a_nested_vrt_that_crops_is_refused_and_a_vrt_of_itself_too(tmp_path: Path) -> None:
    touch(tmp_path, "a.tif")
    write_vrt(tmp_path / "inner.vrt", source("a.tif", src='<SrcRect xOff="0" yOff="0" xSize="9" ySize="9"/>'))
    write_vrt(tmp_path / "city.vrt", source("inner.vrt"))
    with pytest.raises(UserError, match=r"inner\.vrt: it takes 9 x 9 px of a\.tif"):
        images(tmp_path, "city.vrt")
    write_vrt(tmp_path / "inner.vrt", source("city.vrt"))
    with pytest.raises(UserError, match=r"city\.vrt: a VRT that is among its own sources"):
        images(tmp_path, "city.vrt")


def test_the_nodata_of_a_vrt_is_that_of_its_tiles_or_stands_in_the_yaml(tmp_path: Path) -> None:
    write_tile(tmp_path / "with.tif", draw_blobs(144, 144), 0, 0, nodata=7)
    write_tile(tmp_path / "without.tif", draw_blobs(144, 144), 0, 144)
    for number, name in enumerate(("with.tif", "without.tif")):
        complex_one = source(name, tag="ComplexSource", more="<NODATA>7</NODATA>")
        write_vrt(tmp_path / f"{number}.vrt", complex_one, band="<NoDataValue>7</NoDataValue>")
    assert images(tmp_path, "0.vrt") == ["with.tif"]
    with pytest.raises(UserError, match=r"nodata is 7, that of without\.tif is none.*cure: `nodata: 7` in the YAML"):
        images(tmp_path, "1.vrt")
    assert images(tmp_path, "1.vrt", nodata=[7]) == ["without.tif"]


def placed_vrt(folder: Path, *, mask: bool = False) -> Path:
    """What `gdal_translate -of VRT` makes of a tile: it says where the tile itself says that it lies."""
    image = draw_blobs(144, 144)
    tile = write_tile(folder / "a.tif", image, *ORIGIN)
    if mask:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(tile, "r+") as dataset:
            dataset.write_mask(image[0] > 50)
    rasterio.shutil.copy(tile, folder / "city.vrt", driver="VRT")
    return folder / "city.vrt"


def rewritten(path: Path, pattern: str, text: str) -> None:
    changed, count = re.subn(pattern, text, path.read_text(), flags=re.DOTALL)
    assert count
    path.write_text(changed)


GEOREFERENCE = "<GeoTransform>.*</GeoTransform>"


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", "EPSG:31256", "+proj=laea +lat_0=48 +lon_0=16", None])
def test_a_vrt_that_says_of_its_tile_what_the_tile_says_stands_for_it(tmp_path: Path, crs: str | None) -> None:
    write_tile(tmp_path / "a.tif", draw_blobs(144, 144), *ORIGIN, crs=crs)
    rasterio.shutil.copy(tmp_path / "a.tif", tmp_path / "city.vrt", driver="VRT")
    assert images(tmp_path, "city.vrt") == ["a.tif"]


def test_a_mosaic_of_which_all_tiles_lie_where_they_say_stands_for_them(tmp_path: Path) -> None:
    for number in range(2):
        write_tile(tmp_path / f"{number}.tif", draw_blobs(144, 144), ORIGIN[0], ORIGIN[1] + 144 * number)
    first = source("0.tif", dst='<DstRect xOff="0" yOff="0" xSize="144" ySize="144"/>')
    vrt = write_vrt(tmp_path / "city.vrt", first, source("1.tif"))
    x, y = 0.1 + ORIGIN[1] * 0.3, 0.1 - ORIGIN[0] * 0.3
    rewritten(vrt, "(?=<VRTRasterBand)", f"<SRS>EPSG:32633</SRS><GeoTransform>{x}, 0.3, 0, {y}, 0, -0.3</GeoTransform>")
    assert images(tmp_path, "city.vrt") == ["0.tif", "1.tif"]
    write_tile(tmp_path / "1.tif", draw_blobs(144, 144), ORIGIN[0], ORIGIN[1] + 145)
    with pytest.raises(UserError, match=r"puts 1\.tif at .* corners of it up to 1\.00 px apart"):
        images(tmp_path, "city.vrt")
    (tmp_path / "1.tif").unlink()
    assert images(tmp_path, "city.vrt") == ["0.tif", "1.tif"], "the plan says that it is gone, or leaves it out"


@pytest.mark.parametrize(
    ("pattern", "text", "says"),
    [
        ("<SRS.*</SRS>", "<SRS>EPSG:32632</SRS>", r"its CRS is EPSG:32632, that of a\.tif is EPSG:32633"),
        ("<SRS.*</SRS>", "<SRS>nowhere</SRS>", r"city\.vrt: nowhere is not a CRS"),
        (
            GEOREFERENCE,
            "<GeoTransform>7, 0.3, 0, 9, 0, -0.3</GeoTransform>",
            r"it puts a\.tif at \(7, 9\), its own header at",
        ),
        ("0.3|2.99[0-9]*e-01", "0.301", r"a\.tif at .* corners of it up to 0\.48 px apart"),
        (GEOREFERENCE, "<GeoTransform>1, 2</GeoTransform>", "GeoTransform is '1, 2'; expected 6 numbers"),
        (GEOREFERENCE, "<GeoTransform>1, 2, 0, nan, 0, 3</GeoTransform>", "GeoTransform is .*; expected 6 numbers"),
        (GEOREFERENCE, "<GCPList/>", "ground control points"),
    ],
)
def test_a_vrt_that_puts_its_tile_elsewhere_is_refused_with_the_cure(
    tmp_path: Path, pattern: str, text: str, says: str
) -> None:
    rewritten(placed_vrt(tmp_path), pattern, text)
    with pytest.raises(UserError, match=says) as refused:
        images(tmp_path, "city.vrt")
    assert "\n" not in str(refused.value)
    assert "expected 6" in says or "not a CRS" in says or "gdal_translate city.vrt city.tif" in str(refused.value)


def test_a_vrt_that_places_a_tile_without_a_place_is_refused(tmp_path: Path) -> None:
    placed_vrt(tmp_path)
    write_tile(tmp_path / "a.tif", draw_blobs(144, 144), 0, 0, crs=None, transform=None)
    with pytest.raises(UserError, match=r"its own header at \(0, 0\)"):
        images(tmp_path, "city.vrt")


def test_a_mask_in_a_vrt_is_that_of_its_tile_or_refused(tmp_path: Path) -> None:
    vrt = placed_vrt(tmp_path, mask=True)
    assert images(tmp_path, "city.vrt") == ["a.tif"]
    rewritten(vrt, "<SourceBand>mask,1<", "<SourceBand>3<")
    with pytest.raises(UserError, match=r"its mask is band 3 of a\.tif"):
        images(tmp_path, "city.vrt")


def test_a_vrt_that_moves_a_tile_behind_a_url_is_refused(tmp_path: Path) -> None:
    vrt = placed_vrt(tmp_path)
    with serving(tmp_path) as server:
        assert find_images((server.url("city.vrt"),), tmp_path) == (server.url("a.tif"),)
        rewritten(vrt, GEOREFERENCE, "<GeoTransform>7, 0.3, 0, 9, 0, -0.3</GeoTransform>")
        with pytest.raises(UserError, match=r"it puts a\.tif at \(7, 9\)"):
            find_images((server.url("city.vrt"),), tmp_path)


@pytest.mark.parametrize("text", ["no XML", "<VRTDataset/>", '<?xml version="1.0" encoding="utf-7000"?><V/>'])
def test_what_is_no_vrt_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "city.vrt").write_text(text)
    with pytest.raises(UserError, match=r"city\.vrt: (not a VRT|no SourceFilename)"):
        images(tmp_path, "city.vrt")
    write_vrt(tmp_path / "city.vrt", source(""))
    with pytest.raises(UserError, match="an empty SourceFilename"):
        images(tmp_path, "city.vrt")


def test_remote_sources_of_a_vrt_are_urls_and_a_vrt_may_be_behind_one(tmp_path: Path) -> None:
    absolute = [
        source(name).replace('relativeToVRT="1"', 'relativeToVRT="0"')
        for name in ("/vsicurl/https://host/a.tif", "/vsis3/bucket/sub/b.tif", "https://host/c%20d.tif")
    ]
    write_vrt(tmp_path / "city.vrt", *absolute)
    expected = ("https://host/a.tif", "s3://bucket/sub/b.tif", "https://host/c%20d.tif")
    assert find_images(("city.vrt",), tmp_path) == expected
    write_vrt(tmp_path / "sub.vrt", source("tiles/e.tif"), *absolute)
    with serving(tmp_path) as server:
        found = find_images((server.url("sub.vrt"),), tmp_path)
    assert found == (server.url("tiles/e.tif"), *expected)
    write_vrt(tmp_path / "city.vrt", source("/vsizip/a.zip/b.tif"))
    with pytest.raises(UserError, match=r"city\.vrt: /vsizip/a\.zip/b\.tif: /vsizip/ cannot be read"):
        images(tmp_path, "city.vrt")


def test_a_changed_source_of_a_vrt_is_noticed_and_only_it_is_looked_at_again(city: City, in_process: type) -> None:
    names = ("tiles/tile1.tif", "tiles/tile2.tif")
    write_vrt(city.folder / "city.vrt", source(names[0]), source(names[1]))
    map_it(city.config, "images=city.vrt")
    assert nothing_changed(load_city(city.config, ["images=city.vrt"])) is not None
    before = tasks_done(city.folder / "run")
    write_tile(city.folder / names[1], 255 - city.image_CHW[:, :, 144:], ORIGIN[0], ORIGIN[1] + 144)
    assert nothing_changed(load_city(city.config, ["images=city.vrt"])) is None
    map_it(city.config, "images=city.vrt")
    assert stages_since(city.folder / "run", before)["scan"] == 1
    map_it(city.config, "output=plain")
    assert outputs(city.folder / "run") == outputs(city.folder / "plain")


# Formats


@pytest.mark.parametrize(("name", "kind"), [("b.ecw", "ECW"), ("b.ECW", "ECW"), ("b.sid", "MrSID")])
@pytest.mark.parametrize("pattern", ["tiles", "tiles/*", "tiles/b.*"])
def test_ecw_and_mrsid_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, name: str, kind: str, pattern: str
) -> None:
    touch(tmp_path, f"tiles/{name}", "tiles/a.tif")
    with pytest.raises(UserError, match=f"images: {tmp_path}/tiles/{name}: {kind}") as refused:
        images(tmp_path, pattern)
    assert str(refused.value).endswith(
        f"gdal_translate -co TILED=YES -co COMPRESS=DEFLATE -co BIGTIFF=IF_SAFER {name} b.tif"
    )
    assert images(tmp_path, "tiles/*.tif") == ["tiles/a.tif"]


def test_of_many_ecw_tiles_one_is_named_and_the_others_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "tiles/2.ecw", "tiles/10.ecw", "tiles/11.sid", "tiles/12.tif")
    with pytest.raises(UserError, match=r"tiles/2\.ecw \(and 2 more\): ECW"):
        images(tmp_path, "tiles")
    with pytest.raises(UserError, match=r"https://host/a\.sid: MrSID"):
        images(tmp_path, "https://host/a.sid")


# Stamps


def test_a_stamp_changes_with_a_world_file_and_is_what_json_gives_back(tmp_path: Path) -> None:
    path = write_tile(tmp_path / "tile.tif", np.zeros((1, 8, 8), np.uint8), 0, 0)
    before = stamp(str(path))
    assert json.loads(json.dumps(before)) == before
    (tmp_path / "tile.tfw").write_text("0.3\n0\n0\n-0.3\n5\n5\n")
    with_world = stamp(str(path))
    assert with_world != before
    (tmp_path / "tile.tfw").write_text("0.3\n0\n0\n-0.3\n6\n5\n")
    os.utime(tmp_path / "tile.tfw", ns=(1, 1))
    assert stamp(str(path)) not in (before, with_world)
    (tmp_path / "tile.tif").unlink()
    assert stamp(str(path)) == []
