"""A server of files on this machine, over http and as a bucket: enough of each for what GDAL and obstore ask."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE_KEYS = 2
"""Objects that a bucket lists at once: few, so that lists have several pages."""
BUCKET = "city"


@dataclass
class FileServer:
    """A folder behind a URL, and the requests that came. What it answers with may be changed while it serves.

    statuses: of paths that are refused; once: the same, but the next request is answered. etag: how it tells versions
    apart. media_types: by path.
    """

    folder: Path
    address: str = ""
    etag: str = "strong"
    modified: bool = True
    statuses: dict[str, int] = field(default_factory=dict)
    once: dict[str, int] = field(default_factory=dict)
    no_head: bool = False
    media_types: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def url(self, name: str) -> str:
        """The URL of a file in the folder."""
        return f"http://{self.address}/{name}"

    def asked(self, method: str) -> list[str]:
        """Paths that were asked for by a method."""
        return [path for asked, path in self.requests if asked == method]


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Serve a folder; a bucket `city` is the same folder."""
    state = FileServer(folder)

    class Answers(_Answers):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    state.address = f"127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FileServer

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server gives it by that name
        pass

    def _answer(self, with_body: bool) -> None:
        state, parts = self.server_state, urlsplit(self.path)
        path = unquote(parts.path).strip("/")
        state.requests.append((self.command, path))
        status = state.once.pop(path, None) or state.statuses.get(path)
        if status is None and not with_body and state.no_head:
            status = 405
        query = parse_qs(parts.query)
        if status is None and path == BUCKET and "list-type" in query:
            self._send(200, {"Content-Type": "application/xml"}, self._listing(query), with_body)
            return
        file = state.folder / path.removeprefix(f"{BUCKET}/")
        if status is not None or not file.is_file():
            self._send(status or 404, {}, b"", with_body)
            return
        data = file.read_bytes()
        headers = {"Accept-Ranges": "bytes", "Content-Type": state.media_types.get(path, "image/tiff")}
        if state.etag != "none":
            weak = "W/" if state.etag == "weak" else ""
            headers["ETag"] = f'{weak}"{hashlib.md5(data).hexdigest()}"'
        if state.modified:
            headers["Last-Modified"] = formatdate(file.stat().st_mtime, usegmt=True)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and int(wanted[1]) < len(data):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(206, headers, data[first : last + 1], with_body)
        else:
            self._send(416 if wanted else 200, headers, data, with_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            with suppress(ConnectionError):  # GDAL hangs up when it knows enough
                self.wfile.write(body)

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        """ListObjectsV2 of S3."""
        folder, prefix = self.server_state.folder, query.get("prefix", [""])[0]
        keys = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        keys = [key for key in keys if key.startswith(prefix)]
        inner = set()
        if "delimiter" in query:
            inner = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]}
            keys = [key for key in keys if "/" not in key[len(prefix) :]]
        start = int(query.get("continuation-token", ["0"])[0])
        page = keys[start : start + PAGE_KEYS]
        more = start + PAGE_KEYS < len(keys)
        parts = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>x</ETag><Size>{(folder / key).stat().st_size}</Size></Contents>"
            for key in page
        ]
        parts += [f"<CommonPrefixes><Prefix>{escape(it)}</Prefix></CommonPrefixes>" for it in sorted(inner)]
        token = f"<NextContinuationToken>{start + PAGE_KEYS}</NextContinuationToken>" if more else ""
        truncated = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"
        return f"<ListBucketResult>{truncated}{token}{''.join(parts)}</ListBucketResult>".encode()
