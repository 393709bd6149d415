"""Laws of the report: it says all that it was given, needs no network, and the picture shows every footprint."""

import resource
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from PIL import Image
from published_rows import published_rows
from pyproj import CRS

from segpipe.pipeline import report as module
from segpipe.pipeline.geopackage import write_geopackage
from segpipe.pipeline.report import Report, StageTime, write_preview, write_report
from segpipe.tasks.errors import RunError
from segpipe.tasks.grid import Lattice, Window

LATTICE = Lattice(CRS(32645).to_wkt(), 0.5, 0.25, 0.1)

REPORT = Report(
    name="Öd & Söhne <town>",
    finished="2026-03-01 12:00 UTC",
    model="buildings-mobilenetv2",
    plan=(("lattice", "EPSG:32645, pixel 0.5"),),
    recipe=(("precision", "bfloat16"),),
    config_yaml="name: town\nimages: tiles/*.tif\n",
    tiles=20,
    chunks=24,
    blocks=6,
    buildings=12_345,
    buildings_m2=250_000.0,
    valid_px=4_000_000,
    pixel_m=0.5,
    invalid=(("nodata 255", 4_321, 1_080.25), ("mask band", 40, 10.0)),
    halo_px=320,
    extra_pixels=0.34,
    stages=(StageTime("predict", 6, 2, 120.0, 61.0, 19_000_000), StageTime("merge", 0, 6, 0.0, 0.0, 0)),
    device="93% of the time in the network; waited 5% for a block's chunks",
    skipped=(("tiles/town7.tif", "truncated"),),
    warnings=("the new file is buildings-2.gpkg",),
    versions=(("torch", "2.13.0"),),
    outputs=(("mask.tif", "the raw mask"),),
)


class Page(HTMLParser):
    """Visible text of a page, its cells, and whatever it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def geopackage(path: Path, boxes: list[tuple[int, int, int, int]]) -> Path:
    """Footprints from (row, col, row_stop, col_stop) on the lattice."""
    polygons = []
    for row, col, row_stop, col_stop in boxes:
        xmin, ymin, xmax, ymax = LATTICE.bounds(Window.between(row, col, row_stop, col_stop))
        polygons.append(shapely.box(xmin, ymin, xmax, ymax))
    count = len(boxes)
    rows = published_rows(np.array(polygons, dtype=object), building_id=[f"b{n}" for n in range(count)])
    write_geopackage(path, [rows], LATTICE.crs_wkt)
    return path


def draw(
    tmp_path: Path,
    image_BHW: NDArray[np.uint8],
    valid_HW: NDArray[np.bool_],
    window: Window,
    boxes: list[tuple[int, int, int, int]] | None = None,
    max_px: int = 1600,
) -> NDArray[np.uint8]:
    """The picture, (H, W, 3)."""
    path = tmp_path / "preview.png"
    footprints = geopackage(tmp_path / "b.gpkg", boxes or [])

    def read_image(part: Window) -> NDArray[np.uint8]:
        return image_BHW[:, *part.within(window)]

    write_preview(path, read_image, lambda part: valid_HW[part.within(window)], window, LATTICE, footprints, max_px)
    assert not [left for left in tmp_path.iterdir() if "partial" in left.name]
    return np.asarray(Image.open(path))


def test_the_page_says_all_that_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, REPORT)
    page = Page(path)
    for text in (
        "Öd & Söhne <town>", "2026-03-01 12:00 UTC", "buildings-mobilenetv2", "EPSG:32645, pixel 0.5", "bfloat16",
        "images: tiles/*.tif", "12,345", "25.00 ha", "25.0 %", "1.00 km²", "24 chunks, 6 blocks", "nodata 255", "4,321",
        "1,080", "mask band", "320 px", "34 %", "predict", "2 min 0 s", "1 min 1 s", "0.31", "tiles/town7.tif",
        "truncated", "the new file is buildings-2.gpkg", "torch", "2.13.0", "mask.tif", "the raw mask",
    ):  # fmt: skip
        assert text in page.text, text
    assert "town" not in page.tags, "a name is text, not markup"
    assert [left.name for left in tmp_path.iterdir()] == ["report.html"]


def test_an_empty_city_has_a_page_without_empty_headings(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    nothing = {"buildings": 0, "buildings_m2": 0.0, "valid_px": 0, "invalid": (), "skipped": (), "warnings": ()}
    write_report(path, replace(REPORT, **nothing))  # type: ignore[arg-type]
    text = Page(path).text
    assert "Tiles left out" not in text
    assert "0.0 %" in text
    assert "nan" not in text.lower()


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match=r"report\.html: cannot be written .*File too large"):
            write_report(path, REPORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(left.name, left.read_text()) for left in tmp_path.iterdir()] == [("report.html", "old")]


def test_speed_is_of_the_clock_and_absent_where_nothing_was_done() -> None:
    done, kept = REPORT.stages
    assert done.mpx_per_s == pytest.approx(19 / 61)
    assert kept.mpx_per_s is None


@pytest.mark.parametrize("read_px", [32, 2048])
def test_the_picture_is_the_mean_of_the_valid_pixels_for_any_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_px: int
) -> None:
    monkeypatch.setattr(module, "READ_PX", read_px)
    rng = np.random.default_rng(0)
    window = Window(-40, 7, 90, 130)
    image_BHW = rng.integers(0, 256, (3, 90, 130), dtype=np.uint8)
    valid_HW = rng.random((90, 130)) < 0.9
    image_BHW[:, ~valid_HW] = 255
    found = draw(tmp_path, image_BHW, valid_HW, window, max_px=40)
    assert found.shape == (23, 33, 3)
    for row, col in ((0, 0), (5, 30), (21, 31)):
        cell = (slice(4 * row, 4 * row + 4), slice(4 * col, 4 * col + 4))
        pixels = image_BHW[:, *cell][:, valid_HW[cell]]
        assert np.abs(found[row, col] - pixels.mean(axis=1)).max() < 1


def test_a_picture_smaller_than_the_limit_keeps_every_pixel(tmp_path: Path) -> None:
    image_BHW = np.random.default_rng(0).integers(0, 256, (3, 50, 60), dtype=np.uint8)
    found = draw(tmp_path, image_BHW, np.ones((50, 60), bool), Window(3, 4, 50, 60))
    np.testing.assert_array_equal(found, np.moveaxis(image_BHW, 0, -1))


def test_grey_imagery_is_shown_as_grey(tmp_path: Path) -> None:
    image_BHW = np.random.default_rng(0).integers(0, 256, (1, 20, 30), dtype=np.uint8)
    found = draw(tmp_path, image_BHW, np.ones((20, 30), bool), Window(0, 0, 20, 30))
    np.testing.assert_array_equal(found, np.moveaxis(image_BHW[[0, 0, 0]], 0, -1))


@pytest.mark.parametrize("max_px", [400, 100])
def test_every_footprint_is_outlined_where_it_lies(tmp_path: Path, max_px: int) -> None:
    window = Window(-100, 50, 400, 300)
    boxes = [(-90, 60, -50, 120), (100, 200, 180, 240), (200, 300, 290, 340)]
    blue_BHW = np.zeros((3, 400, 300), np.uint8)
    blue_BHW[2] = 200
    found = draw(tmp_path, blue_BHW, np.ones((400, 300), bool), window, boxes=boxes, max_px=max_px)
    factor = 400 // max_px
    drawn_HW = found[..., 0] > 60
    expected_HW = np.zeros((400, 300), bool)
    for row, col, row_stop, col_stop in boxes:
        inside = Window.between(row, col, row_stop, col_stop)
        expected_HW[inside.within(window)] = True
        middle = ((row + row_stop) // 2 - window.row_off) // factor, ((col + col_stop) // 2 - window.col_off) // factor
        assert not drawn_HW[middle], "a footprint is not filled"
        for y, x in ((row, col), (row, col_stop), (row_stop, col), (row_stop, col_stop)):
            y_px, x_px = (y - window.row_off) // factor, (x - window.col_off) // factor
            assert drawn_HW[y_px - 1 : y_px + 1, x_px - 1 : x_px + 1].any(), "an outline passes its corners"
    near_HW = shapely.contains_xy(
        shapely.union_all([shapely.box(c, r, c2, r2).buffer(2 * factor) for r, c, r2, c2 in boxes]),
        *np.meshgrid(window.col_off + (np.arange(drawn_HW.shape[1]) + 0.5) * factor,
                     window.row_off + (np.arange(drawn_HW.shape[0]) + 0.5) * factor),
    )  # fmt: skip
    assert not (drawn_HW & ~near_HW).any(), "nothing is drawn elsewhere"


def test_where_there_is_no_imagery_the_picture_is_hatched_and_the_image_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_PX", 64)
    window = Window(0, 0, 128, 192)
    valid_HW = np.zeros((128, 192), bool)
    valid_HW[:64, :64] = True
    read: list[Window] = []

    def read_image(part: Window) -> NDArray[np.uint8]:
        read.append(part)
        return np.zeros((3, *part.shape_yx), np.uint8)

    path = tmp_path / "preview.png"
    footprints = geopackage(tmp_path / "b.gpkg", [])
    write_preview(path, read_image, lambda part: valid_HW[part.within(window)], window, LATTICE, footprints)
    found = np.asarray(Image.open(path))
    assert read == [Window(0, 0, 64, 64)]
    assert (found[:64, :64] == 0).all()
    colours = {tuple(colour) for colour in found[64:].reshape(-1, 3).tolist()}
    assert colours == {module.HATCH_RGB, module.PAPER_RGB}
    np.testing.assert_array_equal(found[70:120, 10:100], found[71:121, 9:99], "the lines go on over parts")
