"""Laws of STAC items as tiles: each item gives one file, relative to where it says it is, and nothing is guessed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import City, map_it, outputs
from servers import FileServer, serving

from segpipe.pipeline.config import CityConfig, load_city
from segpipe.pipeline.inputs import find_images
from segpipe.pipeline.manifest import nothing_changed
from segpipe.tasks.errors import UserError

TIFF = "image/tiff; application=geotiff; profile=cloud-optimized"


def asset(href: str, *roles: str, **more: Any) -> dict[str, Any]:
    return {"href": href, "type": TIFF} | ({"roles": list(roles)} if roles else {}) | more


def item(name: str, assets: dict[str, Any], **links: str) -> dict[str, Any]:
    found = [{"rel": rel, "href": href} for rel, href in links.items()]
    return {"type": "Feature", "stac_version": "1.0.0", "id": name, "assets": assets, "links": found}


def collection(*items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(items)} | more


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def tiles(folder: Path, *patterns: str, asset: str | None = None) -> list[str]:
    config = CityConfig(name="x", model="m", output="run", images=patterns, asset=asset)
    config._file = folder / "city.yaml"
    return list(find_images(config.images, config))


def refusal(folder: Path, document: object, name: str | None = None) -> str:
    write(folder / "items.json", document)
    with pytest.raises(UserError) as refused:
        tiles(folder, "items.json", asset=name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path) as state:
        yield state


# Which file


def test_items_are_their_images_in_natural_order(tmp_path: Path) -> None:
    for name in ("t2.tif", "t10.tif"):
        (tmp_path / name).touch()
    both = collection(item("b", {"image": asset("t10.tif")}), item("a", {"image": asset("./t2.tif")}))
    for name in ("items.json", "items.geojson"):
        write(tmp_path / name, both)
        assert tiles(tmp_path, name) == [str(tmp_path / "t2.tif"), str(tmp_path / "t10.tif")]
    write(tmp_path / "one.json", item("b", {"image": asset("t10.tif")}))
    assert tiles(tmp_path, "one.json") == [str(tmp_path / "t10.tif")]


def test_a_relative_href_is_relative_to_the_self_link_or_else_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.tif").touch()
    images = {"image": asset("../data/t.tif")}
    write(tmp_path / "sub" / "items.json", collection(item("a", images)))
    assert tiles(tmp_path, "sub/items.json") == [str(tmp_path / "data" / "t.tif")]
    document = collection(
        item("a", images, self="https://h/c/items/a.json"),
        item("b", images, self="s3://b/c/items/b.json"),
        item("c", images, self="../other/c.json"),
        item("d", images, self=f"file://{tmp_path}/x/d.json"),
        item("e", {"image": asset("/vsis3/b/e.tif")}, self="https://h/c/items/e.json"),
    )
    write(tmp_path / "sub" / "items.json", document)
    with pytest.raises(UserError, match="named twice"):
        tiles(tmp_path, "sub/items.json")
    document["features"].pop(2)
    write(tmp_path / "sub" / "items.json", document)
    assert sorted(tiles(tmp_path, "sub/items.json")) == sorted(
        [str(tmp_path / "data" / "t.tif"), "https://h/c/data/t.tif", "s3://b/c/data/t.tif", "s3://b/e.tif"]
    )


def test_an_item_collection_behind_a_url_is_read_page_by_page(server: FileServer, tmp_path: Path) -> None:
    link = {"rel": "next", "href": "page2.json"}
    write(tmp_path / "c" / "page1.json", collection(item("a", {"i": asset("t1.tif")}), links=[link]))
    write(tmp_path / "c" / "page2.json", collection(item("b", {"i": asset("/t2.tif")}), links=[]))
    expected = [server.url("c/t1.tif"), server.url("t2.tif")]
    assert tiles(tmp_path, server.url("c/page1.json")) == expected
    # An address of an API has no ending: the media type tells what it gives.
    write(tmp_path / "items", collection(item("a", {"i": asset("c/t1.tif")})))
    server.media_types["items"] = "application/geo+json; charset=utf-8"
    assert tiles(tmp_path, server.url("items?limit=100")) == expected[:1]
    assert tiles(tmp_path, server.url("c/t1.tif")) == expected[:1]


def test_pages_that_do_not_end_or_cannot_be_asked_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.tif").touch()
    page = collection(item("a", {"i": asset("t.tif")}), links=[{"rel": "next", "href": "items.json"}])
    assert "its pages do not end" in refusal(tmp_path, page)
    page["links"] = [{"rel": "next", "href": "https://h/search", "method": "POST"}]
    assert "its next page wants POST; expected GET" in refusal(tmp_path, page)


# Which asset


@pytest.mark.parametrize(
    ("assets", "taken"),
    [
        ({"image": asset("t.tif"), "thumbnail": asset("x.jpg", "thumbnail", type="image/jpeg")}, "t.tif"),
        ({"image": asset("t.tif"), "metadata": asset("x.xml", type="text/xml")}, "t.tif"),
        ({"a": asset("x.tif", "visual"), "b": asset("t.tif", "data")}, "t.tif"),
        ({"a": {"href": "t.TIF"}, "b": {"href": "x.xml"}}, "t.TIF"),
        ({"a": asset("t.jp2", type="image/jp2")}, "t.jp2"),
    ],
)
def test_the_only_image_that_is_data_is_taken(tmp_path: Path, assets: dict[str, Any], taken: str) -> None:
    (tmp_path / taken).touch()
    write(tmp_path / "items.json", item("a", assets))
    assert tiles(tmp_path, "items.json") == [str(tmp_path / taken)]


def test_of_several_images_the_yaml_says_which_and_is_told_their_names(tmp_path: Path) -> None:
    assets = {"visual": asset("v.tif", "data"), "nir": asset("n.tif", "data"), "note": asset("x", type="text/plain")}
    message = refusal(tmp_path, collection(item("a 1", assets)))
    assert message == (
        f"images: {tmp_path}/items.json: item a 1: its images are visual, nir; expected the one to take in the YAML;"
        " cure: `asset: visual`"
    )
    (tmp_path / "n.tif").touch()
    assert tiles(tmp_path, "items.json", asset="nir") == [str(tmp_path / "n.tif")]
    assert "item a 1: no asset red; expected one of visual, nir, note" in refusal(tmp_path, item("a 1", assets), "red")


# What is none


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("no JSON", "items.json: not JSON"),
        ("[" * 100_000, "items.json: not JSON"),
        ([1], "items.json: not an object; expected a STAC Item"),
        ({"type": "Collection", "links": []}, "found type 'Collection'; expected a STAC Item or"),
        (collection(), "items.json: no features in it"),
        ({"type": "FeatureCollection", "features": {}}, "items.json: no features in it"),
        (collection({"type": "Feature", "geometry": None, "properties": {}}), "feature 1 has no assets; expected STAC"),
        (collection(item("a", {})), "items.json: item a: no asset is an image"),
        (item("a", {"i": asset("gone.tif")}), "item a: asset i: .*gone.tif is no file"),
        (item("a", {"i": asset("gs://b/t.tif")}), "item a: asset i: gs://b/t.tif: gs:// cannot be read"),
        (item("a", {"i": asset("https://me:pw@h/t.tif")}), "item a: asset i: https://h/t.tif: a login in the URL"),
        (item("a", {"i": {"href": 7}}), "item a: no asset is an image"),
    ],
)
def test_what_gives_no_tile_is_refused_in_one_line_that_names_the_item(
    tmp_path: Path, document: object, says: str
) -> None:
    message = refusal(tmp_path, document)
    assert re.search(says, message), message


def test_a_url_that_gives_no_items_is_refused_in_one_line(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json: the server answers 404"):
        tiles(tmp_path, server.url("gone.json"))
    write(tmp_path / "page.json", "<html>")
    with pytest.raises(UserError, match=r"page\.json: not JSON"):
        tiles(tmp_path, server.url("page.json"))


def test_footprints_in_geojson_are_labels_and_no_items(tmp_path: Path) -> None:
    path = write(tmp_path / "houses.geojson", {"type": "FeatureCollection", "features": []})
    assert find_images(("houses.geojson",), tmp_path, "areas.labels", stac=False) == (str(path),)


# A city


def test_a_city_of_items_is_that_of_their_tiles_and_an_added_item_is_noticed(make_city: Any, in_process: type) -> None:
    city: City = make_city(1, 2, tile_px=144, grid={"chunk_px": 128, "block_px": 128})
    items = [item(f"{n}", {"image": asset(f"tiles/tile{n}.tif")}) for n in (1, 2)]
    write(city.folder / "items.json", collection(items[0]))
    map_it(city.config, "images=items.json")
    assert nothing_changed(load_city(city.config, ["images=items.json"])) is not None
    write(city.folder / "items.json", collection(*items))
    assert nothing_changed(load_city(city.config, ["images=items.json"])) is None
    map_it(city.config, "images=items.json")
    map_it(city.config, "output=local")
    assert outputs(city.folder / "run") == outputs(city.folder / "local")
