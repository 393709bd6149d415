"""Files behind a URL: what the server says of one, and its bytes. Heavy imports are inside.

https:// and http:// are asked through Python's own client, s3:// through `bucket`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .bucket import look_up_object, object_pieces
from .errors import TileError, UnreachableError

if TYPE_CHECKING:
    from http.client import HTTPResponse

TIMEOUT_S = 5.0
"""How long a server may be silent."""
TRIES = 3
PAUSE_S = 0.3
"""Before the second try; doubled before each further one."""
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may cure."""
HEAD_REFUSED = frozenset({403, 405, 501})
"""What servers answer that know no HEAD, and what signed addresses answer, which are signed for GET."""
LOGIN = frozenset({401, 403, 407})
PIECE_BYTES = 2**20
LARGEST_TEXT_BYTES = 2**28


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file. size in bytes, -1 where it does not say; media_type is empty where it does not."""

    size: int
    etag: str | None
    modified: str | None
    media_type: str = ""

    @property
    def strong_etag(self) -> str | None:
        """The ETag, if other bytes must have another one (RFC 9110, 8.8.1)."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag


def look_up(url: str) -> RemoteFile:
    """What the server says of a file, in one request. TileError in one line where there is none, or none for us."""
    if url.startswith("s3://"):
        return RemoteFile(*look_up_object(url))
    try:
        with _http(url, "HEAD") as answer:
            return _described(answer)
    except _HeadRefusedError:
        pass
    with _http(url, "GET", Range="bytes=0-0") as answer:
        return _described(answer)


def pieces(url: str) -> Iterator[bytes]:
    """The bytes of a file, piece by piece. TileError where they cannot be had, or not all of them."""
    if url.startswith("s3://"):
        yield from object_pieces(url)
    else:
        with _http(url, "GET") as answer:
            size, received = _described(answer).size, 0
            while piece := answer.read(PIECE_BYTES):
                received += len(piece)
                yield piece
        if received < size:  # read(n) says nothing of a connection that was cut
            raise UnreachableError(url, f"the connection ended after {received:,} of {size:,} bytes")


def fetch(url: str) -> bytes:
    """All bytes of a small file. TileError where they cannot be had, or where it is not small."""
    data = bytearray()
    for piece in pieces(url):
        data += piece
        if len(data) > LARGEST_TEXT_BYTES:
            raise TileError(url, f"has more than {LARGEST_TEXT_BYTES:,} bytes; expected a list of tiles")
    return bytes(data)


# http


class _HeadRefusedError(TileError):
    """The server does not answer HEAD; it may answer GET."""


@contextmanager
def _http(url: str, method: str, **headers: str) -> Iterator[HTTPResponse]:
    from http.client import HTTPException

    try:
        with _request(url, method, headers) as answer:
            yield answer
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        words = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise UnreachableError(url, f"the server does not answer ({' '.join(words.split())[:200]})") from error


def _request(url: str, method: str, headers: dict[str, str]) -> HTTPResponse:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    # Compressed on its way, a file would have another ETag and length than the one that GDAL reads.
    request = Request(url, method=method, headers={"User-Agent": "segpipe", "Accept-Encoding": "identity"} | headers)
    for pause_s in (*(PAUSE_S * 2**n for n in range(TRIES - 1)), None):
        try:
            answer: HTTPResponse = urlopen(request, timeout=TIMEOUT_S)
            return answer
        except HTTPError as error:
            error.close()
            if error.code not in PASSING or pause_s is None:
                login = "; tiles that want a login are not read: copy them" if error.code in LOGIN else ""
                kind = UnreachableError if error.code in PASSING else TileError
                if method == "HEAD" and error.code in HEAD_REFUSED:
                    kind = _HeadRefusedError
                raise kind(url, f"the server answers {error.code} {error.reason}{login}") from None
        except (OSError, HTTPException):
            if pause_s is None:
                raise
        time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def _described(answer: HTTPResponse) -> RemoteFile:
    size = answer.headers.get("Content-Length", "")
    if answer.status == 206:
        size = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return RemoteFile(
        size=int(size) if size.isdecimal() else -1,
        etag=answer.headers.get("ETag"),
        modified=answer.headers.get("Last-Modified"),
        media_type=answer.headers.get_content_type() if "Content-Type" in answer.headers else "",
    )
