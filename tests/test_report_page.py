"""Laws of the page of a run in a browser: it loads nothing, says nothing to the console, zooms, and fits any width."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shapely
from affine import Affine
from conftest import ORIGIN, City, FakePredictor, map_it, write_tile
from PIL import Image, ImageColor
from pyproj import CRS
from test_report import geopackage

from segpipe.pipeline.config import load_city
from segpipe.pipeline.report_charts import Span, areas_chart, read_spans, timeline_chart
from segpipe.pipeline.report_map import AREA_BINS, COLOURS, TileMark, draw_map, path_of
from segpipe.pipeline.run import dry_run
from segpipe.tasks.grid import Lattice, Window

LATTICE = Lattice(CRS(32645).to_wkt(), 0.5, 0.25, 0.1)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> str:
    """The program; tests that want one are skipped where there is none."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    return found


@pytest.fixture
def page(make_city: Callable[..., City], in_process: type[FakePredictor]) -> Path:
    city = make_city()
    tile = city.folder / "tiles" / "tile4.tif"
    write_tile(tile, city.image_CHW[:, 300:, 300:], ORIGIN[0] + 300, ORIGIN[1] + 300, blockysize=8)
    data = bytearray(tile.read_bytes())
    data[-3500:-2000] = b"\xff" * 1500  # its header is whole: it has a place on the map
    tile.write_bytes(bytes(data))
    map_it(city.set(on_tile_error="skip", nodata=None))
    return city.folder / "run" / "report.html"


def browse(browser: str, folder: Path, url: str, *options: str) -> str:
    """What a headless browser writes to its standard output. It finds no host on any network."""
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=5000", *options, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def asked(browser: str, page: Path, width: int, script: str) -> dict[str, object]:
    """What a script finds in the page in a frame of some width; `it` is its document, `view` its window.

    Errors of the page itself come back as `errors`. The frame is needed since no window gets narrower than 500 px.
    """
    source = page.read_text(encoding="utf-8")
    listening = (
        "<script>errors=[];addEventListener('error',e=>errors.push(e.message||String(e.target.src)),true)</script>"
    )
    framed = html.escape(source.replace("<head>", f"<head>{listening}", 1), quote=True)
    outer = page.with_name(f"outer{width}.html")
    outer.write_text(
        f'<meta charset="utf-8"><body><iframe style="width:{width}px;height:900px;border:0" srcdoc="{framed}"></iframe>'
        "<script>onload=()=>{const view=document.querySelector('iframe').contentWindow,it=view.document;"
        f"const found=(()=>{{{script}}})();"
        "document.body.innerHTML='<pre>'+JSON.stringify({...found,errors:view.errors})+'</pre>'}</script>",
        encoding="utf-8",
    )
    text = browse(browser, page.parent, outer.as_uri(), "--dump-dom")
    match = re.search(r"<pre>(.*)</pre>", text, re.DOTALL)
    assert match is not None, text[-500:]
    found: dict[str, object] = json.loads(html.unescape(match[1]))
    return found


@pytest.mark.parametrize("width", [320, 390, 768, 1400])
def test_the_page_fits_any_width_and_has_no_error(browser: str, page: Path, width: int) -> None:
    found = asked(
        browser, page, width,
        "const root=it.documentElement, svg=it.querySelector('#map svg').getBoundingClientRect();"
        "return {overflow: root.scrollWidth - root.clientWidth, map: svg.width, height: svg.height,"
        " folded: it.querySelectorAll('details').length, font: view.getComputedStyle(it.body).fontSize}",
    )  # fmt: skip
    assert found["errors"] == []
    assert found["overflow"] == 0, "nothing has to be scrolled sideways"
    assert 0.7 * min(width, 960) < float(str(found["map"])) <= width


def test_the_map_zooms_moves_and_tells_what_is_pointed_at(browser: str, page: Path) -> None:
    found = asked(
        browser, page, 1000,
        "const svg=it.querySelector('#map svg'), box=()=>svg.getAttribute('viewBox').split(' ').map(Number);"
        "const send=(kind,type,o)=>svg.dispatchEvent(new view[kind](type,{bubbles:true,cancelable:true,...o}));"
        "const r=svg.getBoundingClientRect(), begin=box();"
        "it.querySelector('[data-zoom=\"2\"]').click(); const near=box();"
        "const mid={clientX:r.x+r.width/2, clientY:r.y+r.height/2, pointerId:1, pointerType:'mouse'};"
        "svg.setPointerCapture=()=>{};"
        "send('PointerEvent','pointerdown',mid);"
        "send('PointerEvent','pointermove',{...mid, clientX:mid.clientX-100});"
        "send('PointerEvent','pointerup',mid); const moved=box();"
        "send('WheelEvent','wheel',{clientX:mid.clientX, clientY:mid.clientY, deltaY:-400}); const wheeled=box();"
        "send('KeyboardEvent','keydown',{key:'-'}); const keyed=box();"
        "it.querySelector('[data-zoom=\"0\"]').click(); const all=box();"
        "const facts=JSON.parse(it.getElementById('facts').textContent);"
        "const size=f=>(f[5]-f[3])*(f[6]-f[4]), m=svg.getScreenCTM();"
        "const [id,,,x0,y0,x1,y1]=facts.reduce((a,b)=>size(a)<size(b)?a:b);"
        "send('PointerEvent','pointermove',{pointerId:2, pointerType:'mouse',"
        " clientX:m.e+m.a*(x0+x1)/20, clientY:m.f+m.d*(y0+y1)/20});"
        "return {begin,near,moved,wheeled,keyed,all,id,told:it.querySelector('#map output').textContent}",
    )  # fmt: skip
    assert found["errors"] == []
    begin, near, moved, wheeled, keyed, everything = (
        np.array(found[name], float) for name in ("begin", "near", "moved", "wheeled", "keyed", "all")
    )
    np.testing.assert_allclose(near[2:], begin[2:] / 2)
    np.testing.assert_allclose(near[:2] + near[2:] / 2, begin[2:] / 2), "about the middle"
    assert moved[0] > near[0]
    assert wheeled[2] == pytest.approx(near[2] / np.e, rel=1e-3)
    assert keyed[2] == pytest.approx(wheeled[2] * 2, rel=1e-3)
    np.testing.assert_array_equal(everything, begin)
    assert str(found["told"]).startswith(str(found["id"]))


def test_the_page_prints_whole_and_its_map_is_not_blank(browser: str, page: Path, tmp_path: Path) -> None:
    pdf = tmp_path / "page.pdf"
    browse(browser, page.parent, page.as_uri(), f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    assert pdf.read_bytes()[:5] == b"%PDF-"
    assert pdf.stat().st_size > 20_000
    shot = tmp_path / "page.png"
    browse(browser, page.parent, page.as_uri(), f"--screenshot={shot}", "--window-size=1000,1600")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    near = [np.abs(pixels.astype(int) - ImageColor.getrgb(colour)).sum(axis=2) < 90 for colour in COLOURS]
    assert np.any(near, axis=0).sum() > 200, "outlines are drawn in the colours of their confidence"


def test_the_page_shows_skipped_tiles_the_config_versions_and_every_building(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('class="tile skipped"') == 1
    assert text.count('class="tile copied"') == 3
    script = re.search(r'id="facts">(.*?)</script>', text)
    assert script is not None
    facts = json.loads(script[1])
    manifest = json.loads((page.parent / "manifest.json").read_text())
    assert len(facts) == manifest["counts"]["buildings"]
    assert "chunk_px: 128" in text
    assert manifest["versions"]["torch"] in text
    assert not re.findall(r"(?:src|href)=.https?:", text)


def test_what_is_without_imagery_is_told_in_metres_of_the_ground_whatever_pixels_the_tiles_have(
    make_city: Callable[..., City], in_process: type[FakePredictor]
) -> None:
    city = make_city(1, 1, tile_px=96, nodata_min_m2=50)
    image = np.full((3, 600, 600), 90, np.uint8)
    image[:, 100:400, 200:500] = 0
    for name, size, x in (("tile1.tif", 0.1, 500_000), ("tile2.tif", 0.3, 500_100)):
        place = Affine(size, 0, x, 0, -size, 5_300_000)
        write_tile(city.folder / "tiles" / name, image, 0, 0, transform=place)
    published = map_it(city.config, "grid.resolution_m=0.3")
    html = (city.folder / "run" / "report.html").read_text(encoding="utf-8")
    row = re.search(r'nodata 0</th><td class="n">([\d,]+)</td><td class="n">([\d,]+)</td>', html)
    assert row is not None
    px, m2 = (int(number.replace(",", "")) for number in row.groups())
    assert px == published.validity["nodata 0"] == 2 * 300**2
    assert m2 == pytest.approx(30**2 + 90**2, rel=2e-3), "a square metre of UTM is not quite one of the ground"
    dry = dict(dry_run(load_city(city.config, ["grid.resolution_m=0.3"])))
    assert dry["invalid"] == f"nodata 0: {m2:,} m2"


def boxes(count: int) -> list[tuple[int, int, int, int]]:
    return [(10 * n, 20 * n, 10 * n + 6, 20 * n + 9) for n in range(count)]


@pytest.mark.parametrize("most", [5, 100])
def test_all_buildings_are_counted_and_as_many_drawn_as_a_page_can_bear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("segpipe.pipeline.report_map.MOST_OUTLINES", most)
    picture = Image.new("RGB", (100, 80))
    found = draw_map(picture, 4, Window(0, 0, 320, 400), LATTICE, geopackage(tmp_path / "b.gpkg", boxes(20)))
    assert found.of == sum(found.areas) == sum(found.confidences) == 20
    assert found.shown == len(json.loads(found.facts)) == min(most, 20)
    assert sum(path.count("M") for _, _, path in found.paths) == found.shown


def test_outlines_lie_on_the_picture_where_the_buildings_are(tmp_path: Path) -> None:
    window = Window(-40, 100, 200, 400)
    path = geopackage(tmp_path / "b.gpkg", [(-20, 140, 60, 180)])
    found = draw_map(Image.new("RGB", (100, 50)), 4, window, LATTICE, path, [TileMark("a.tif", "warped", window)])
    drawn = next(path for _, _, path in found.paths if path)
    numbers = [int(number) for number in re.findall(r"-?\d+", drawn)]
    corners = np.cumsum(np.array(numbers).reshape(-1, 2), axis=0) / 10
    assert (corners.min(axis=0) == [10, 5]).all()
    assert (corners.max(axis=0) == [20, 25]).all()
    assert found.metres_per_px == pytest.approx(2, rel=1e-2)
    (mark,) = found.tiles
    assert (mark.x, mark.y, mark.width, mark.height, mark.kind) == (0, 0, 100, 50, "warped")


def test_a_layer_in_another_crs_is_drawn_at_the_same_place(tmp_path: Path) -> None:
    import geopandas

    window = Window(0, 0, 400, 400)
    path = geopackage(tmp_path / "b.gpkg", [(50, 100, 90, 180)])
    moved = tmp_path / "degrees.gpkg"
    frame = geopandas.read_file(path, layer="buildings")
    frame.to_crs(4326).to_file(moved, layer="buildings")
    picture = Image.new("RGB", (100, 100))
    assert draw_map(picture, 4, window, LATTICE, moved).facts == draw_map(picture, 4, window, LATTICE, path).facts


def test_paths_have_all_rings_in_steps() -> None:
    hole = shapely.Polygon([(0, 0), (100, 0), (100, 50), (0, 50)], [[(10, 10), (20, 10), (20, 20), (10, 20)]])
    assert path_of(hole) == "M0 0l100 0 0 50 -100 0zM10 10l10 0 0 10 -10 0z"


def test_histograms_leave_out_empty_ends_and_keep_empty_middles() -> None:
    counts = [0] * len(AREA_BINS)
    counts[2], counts[4] = 3, 6
    chart = areas_chart(counts)
    assert [(bar.label, bar.count, bar.share) for bar in chart.bars] == [
        ("50 to 75", 3, 0.5), ("75 to 100", 0, 0.0), ("100 to 150", 6, 1.0),
    ]  # fmt: skip
    assert areas_chart([0] * len(AREA_BINS)).bars == ()


def test_a_timeline_holds_every_task_in_its_lane_however_many_there_are() -> None:
    rng = np.random.default_rng(0)
    spans = []
    for worker in range(3):
        clock = 1_000_000.0
        for _ in range(4000):
            seconds = float(rng.uniform(0.01, 0.2))
            spans.append(Span(str(worker), "read" if rng.random() < 0.3 else "predict", clock, clock + seconds))
            clock += seconds
    spans.append(Span("driver", "publish", clock, clock + 60))
    timeline = timeline_chart([spans[index] for index in rng.permutation(len(spans))])
    assert [worker for worker, _ in timeline.lanes] == ["0", "1", "2", "driver"]
    first, last = min(span.begun for span in spans), max(span.ended for span in spans)
    assert timeline.seconds == pytest.approx(last - first)
    for worker, bars in timeline.lanes:
        own = [span for span in spans if span.worker == worker]
        assert sum(bar.tasks for bar in bars) == len(own)
        assert sum(bar.seconds for bar in bars) == pytest.approx(sum(span.ended - span.begun for span in own), rel=1e-6)
        assert len(bars) <= 2 * 1300
        assert all(0 <= bar.left <= 1000 and bar.left + bar.width <= 1003 for bar in bars)
    assert timeline_chart([]).lanes == ()


def test_only_tasks_of_this_run_are_on_its_timeline_and_torn_lines_are_none(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    task = {"stage": "read", "unit": "0", "seconds": 2.0, "worker": "0"}
    lines = [json.dumps(task | {"ended": ended}) for ended in (10.0, 20.0, 30.0)]
    path.write_text("\n".join([*lines, '{"stage": "read", "unit"', json.dumps({"stage": "read", "error": "x"})]))
    assert [span.ended for span in read_spans(path, 15.0)] == [20.0, 30.0]
    assert list(read_spans(tmp_path / "none", 0)) == []
