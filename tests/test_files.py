"""Laws of a tile's files: what GDAL reads with it belongs to it, and nothing else does."""

import os
import shutil
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import rasterio

from segpipe.tasks.errors import TileError
from segpipe.tasks.files import file_digest, file_stamp, side_files

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

WORLD = "0.3\n0\n0\n-0.3\n500000.15\n3000000.15\n"
PAM = "<PAMDataset>{}</PAMDataset>"
STATISTICS = (
    '<PAMRasterBand band="1"><Histograms><HistItem><HistMin>0</HistMin></HistItem></Histograms>'
    '<Metadata><MDI key="STATISTICS_MEAN">7</MDI></Metadata></PAMRasterBand>'
)
PLACE = "<GeoTransform>5,1,0,5,0,-1</GeoTransform>"


@pytest.fixture
def tile(tmp_path: Path) -> Path:
    return write(tmp_path / "tile.tif", "GTiff")


def write(path: Path, driver: str) -> Path:
    with rasterio.open(path, "w", driver=driver, width=8, height=8, count=1, dtype="uint8") as raster:
        raster.write(np.zeros((1, 8, 8), np.uint8))
    return path


@pytest.mark.parametrize(
    ("name", "driver", "beside"),
    [
        ("tile.tif", "GTiff", ["tile.tfw", "tile.TFW", "tile.tifw", "tile.wld", "tile.tif.aux.xml"]),
        ("tile.TIFF", "GTiff", ["tile.tfw", "tile.TFW", "tile.TIFFW", "tile.WLD", "tile.TIFF.aux.xml"]),
        ("tile.jpg", "JPEG", ["tile.jgw", "tile.JGW", "tile.jpgw", "tile.wld"]),
        ("tile.jp2", "JP2OpenJPEG", ["tile.j2w", "tile.jp2w", "tile.wld"]),
    ],
)
def test_what_gdal_takes_a_tiles_place_from_is_a_side_file(
    tmp_path: Path, name: str, driver: str, beside: list[str]
) -> None:
    for side in beside:
        folder = tmp_path / side
        folder.mkdir()
        path = write(folder / name, driver)
        (folder / f"{name}.aux.xml").unlink(missing_ok=True)
        (folder / side).write_text(PAM.format(PLACE) if side.endswith("xml") else WORLD)
        with rasterio.open(path) as raster:
            assert raster.transform.c > 1, f"GDAL does not read {side}: the test has no point"
        assert side_files(str(path)) == [path, folder / side]


def test_overviews_and_other_tiles_are_no_side_files(tile: Path) -> None:
    for name in ("tile.tif.ovr", "tile2.tfw", "tile.txt", "tile.tif.partial"):
        tile.with_name(name).write_text(WORLD)
    (tile.parent / "tile.wld").mkdir()
    assert side_files(str(tile)) == [tile]


@pytest.mark.parametrize("name", ["tile.tif.msk", "tile.tif.aux.xml", "tile.prj", "tile.tfw", "tile.tab", "tile.ige"])
def test_stamp_and_digest_change_with_every_side_file_even_if_it_is_old(tile: Path, name: str) -> None:
    found = {(file_stamp(str(tile)), file_digest(str(tile)))}
    # A file that was copied with its time of change, and one of the same size: neither newest nor longer.
    for number, content in enumerate(("<a><b>1</b></a>", "<a><b>2</b></a>")):
        tile.with_name(name).write_text(content)
        os.utime(tile.with_name(name), ns=(10**15 + number, 10**15 + number))
        found.add((file_stamp(str(tile)), file_digest(str(tile))))
    assert len({stamp for stamp, _ in found}) == len({digest for _, digest in found}) == 3


def test_the_digest_of_a_tile_alone_is_that_of_its_bytes_and_does_not_know_its_name(tile: Path) -> None:
    assert file_digest(str(tile)) == blake2b(tile.read_bytes(), digest_size=16).hexdigest()
    tile.with_name("tile.tfw").write_text(WORLD)
    shutil.copy(tile, tile.with_name("other name.tif"))
    shutil.copy(tile.with_name("tile.tfw"), tile.with_name("other name.tfw"))
    assert file_digest(str(tile)) == file_digest(str(tile.with_name("other name.tif")))


def test_what_ends_one_file_is_not_taken_for_the_beginning_of_the_next(tile: Path) -> None:
    found = set()
    for prj, tfw in (("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", "")):
        tile.with_name("tile.prj").write_text(prj)
        tile.with_name("tile.tfw").write_text(tfw)
        found.add(file_digest(str(tile)))
    assert len(found) == 4


def test_statistics_that_a_viewer_has_written_change_the_stamp_and_not_the_digest(tile: Path) -> None:
    aux = tile.with_name("tile.tif.aux.xml")
    stamp, digest = file_stamp(str(tile)), file_digest(str(tile))
    aux.write_text(PAM.format(STATISTICS))
    assert file_stamp(str(tile)) != stamp
    assert file_digest(str(tile)) == digest
    aux.write_text(PAM.format(PLACE))
    placed = file_digest(str(tile))
    assert placed != digest
    aux.write_text(PAM.format(PLACE + STATISTICS))
    assert file_digest(str(tile)) == placed
    aux.write_text(PAM.format(PLACE) + "no XML")
    assert file_digest(str(tile)) not in (placed, digest)


@pytest.mark.parametrize("act", [file_digest, file_stamp])
def test_a_missing_file_is_named(tmp_path: Path, act: Callable[[str], object]) -> None:
    with pytest.raises(TileError, match="No such file or directory") as error:
        act(str(tmp_path / "gone.tif"))
    assert error.value.path == str(tmp_path / "gone.tif")
