"""A server of buckets on this machine: moto's, in this process, or in one of its own that can be stopped and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from urllib.request import Request, urlopen

import boto3
import psutil
import pytest
from botocore.config import Config
from moto import backends
from moto.server import ThreadedMotoServer

from segpipe.tasks.bucket import Storage

BUCKET = "city"
KEY, SECRET = "AKIAKEYOFTHETESTS000", "the+secret/of/the/tests/that/nobody/may/see"
SERVICES = (*backends.list_of_moto_modules(),)
SERVE = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@lru_cache
def _client(endpoint: str) -> boto3.client:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
        config=Config(retries={"max_attempts": 1}),
    )


@dataclass(frozen=True)
class Buckets:
    """A running server. address: host and port."""

    address: str

    @property
    def endpoint(self) -> str:
        """What `storage.endpoint` is to be."""
        return f"http://{self.address}"

    @property
    def client(self) -> boto3.client:
        """An independent client of it."""
        return _client(self.endpoint)

    def make(self) -> None:
        """Make the bucket, if it is not there."""
        self.client.create_bucket(Bucket=BUCKET)

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects below a prefix, without it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [it["Key"].removeprefix(prefix) for page in pages for it in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        """The bytes of an object."""
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """All objects below a prefix, by what comes after it."""
        return {name: self.get(prefix + name) for name in self.names(prefix)}


@contextmanager
def serving_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Buckets]:
    """A server in this process, with the keys to it in the environment, and nothing else."""
    # Moto looks through its folder of services for each request, which takes half of the request's time.
    monkeypatch.setattr(backends, "list_of_moto_modules", lambda: SERVICES)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    found = Buckets(f"{host}:{port}")
    set_environment(monkeypatch)
    try:
        server_reset(found)
        found.make()
        yield found
    finally:
        server.stop()


def server_reset(buckets: Buckets) -> None:
    """Forget what was kept: moto keeps it for the process, whatever server it is asked through."""
    urlopen(Request(f"{buckets.endpoint}/moto-api/reset", method="POST")).close()


def set_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in the environment; nothing of where the server is, and put back what a run sets."""
    Storage().use()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_S3_ENDPOINT", "AWS_HTTPS", "AWS_VIRTUAL_HOSTING", "AWS_REGION", "AWS_NO_SIGN_REQUEST"):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


class OwnServer:
    """A server in a process of its own."""

    def __init__(self, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.buckets = Buckets(f"127.0.0.1:{self.port}")

    def pause(self) -> None:
        """Be silent, as a machine that hangs."""
        self._process.send_signal(signal.SIGSTOP)
        while psutil.Process(self._process.pid).status() != psutil.STATUS_STOPPED:
            pass

    def go_on(self) -> None:
        """Answer again."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Be gone, with all that was kept."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
