"""Tiles behind a URL: what the server says of one, its bytes, and what lies in a bucket. Heavy imports are inside.

https:// and http:// are asked through Python's own client, s3:// through obstore. Buckets are reached with the settings
that GDAL takes from the environment too: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or
AWS_NO_SIGN_REQUEST, AWS_REGION, AWS_REQUEST_PAYER; AWS_S3_ENDPOINT, AWS_HTTPS and AWS_VIRTUAL_HOSTING.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import TileError

if TYPE_CHECKING:
    from http.client import HTTPResponse

    from obstore.store import S3Store

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
METADATA_SERVER = "169.254."
"""Where obstore looks for credentials that the environment does not have: a machine of a cloud knows some."""
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or AWS_NO_SIGN_REQUEST=YES for a public bucket"
)


class UnreachableError(TileError):
    """The server did not answer, or not in time: nothing is known of the tile."""


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
        return _look_up_in_bucket(url)
    try:
        with _http(url, "HEAD") as answer:
            return _described(answer)
    except _HeadRefusedError:
        pass
    with _http(url, "GET", Range="bytes=0-0") as answer:
        return _described(answer)


def pieces(url: str) -> Iterator[bytes]:
    """The bytes of a file, piece by piece. TileError where they cannot be had."""
    if url.startswith("s3://"):
        import obstore

        bucket, key = _bucket_and_key(url)
        with _bucket_errors(url):
            yield from (bytes(piece) for piece in obstore.get(_store(bucket, *_endpoint(url, bucket)), key))
    else:
        with _http(url, "GET") as answer:
            while piece := answer.read(PIECE_BYTES):
                yield piece


def fetch(url: str) -> bytes:
    """All bytes of a small file. TileError where they cannot be had, or where it is not small."""
    data = bytearray()
    for piece in pieces(url):
        data += piece
        if len(data) > LARGEST_TEXT_BYTES:
            raise TileError(url, f"has more than {LARGEST_TEXT_BYTES:,} bytes; expected a list of tiles")
    return bytes(data)


def list_bucket(url: str, deep: bool) -> list[str]:
    """URLs of the objects in a folder of a bucket (s3://bucket/folder), those of folders in it too if deep."""
    import obstore

    bucket, folder = _bucket_and_key(url)
    with _bucket_errors(url):
        store = _store(bucket, *_endpoint(url, bucket))
        if deep:
            objects = [it for page in obstore.list(store, folder or None) for it in page]
        else:
            objects = [*obstore.list_with_delimiter(store, folder or None)["objects"]]
    return [f"s3://{bucket}/{it['path']}" for it in objects]


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


# s3


def _look_up_in_bucket(url: str) -> RemoteFile:
    import obstore

    bucket, key = _bucket_and_key(url)
    with _bucket_errors(url):
        found = obstore.head(_store(bucket, *_endpoint(url, bucket)), key)
    return RemoteFile(found["size"], found["e_tag"], found["last_modified"].isoformat())


def _bucket_and_key(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key.rstrip("/")


def _endpoint(url: str, bucket: str) -> tuple[str | None, bool, bool]:
    """Address of a bucket's server if it is not Amazon's, whether requests go unsigned, and whether the reader pays."""
    host = os.environ.get("AWS_S3_ENDPOINT", "")
    elsewhere = next((name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL") if os.environ.get(name)), None)
    if elsewhere and not host:
        raise TileError(
            url,
            f"{elsewhere} is set, which GDAL does not know; expected AWS_S3_ENDPOINT=host:port, and AWS_HTTPS=NO and"
            " AWS_VIRTUAL_HOSTING=FALSE where they apply",
        )
    if not re.fullmatch(r"(\w+://)?([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?/?|", host):
        raise TileError(url, f"AWS_S3_ENDPOINT is {host!r}; expected host or host:port")
    if not re.fullmatch(r"[\w.-]+", bucket):
        raise TileError(url, f"a bucket named {bucket!r}; expected s3://bucket/tile.tif")
    scheme, _, host = host.rstrip("/").rpartition("://")
    scheme = scheme or ("https" if _is_on("AWS_HTTPS", True) else "http")
    if host and _is_on("AWS_VIRTUAL_HOSTING", True):
        host = f"{bucket}.{host}"
    payer = os.environ.get("AWS_REQUEST_PAYER", "").lower() == "requester"
    return f"{scheme}://{host}" if host else None, _is_on("AWS_NO_SIGN_REQUEST", False), payer


def _is_on(name: str, default: bool) -> bool:
    """A switch in the environment, as GDAL reads it."""
    value = os.environ.get(name)
    return default if value is None else value.upper() not in ("NO", "FALSE", "OFF", "0")


@lru_cache(maxsize=16)
def _store(bucket: str, endpoint: str | None, unsigned: bool, payer: bool) -> S3Store:
    from obstore.store import S3Store

    settings: dict[str, Any] = {"skip_signature": unsigned, "request_payer": payer}
    if endpoint is not None:
        settings |= {"endpoint": endpoint, "virtual_hosted_style_request": _is_on("AWS_VIRTUAL_HOSTING", True)}
    return S3Store(
        bucket,
        client_options={"allow_http": True, "connect_timeout": timedelta(seconds=TIMEOUT_S)},
        retry_config={
            "max_retries": TRIES - 1,
            "backoff": {"init_backoff": timedelta(seconds=PAUSE_S)},
            "retry_timeout": timedelta(seconds=TRIES * TIMEOUT_S),
        },
        **settings,
    )


@contextmanager
def _bucket_errors(url: str) -> Iterator[None]:
    from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (BaseError, OSError, ValueError) as error:
        words = " ".join(str(error).split("Debug source")[0].split())
        # Of a listing all that goes wrong is a GenericError.
        if isinstance(error, NotFoundError | FileNotFoundError) or "404 Not Found" in words:
            raise TileError(url, "no such object or bucket (404)") from None
        login = f"; expected {CREDENTIALS}"
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbidden" in words
        if denied and METADATA_SERVER not in words:
            raise TileError(url, f"access is denied (403){login}") from None
        told = words.rpartition(" - ")[2][:200]
        region = "; expected the bucket's own AWS_REGION" if re.search("redirect|region", told, re.I) else ""
        cure = login if METADATA_SERVER in words else region
        raise UnreachableError(url, f"the bucket does not answer ({told}){cure}") from None
