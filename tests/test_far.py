"""Two worker hosts in network namespaces with no directory in common, a bucket between them, and encryption."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from buckets import BUCKET, KEY, SECRET
from conftest import City, outputs
from deeds import DEED, DIARY, fragile_city
from hosts import DRIVER, Certificates, Hosts, wait_until

pytestmark = pytest.mark.cluster

HERE = Path(__file__).parent
HUB = "10.77.0.1"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
ThreadedMotoServer(ip_address=sys.argv[1], port=9000, verbose=False).start()
print("up", flush=True)
sys.stdin.read()
"""
COUNT = """
import sys, boto3
client = boto3.client("s3", endpoint_url=sys.argv[1], region_name="us-east-1")
print(client.list_objects_v2(Bucket=sys.argv[2], Prefix=sys.argv[3]).get("KeyCount", 0))
"""
COPY = """
import sys, boto3
from pathlib import Path
client = boto3.client("s3", endpoint_url=sys.argv[1], region_name="us-east-1")
if sys.argv[3] == "up":
    client.create_bucket(Bucket=sys.argv[2])
    for path in Path(sys.argv[4]).rglob("*"):
        if path.is_file():
            client.upload_file(str(path), sys.argv[2], str(path.relative_to(sys.argv[4])))
else:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=sys.argv[2], Prefix=sys.argv[5]):
        for it in page.get("Contents", []):
            path = Path(sys.argv[4]) / it["Key"]
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(sys.argv[2], it["Key"], str(path))
"""
ENDPOINT = f"http://{HUB}:9000"


def within(name: str) -> list[str]:
    return ["ip", "netns", "exec", name]


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """A hub and two hosts, each a network namespace."""
    if os.getuid() != 0 or not sys.platform.startswith("linux") or shutil.which("ip") is None:
        pytest.skip("network namespaces are made by root on Linux, with ip")
    subprocess.run(["bash", str(HERE / "netns_down.sh")], capture_output=True, check=False)
    up = subprocess.run(["bash", str(HERE / "netns_up.sh")], capture_output=True, text=True, check=False)
    if up.returncode:
        pytest.skip(f"no network namespaces here: {up.stderr.strip()}")
    yield
    subprocess.run(["bash", str(HERE / "netns_down.sh")], capture_output=True, check=False)


@pytest.fixture
def far(network: None, tmp_path: Path) -> Iterator["Far"]:
    found = Far(tmp_path)
    yield found
    found.hosts.end()


class Far:
    """The city in a bucket of the hub, a scheduler on the hub, and a worker on each of two hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.city: City = fragile_city(folder)
        keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
        self.certificates = Certificates.make(folder / "certificates")
        slow = {DEED: "slow", DIARY: "/dev/null"}
        self.hosts = Hosts(folder, self.certificates, keys | slow)
        self.environment = os.environ | keys
        server = subprocess.Popen(
            [*within("sgh"), sys.executable, "-c", SERVER, HUB],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.hosts.started.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        source = folder / "source"
        shutil.copytree(folder / "tiles", source / "tiles")
        shutil.copy(folder / "fragile.safetensors", source)
        self.ask(COPY, "up", str(source))
        data: dict[str, Any] = yaml.safe_load(self.city.config.read_text()) | {
            "images": f"s3://{BUCKET}/tiles/*.tif",
            "model": f"s3://{BUCKET}/fragile.safetensors",
            "output": f"s3://{BUCKET}/run",
            "storage": {"endpoint": ENDPOINT},
        }
        self.hosts.scheduler(HUB, within("sgh"))
        # A disk of its own: of this test's folder a host sees the certificates, and nothing else.
        for number in (1, 2):
            own = 'mount -t tmpfs none "$1/tiles" && mount -t tmpfs none "$1/source" && shift && exec "$@"'
            alone = ["unshare", "--mount", "sh", "-c", own, "sh", str(folder)]
            self.hosts.worker(f"host{number}", [*within(f"sgw{number}"), *alone])
        data["cluster"] = {
            "kind": "scheduler",
            "address": self.hosts.address,
            "tls": self.certificates.yaml,
            "threads": 1,
        }
        self.config = folder / "far.yaml"
        self.config.write_text(yaml.safe_dump(data))

    def ask(self, code: str, *arguments: str) -> str:
        command = [*within("sgh"), sys.executable, "-c", code, ENDPOINT, BUCKET, *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment)
        assert found.returncode == 0, found.stderr
        return found.stdout

    def run(self) -> "subprocess.Popen[bytes]":
        return self.hosts.start("driver", ["-c", DRIVER, "run", str(self.config)], within("sgh"))

    def predicted(self) -> int:
        return int(self.ask(COUNT, "run/ledger/predict/"))

    def told(self) -> str:
        return (self.folder / "driver.txt").read_text()

    def outputs(self) -> dict[str, Any]:
        self.ask(COPY, "down", str(self.folder / "found"), "run/")
        return outputs(self.folder / "found" / "run")


def test_two_hosts_without_a_common_directory_give_the_bytes_of_one_process(far: Far) -> None:
    driver = far.run()
    assert driver.wait() == 0, far.told()
    assert far.outputs() == outputs(far.folder / "twin")
    said = [far.told(), *(path.read_text() for path in far.folder.glob("*.txt"))]
    kept = [path.read_bytes() for path in (far.folder / "found").rglob("*") if path.is_file()]
    for secret in (KEY, SECRET):
        assert not [it for it in said if secret in it]
        assert not [it for it in kept if secret.encode() in it]


def test_when_the_link_of_a_host_is_cut_the_other_one_finishes(far: Far) -> None:
    driver = far.run()
    wait_until(lambda: driver.poll() is not None or far.predicted() >= 2, "nothing is predicted")
    assert driver.poll() is None, far.told()
    subprocess.run(["ip", "-n", "sgh", "link", "set", "sgv1", "down"], check=True)
    try:
        assert driver.wait() == 0, far.told()
    finally:
        subprocess.run(["ip", "-n", "sgh", "link", "set", "sgv1", "up"], check=True)
    assert far.outputs() == outputs(far.folder / "twin")
