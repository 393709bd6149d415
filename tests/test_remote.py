"""Laws of tiles behind URLs: they are found, recognised and read as files are, and what fails is told in one line.

No real network: the servers are in servers.py.
"""

import pickle
from collections.abc import Iterator
from hashlib import blake2b
from http.client import HTTPResponse
from io import BytesIO
from pathlib import Path
from socket import socket
from typing import Any, cast

import numpy as np
import pytest
import rasterio
from conftest import draw_blobs, map_it, outputs, stages_since, tasks_done, write_tile
from rasterio.session import Session
from servers import FileServer, serving

from segpipe.pipeline.config import load_city
from segpipe.pipeline.inputs import ASKED_AT_ONCE, find_images, stamps
from segpipe.pipeline.manifest import nothing_changed
from segpipe.tasks import remote
from segpipe.tasks.errors import TileError, UserError
from segpipe.tasks.files import file_digest, file_stamp, gdal_path, open_options, resolved, tile_name
from segpipe.tasks.read import _gdal, read_header

PIXELS = draw_blobs(64, 64)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.001)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server of tmp_path, as http and as the bucket `city` that the environment names."""
    with serving(tmp_path) as state:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "AWS_S3_ENDPOINT": state.address,
            "AWS_HTTPS": "NO",
            "AWS_VIRTUAL_HOSTING": "FALSE",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield state


def url_of(server: FileServer, scheme: str, name: str = "tile.tif") -> str:
    return server.url(name) if scheme == "http" else f"s3://city/{name}"


def read(url: str) -> np.ndarray:
    with rasterio.Env(**open_options(url)), rasterio.open(gdal_path(url)) as raster:
        pixels: np.ndarray = raster.read()
        return pixels


SCHEMES = pytest.mark.parametrize("scheme", ["http", "s3"])


# Names


def test_names_of_gdal_and_urls_are_turned_into_each_other() -> None:
    pairs = {
        "s3://b/k/t 1.tif": "/vsis3/b/k/t 1.tif",
        "https://h/t.tif?v=1": "/vsicurl/https://h/t.tif?v=1",
        "http://h:8/t.tif": "/vsicurl/http://h:8/t.tif",
        "/data/t.tif": "/data/t.tif",
    }
    for url, path in pairs.items():
        assert gdal_path(url) == path
        assert resolved(path, "/data/x") == url
    assert resolved("/vsicurl?max_retry=2&url=https%3A%2F%2Fh%2Ft.tif%3Fa%3D1", "/x/y") == "https://h/t.tif?a=1"


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("t.tif", "/data/sub/items.json", "/data/sub/t.tif"),
        ("../t.tif", "/data/sub/items.json", "/data/t.tif"),
        ("file:///data/a%20b.tif", "/x/y.json", "/data/a b.tif"),
        ("./t.tif", "https://h/c/items/1.json?token=x/y", "https://h/c/items/t.tif"),
        ("/t.tif", "https://h/c/items/1", "https://h/t.tif"),
        ("../t#1?.tif", "s3://b/c/items/1.json", "s3://b/c/t#1?.tif"),
        ("../../../../t.tif", "s3://b/c/1.json", "s3://b/t.tif"),
        ("HTTPS://h/ä b.tif", "/x/y", "https://h/%C3%A4%20b.tif"),
        ("https://h/%C3%A4%20b.tif", "/x/y", "https://h/%C3%A4%20b.tif"),
    ],
)
def test_relative_names_are_relative_to_the_file_or_url_that_they_stand_in(name: str, base: str, expected: str) -> None:
    assert resolved(name, base) == expected


@pytest.mark.parametrize("name", ["/vsizip/a.zip/t.tif", "gs://b/t.tif", "ftp://h/t.tif", "https:///t.tif"])
def test_what_is_neither_file_nor_known_url_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        resolved(name, "/x/y")


def test_the_name_of_a_tile_has_neither_query_nor_escapes() -> None:
    assert tile_name("https://h/a/t%201.tif?sig=a/b.c#d") == "t 1.tif"
    assert tile_name("s3://b/a/t?1#.tif") == "t?1#.tif"
    assert tile_name("/a/b.tif") == "b.tif"


# One tile


@SCHEMES
@pytest.mark.parametrize("name", ["tile.tif", "sub/tile 1 ü.tif"])
def test_a_tile_behind_a_url_has_the_pixels_of_the_file(
    server: FileServer, tmp_path: Path, scheme: str, name: str
) -> None:
    write_tile(tmp_path / name, PIXELS, 0, 0)
    assert (read(resolved(url_of(server, scheme, name), "/")) == PIXELS).all()


def test_keys_to_buckets_are_looked_up_once_and_again_when_they_have_changed(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tile(tmp_path / "tile.tif", PIXELS, 0, 0)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "one")
    asked, find = [], Session.from_environ
    monkeypatch.setattr(Session, "from_environ", lambda: asked.append(1) or find())
    for _ in range(3):
        read_header(url_of(server, "s3"))
    assert len(asked) == 1
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another")
    with _gdal(url_of(server, "s3")) as environment:
        assert environment.options["AWS_SESSION_TOKEN"] == "another"


@SCHEMES
def test_nothing_beside_a_tile_behind_a_url_is_asked_for(server: FileServer, tmp_path: Path, scheme: str) -> None:
    write_tile(tmp_path / "tile.tif", PIXELS, 0, 0)
    (tmp_path / "tile.tif.aux.xml").write_text("<PAMDataset/>")
    read(url_of(server, scheme))
    file_stamp(url_of(server, scheme))
    file_digest(url_of(server, scheme))
    assert {path.removeprefix("city/") for _, path in server.requests} == {"tile.tif"}


@SCHEMES
def test_a_replaced_tile_is_read_anew_in_the_same_process(server: FileServer, tmp_path: Path, scheme: str) -> None:
    write_tile(tmp_path / "tile.tif", PIXELS, 0, 0, compress=None)
    assert (read(url_of(server, scheme)) == PIXELS).all()
    write_tile(tmp_path / "tile.tif", 255 - PIXELS, 0, 0, compress=None)
    assert (read(url_of(server, scheme)) == 255 - PIXELS).all()


@SCHEMES
def test_a_tile_that_was_missing_is_found_once_it_is_there(server: FileServer, tmp_path: Path, scheme: str) -> None:
    with pytest.raises(rasterio.errors.RasterioIOError):
        read(url_of(server, scheme))
    write_tile(tmp_path / "tile.tif", PIXELS, 0, 0)
    assert (read(url_of(server, scheme)) == PIXELS).all()


# Stamp and digest


@SCHEMES
def test_stamp_and_digest_change_with_the_bytes_and_with_nothing_else(
    server: FileServer, tmp_path: Path, scheme: str
) -> None:
    (tmp_path / "tile.tif").write_bytes(b"one")
    url = url_of(server, scheme)
    before = file_stamp(url), file_digest(url)
    assert before[0][:2] == (".tif", 3)
    assert (file_stamp(url), file_digest(url)) == before
    (tmp_path / "tile.tif").write_bytes(b"two")
    assert file_stamp(url) != before[0]
    assert file_digest(url) != before[1]


@SCHEMES
def test_a_strong_etag_is_enough_and_no_bytes_are_read(server: FileServer, tmp_path: Path, scheme: str) -> None:
    (tmp_path / "tile.tif").write_bytes(b"one")
    file_stamp(url_of(server, scheme))
    file_digest(url_of(server, scheme))
    assert len(server.asked("HEAD")) == 2
    assert not server.asked("GET")


def test_equal_etags_of_two_tiles_are_no_equal_digests(server: FileServer, tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif"):
        (tmp_path / name).write_bytes(b"the same")
    assert file_digest(server.url("a.tif")) != file_digest(server.url("b.tif"))


@pytest.mark.parametrize("etag", ["weak", "none"])
def test_without_a_strong_etag_the_digest_is_that_of_the_bytes(server: FileServer, tmp_path: Path, etag: str) -> None:
    server.etag = etag
    data = bytes(range(256)) * 8192
    (tmp_path / "tile.tif").write_bytes(data)
    assert file_digest(server.url("tile.tif")) == blake2b(data, digest_size=16).hexdigest()
    assert file_stamp(server.url("tile.tif"))[:2] == (".tif", len(data))


def test_a_server_that_tells_no_version_is_refused_for_changes_could_not_be_noticed(
    server: FileServer, tmp_path: Path
) -> None:
    (tmp_path / "tile.tif").write_bytes(b"one")
    server.etag, server.modified = "none", False
    with pytest.raises(TileError, match="neither ETag nor Last-Modified"):
        file_stamp(server.url("tile.tif"))


def test_a_server_that_knows_no_head_is_asked_for_one_byte(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "tile.tif").write_bytes(b"three")
    with_head = file_stamp(server.url("tile.tif"))
    server.no_head = True
    assert file_stamp(server.url("tile.tif")) == with_head


# What fails


@SCHEMES
@pytest.mark.parametrize(("status", "says"), [(404, "404"), (403, "403")])
def test_a_refusal_is_told_in_one_line_at_once(server: FileServer, scheme: str, status: int, says: str) -> None:
    url = url_of(server, scheme)
    server.statuses = {"tile.tif": status, "city/tile.tif": status}
    with pytest.raises(TileError, match=says) as refused:
        file_stamp(url)
    assert str(refused.value).startswith(f"{url}: ")
    assert "\n" not in str(refused.value)
    assert len(server.asked("HEAD")) == 1


@SCHEMES
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_told(
    server: FileServer, tmp_path: Path, scheme: str
) -> None:
    (tmp_path / "tile.tif").write_bytes(b"one")
    url = url_of(server, scheme)
    server.once = {"tile.tif": 503, "city/tile.tif": 503}
    assert file_stamp(url)[1] == 3
    assert len(server.requests) == 2
    server.statuses = {"tile.tif": 503, "city/tile.tif": 503}
    with pytest.raises(remote.UnreachableError, match="503") as refused:
        file_stamp(url)
    assert "\n" not in str(refused.value)
    again = pickle.loads(pickle.dumps(refused.value))
    assert (type(again), str(again)) == (remote.UnreachableError, str(refused.value))


@SCHEMES
def test_a_server_that_is_not_there_is_told_in_one_line(
    server: FileServer, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_S3_ENDPOINT", "127.0.0.1:1")
    url = "http://127.0.0.1:1/tile.tif" if scheme == "http" else "s3://city/tile.tif"
    with pytest.raises(remote.UnreachableError, match="does not answer") as refused:
        file_stamp(url)
    assert "\n" not in str(refused.value)


def test_many_tiles_of_a_silent_server_are_not_waited_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def silent(url: str) -> Any:
        asked.append(url)
        raise remote.UnreachableError(url, "the server does not answer")

    monkeypatch.setattr("segpipe.tasks.files.look_up", silent)
    with pytest.raises(UserError, match="does not answer"):
        stamps([f"https://h/{number}.tif" for number in range(1000)])
    assert len(asked) <= ASKED_AT_ONCE


@pytest.mark.parametrize(
    ("variables", "url", "says"),
    [
        ({"AWS_S3_ENDPOINT": "", "AWS_ENDPOINT_URL": "http://x"}, "s3://city/t.tif", "expected AWS_S3_ENDPOINT"),
        ({"AWS_S3_ENDPOINT": "h:x"}, "s3://city/t.tif", "expected host or host:port"),
        ({}, "s3://ci ty/t.tif", "a bucket named 'ci ty'"),
    ],
)
def test_settings_that_gdal_would_not_share_are_refused(
    server: FileServer, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], url: str, says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TileError, match=says):
        file_stamp(url)


@pytest.mark.parametrize("sent", [0, 10, remote.PIECE_BYTES + 10])
def test_a_file_that_is_cut_on_its_way_is_told_and_never_taken_for_whole(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    size = 2 * remote.PIECE_BYTES
    (tmp_path / "tile.tif").write_bytes(bytes(size))
    assert sum(map(len, remote.pieces(server.url("tile.tif")))) == size

    class CutConnection(BytesIO):
        def makefile(self, mode: str) -> BytesIO:
            return self

    def cut(*_: object, **__: object) -> HTTPResponse:
        answer = HTTPResponse(
            cast(socket, CutConnection(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode() + bytes(sent)))
        )
        answer.begin()
        return answer

    monkeypatch.setattr("urllib.request.urlopen", cut)
    with pytest.raises(remote.UnreachableError, match=rf"ended after {sent:,} of {size:,} bytes"):
        list(remote.pieces("http://host/tile.tif"))


# Which tiles


def found(*patterns: str, key: str = "images") -> tuple[str, ...]:
    return find_images(patterns, Path("/nowhere"), key)


@pytest.fixture
def tiles(server: FileServer, tmp_path: Path) -> FileServer:
    names = ["tiles/t10.tif", "tiles/t2.tif", "tiles/t 1ü.tif", "tiles/[x].tif", "tiles/notes.txt", "tiles/deep/t3.tif"]
    for name in (*names, "t4.tif", "tiles2/t5.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return server


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("tiles/t*.tif", ["tiles/t2.tif", "tiles/t10.tif", "tiles/t 1ü.tif"]),
        ("tiles/t?.tif", ["tiles/t2.tif"]),
        ("tiles/[[]*.tif", ["tiles/[x].tif"]),
        ("tiles/", ["tiles/[x].tif", "tiles/t2.tif", "tiles/t10.tif", "tiles/t 1ü.tif"]),
        ("*.tif", ["t4.tif"]),
        ("**/t?.tif", ["t4.tif", "tiles2/t5.tif", "tiles/deep/t3.tif", "tiles/t2.tif"]),
        ("tiles*/t?.tif", ["tiles2/t5.tif", "tiles/t2.tif"]),
        ("tiles/**/t?.tif", ["tiles/deep/t3.tif", "tiles/t2.tif"]),
        ("nowhere/tile.tif", ["nowhere/tile.tif"]),
    ],
)
def test_a_glob_in_a_bucket_means_what_it_means_in_a_folder(tiles: FileServer, pattern: str, keys: list[str]) -> None:
    assert list(found(f"s3://city/{pattern}")) == [f"s3://city/{key}" for key in keys]
    if pattern != "nowhere/tile.tif":
        local = [path for path in tiles.folder.glob(pattern) if path.is_file() and path.suffix == ".tif"]
        if pattern.endswith("/"):
            local = [path for path in (tiles.folder / pattern).iterdir() if path.suffix == ".tif"]
        assert {path.relative_to(tiles.folder).as_posix() for path in local} == {*keys}


def test_a_single_url_stands_for_itself_without_a_request(tiles: FileServer) -> None:
    urls = [tiles.url("tiles/t2.tif?version=3"), "s3://city/tiles/t2.tif"]
    assert list(found(*urls, f"/vsicurl/{tiles.url('t4.tif')}")) == [*urls, tiles.url("t4.tif")]
    assert not tiles.requests


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("s3://city/none/*.tif", "images: s3://city/none/\\*.tif matches no object"),
        ("s3://other/*.tif", "images: s3://other: no such object or bucket"),
        ("s3:///x.tif", "names no bucket"),
        ("https://host/tiles/*.tif", "expected the URL of one tile"),
        ("https://me:secret@host/t.tif", "images: https://host/t.tif: a login in the URL"),
        ("/vsizip/a.zip/t.tif", "images: /vsizip/a.zip/t.tif: /vsizip/ cannot be read"),
    ],
)
def test_urls_that_mean_no_tile_are_refused_in_one_line(tiles: FileServer, pattern: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        found(pattern)
    assert "\n" not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_bucket_that_may_not_be_listed_is_told_with_what_is_expected(tiles: FileServer) -> None:
    tiles.statuses["city"] = 403
    with pytest.raises(UserError, match=r"s3://city/tiles: access is denied \(403\); expected AWS_ACCESS_KEY_ID"):
        found("s3://city/tiles/*.tif")


# A city


@SCHEMES
def test_a_city_behind_urls_is_mapped_as_from_files_and_a_changed_tile_is_noticed(
    server: FileServer, make_city: Any, in_process: type, scheme: str
) -> None:
    city = make_city(1, 2, tile_px=144, grid={"chunk_px": 128, "block_px": 128})
    map_it(city.config, "output=local")
    pattern = "images=s3://city/tiles/*.tif"
    if scheme == "http":
        pattern = f"images=[{server.url('tiles/tile1.tif')}, {server.url('tiles/tile2.tif')}]"
    map_it(city.config, pattern)
    assert outputs(city.folder / "run") == outputs(city.folder / "local")
    before = tasks_done(city.folder / "run")
    assert nothing_changed(load_city(city.config, [pattern])) is not None
    server.requests.clear()
    map_it(city.config, pattern)
    assert set(stages_since(city.folder / "run", before)) == {"publish"}
    write_tile(city.folder / "tiles" / "tile2.tif", 255 - city.image_CHW[:, :, 144:], -17_666_700, 1_666_500 + 144)
    assert nothing_changed(load_city(city.config, [pattern])) is None
    map_it(city.config, pattern)
    map_it(city.config, "output=local")
    assert outputs(city.folder / "run") == outputs(city.folder / "local")
    assert stages_since(city.folder / "run", before)["scan"] == 1


@SCHEMES
def test_a_tile_that_is_not_there_is_the_users_to_mend(
    server: FileServer, make_city: Any, in_process: type, scheme: str
) -> None:
    city = make_city(1, 1, tile_px=144, grid={"chunk_px": 128, "block_px": 128})
    both = f"images=[{url_of(server, scheme, 'tiles/tile1.tif')}, {url_of(server, scheme, 'tiles/tile9.tif')}]"
    with pytest.raises(UserError, match=r"tile9\.tif: .*404") as refused:
        map_it(city.config, both)
    assert "\n" not in str(refused.value)
    assert len(map_it(city.config, both, "on_tile_error=skip").skipped) == 1
