"""The only obstore: objects in buckets, s3://bucket/key, and folders of them. Heavy imports are inside.

Buckets are reached with the settings that GDAL takes from the environment too: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_NO_SIGN_REQUEST, AWS_REGION, AWS_REQUEST_PAYER; AWS_S3_ENDPOINT,
AWS_HTTPS and AWS_VIRTUAL_HOSTING. Where the environment has no keys, a machine of a cloud may know some.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from .ahead import Found, Item, in_order
from .errors import RunError, SegpipeError, StorageError, TileError, UnreachableError, UserError

if TYPE_CHECKING:
    from obstore.store import S3Store

METADATA_SERVER = "169.254."
"""Where obstore looks for credentials that the environment does not have: a machine of a cloud knows some."""
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or AWS_NO_SIGN_REQUEST=YES for a public bucket"
)
AT_ONCE = 16
"""Requests to a bucket under way where many are made."""
UPLOAD_PART_BYTES = 2**25
"""Files up to this size are sent in one request; of larger ones, this much is held for each of two parts."""


@dataclass(frozen=True)
class Storage:
    """Where buckets are, as `storage:` of the YAML says; what it leaves open, the environment says."""

    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False

    def environment(self) -> dict[str, str]:
        """The same as variables that GDAL knows, and this module."""
        found: dict[str, str] = {}
        if self.endpoint is not None:
            scheme, _, host = self.endpoint.rstrip("/").rpartition("://")
            # Names of hosts in front of which a bucket's name may be put are Amazon's.
            found |= {
                "AWS_S3_ENDPOINT": host,
                "AWS_HTTPS": "NO" if scheme == "http" else "YES",
                "AWS_VIRTUAL_HOSTING": "FALSE",
            }
        if self.region is not None:
            found["AWS_REGION"] = self.region
        if self.anonymous:
            found["AWS_NO_SIGN_REQUEST"] = "YES"
        return found

    def use(self) -> None:
        """Let this process, with GDAL and the processes that it starts, find buckets there, and no longer elsewhere."""
        wanted = self.environment()
        for name in [name for name in _BEFORE if name not in wanted]:
            value = _BEFORE.pop(name)
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for name, value in wanted.items():
            _BEFORE.setdefault(name, os.environ.get(name))
            os.environ[name] = value


_BEFORE: dict[str, str | None] = {}
"""What the environment said itself of the variables that a Storage has set: a worker lives on for other runs."""


@dataclass(frozen=True)
class Patience:
    """How long a server may be silent, and for how long after the first request others are begun."""

    silence_s: float
    tries_s: float
    tries: int
    pause_s: float


FOR_A_TILE = Patience(5.0, 15.0, 3, 0.3)
FOR_A_STORE = Patience(15.0, 25.0, 40, 0.3)
"""At the worst 15 s of silence, and 15 more from second 25 on: a bucket that is gone is told within a minute."""
ONCE = Patience(5.0, 5.0, 1, 0.3)
"""For what is nice to have: nobody waits for it twice."""


# Single objects


def look_up_object(url: str) -> tuple[int, str | None, str]:
    """Size in bytes, ETag and time of change of an object. TileError in one line where it cannot be had."""
    import obstore

    bucket, key = _bucket_and_key(url)
    with _tile_errors(url):
        found = obstore.head(_store(bucket, "", *_endpoint(url, bucket), FOR_A_TILE), key)
    return found["size"], found["e_tag"], found["last_modified"].isoformat()


def object_pieces(url: str) -> Iterator[bytes]:
    """The bytes of an object, piece by piece. TileError where they cannot be had."""
    import obstore

    bucket, key = _bucket_and_key(url)
    with _tile_errors(url):
        store = _store(bucket, "", *_endpoint(url, bucket), FOR_A_TILE)
        yield from (bytes(piece) for piece in obstore.get(store, key))


def list_bucket(url: str, deep: bool) -> list[str]:
    """URLs of the objects in a folder of a bucket (s3://bucket/folder), those of folders in it too if deep."""
    import obstore

    bucket, folder = _bucket_and_key(url)
    with _tile_errors(url):
        store = _store(bucket, "", *_endpoint(url, bucket), FOR_A_TILE)
        if deep:
            objects = [it for page in obstore.list(store, folder or None) for it in page]
        else:
            objects = [*obstore.list_with_delimiter(store, folder or None)["objects"]]
    return [f"s3://{bucket}/{it['path']}" for it in objects]


# Folders


@dataclass(frozen=True)
class BucketFolder:
    """A folder in a bucket, whose files are read and written whole. What fails is told as a StorageError.

    url: s3://bucket/folder, without a slash at its end. Names of files are relative to it. patience: with its server.
    """

    url: str
    patience: Patience = FOR_A_STORE
    is_remote = True

    def __str__(self) -> str:
        return self.url

    def hasty(self) -> BucketFolder:
        """The same folder, for what is nice to have: nobody waits for it twice."""
        return replace(self, patience=ONCE)

    @property
    def server(self) -> str:
        """Address of its server, an empty text for Amazon's: others may have a folder of the same name."""
        return self._endpoint()[0] or ""

    def check(self, key: str) -> None:
        """UserError, naming a key of the YAML, where there is no such bucket, or it is not for us."""
        import obstore

        with self.errors():
            try:
                obstore.list_with_delimiter(self._store())
            except _raised() as error:
                kind, words = _explained(error)
                if kind == "silent":
                    raise
                raise UserError(f"{key}: {self.url}: {words}") from None

    def file(self, name: str) -> str:
        """What a person is told of a file."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        found = self.read_tagged(name)
        return None if found is None else found[0]

    def read_tagged(self, name: str) -> tuple[bytes, str] | None:
        """A file's bytes and its ETag, None where there is none."""
        import obstore

        with self.errors(name), suppress(FileNotFoundError):
            answer = obstore.get(self._store(), name)
            data = bytes(answer.bytes())
            return data, str(answer.meta["e_tag"])
        return None

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file in place of what is there."""
        import obstore

        with self.errors(name):
            obstore.put(self._store(), name, data, use_multipart=False)

    def write_where(self, name: str, data: bytes, tag: str | None) -> str | None:
        """Write a file where there is none (tag None) or that with this ETag; its new ETag, None if it is another."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if tag is None else {"e_tag": tag}
        with self.errors(name):
            try:
                return str(obstore.put(self._store(), name, data, mode=mode)["e_tag"])
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                return None

    @contextmanager
    def writing(self, name: str) -> Iterator[IO[bytes]]:
        """Give a file to write to, which is there under its name, whole, when it is over."""
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            self._put(name, file)

    def open(self, name: str) -> IO[bytes]:
        """A file to read from. FileNotFoundError where there is none."""
        data = self.read(name)
        if data is None:
            raise FileNotFoundError(f"{self.file(name)}: no such object")
        return BytesIO(data)

    def upload(self, path: Path, name: str) -> None:
        """Copy a file of this machine into the folder: it is seen when all of it is there."""
        with path.open("rb") as file:
            self._put(name, file)

    def _put(self, name: str, file: IO[bytes]) -> None:
        import obstore

        with self.errors(name):
            obstore.put(self._store(), name, file, chunk_size=UPLOAD_PART_BYTES, max_concurrency=2)

    def download(self, name: str, path: Path) -> bool:
        """Copy a file of the folder to this machine; False where there is none. RunError if it cannot be written."""
        pieces = self._pieces(name)
        try:
            first = next(pieces, b"")
        except FileNotFoundError:
            return False
        try:
            with path.open("wb") as file:
                file.writelines(chain([first], pieces))
        except OSError as error:
            raise RunError(
                f"{path}: cannot be written: {error.strerror or error}; expected room for a copy of {self.file(name)};"
                " cure: set TMPDIR"
            ) from None
        return True

    def _pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, piece by piece. FileNotFoundError where there is none."""
        import obstore

        with self.errors(name):
            yield from (bytes(piece) for piece in obstore.get(self._store(), name))

    def start_of(self, name: str, count: int) -> bytes:
        """The first bytes of a file that is there, and not empty."""
        import obstore

        with self.errors(name):
            return bytes(obstore.get_range(self._store(), name, start=0, length=count))

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        import obstore

        with self.errors(name), suppress(FileNotFoundError):
            return int(obstore.head(self._store(), name)["size"])
        return None

    def top(self) -> set[str]:
        """Names of the files and folders that are in the folder itself."""
        import obstore

        with self.errors():
            found = obstore.list_with_delimiter(self._store())
        return {it["path"].rsplit("/")[-1] for it in found["objects"]} | {
            prefix.rstrip("/").rsplit("/")[-1] for prefix in found["common_prefixes"]
        }

    def names(self, folder: str) -> list[str]:
        """Names of all files below a folder, at any depth."""
        import obstore

        with self.errors(folder):
            return [it["path"] for page in obstore.list(self._store(), folder) for it in page]

    def remove(self, *names: str) -> None:
        """Delete files; those that are not there count as deleted."""
        import obstore

        if names:
            with self.errors(names[0]), suppress(FileNotFoundError):
                obstore.delete(self._store(), names[0] if len(names) == 1 else names)

    def remove_all(self, folder: str) -> None:
        """Delete a folder with all that is below it."""
        self.remove(*self.names(folder))

    def move(self, name: str, to: str) -> None:
        """Give a file another name. Killed in between, it has both."""
        import obstore

        with self.errors(name):
            obstore.copy(self._store(), name, to)
        self.remove(name)

    def exchange(self, folder: str, other: str) -> None:
        """Put a folder in the place of another one. Killed in between, it can be called again."""
        if moved := self.names(folder):
            for _ in self.each(lambda name: self.move(name, other + name.removeprefix(folder)), moved):
                pass

    def each(self, function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """What a function gives for each item, in their order, while some of the next are under way."""
        return in_order(function, items, AT_ONCE)

    def opened(self, folder: str) -> S3Store:
        """The folder in it as Zarr takes it."""
        return self._store(folder)

    @contextmanager
    def errors(self, name: str = "") -> Iterator[None]:
        """Turn what obstore raises into a StorageError in one line, but for objects that are not there."""
        try:
            yield
        except SegpipeError:
            raise
        except _raised() as error:
            kind, words = _explained(error)
            if kind == "missing":
                raise FileNotFoundError(f"{self.file(name)}: {words}") from None
            server = f"; its server is {self.server}" if self.server else ""
            raise StorageError(f"{self.file(name) if name else self.url}: {words}{server}") from None

    def _store(self, below: str = "") -> S3Store:
        bucket, key = _bucket_and_key(self.url)
        prefix = "/".join(part for part in (key, below) if part)
        return _store(bucket, prefix, *self._endpoint(), self.patience)

    def _endpoint(self) -> tuple[str | None, bool, bool]:
        try:
            return _endpoint(self.url, _bucket_and_key(self.url)[0])
        except TileError as error:
            raise StorageError(str(error)) from None


# Servers


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


@lru_cache(maxsize=32)
def _store(bucket: str, prefix: str, endpoint: str | None, unsigned: bool, payer: bool, patience: Patience) -> S3Store:
    from obstore.store import S3Store

    settings: dict[str, Any] = {"skip_signature": unsigned, "request_payer": payer}
    if endpoint is not None:
        settings |= {"endpoint": endpoint, "virtual_hosted_style_request": _is_on("AWS_VIRTUAL_HOSTING", True)}
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=patience.silence_s),
            # A server that is slow is not given up as long as bytes come.
            "timeout": timedelta(minutes=10),
        },
        retry_config={
            "max_retries": patience.tries - 1,
            "backoff": {"init_backoff": timedelta(seconds=patience.pause_s), "max_backoff": timedelta(seconds=4)},
            "retry_timeout": timedelta(seconds=patience.tries_s),
        },
        **settings,
    )


def _raised() -> tuple[type[Exception], ...]:
    """What obstore raises."""
    from obstore.exceptions import BaseError

    return (BaseError, OSError, ValueError)


def _explained(error: Exception) -> tuple[Literal["missing", "denied", "silent"], str]:
    """Of what kind an error of obstore is, and a few words for it."""
    from obstore.exceptions import NotFoundError, PermissionDeniedError, UnauthenticatedError

    words = " ".join(str(error).split("Debug source")[0].split())
    if "NoSuchBucket" in words:
        return "denied", "no such bucket (404); expected one that is there"
    # Of a listing all that goes wrong is a GenericError.
    if isinstance(error, NotFoundError | FileNotFoundError) or "404 Not Found" in words:
        return "missing", "no such object or bucket (404)"
    login = f"; expected {CREDENTIALS}"
    denied = isinstance(error, PermissionDeniedError | UnauthenticatedError) or "403 Forbidden" in words
    if denied and METADATA_SERVER not in words:
        return "denied", f"access is denied (403){login}"
    told = words.rpartition(" - ")[2][:200]
    region = "; expected the bucket's own AWS_REGION" if re.search("redirect|region", told, re.I) else ""
    cure = login if METADATA_SERVER in words else region
    return "silent", f"the bucket does not answer ({told}){cure}"


@contextmanager
def _tile_errors(url: str) -> Iterator[None]:
    try:
        yield
    except SegpipeError:
        raise
    except _raised() as error:
        kind, words = _explained(error)
        raise (UnreachableError if kind == "silent" else TileError)(url, words) from None
