"""A Dask scheduler, its workers and a driver in processes of their own, with certificates if they are wanted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import trustme

from segpipe.pipeline.cluster_kinds import dask_settings

HERE = Path(__file__).parent
WAIT_S = 180.0
DRIVER = "from segpipe.pipeline.cli import main; main()"


@dataclass(frozen=True)
class Certificates:
    """PEM files of one authority, and of one whom it trusts."""

    ca: Path
    cert: Path
    key: Path

    @staticmethod
    def make(folder: Path) -> Certificates:
        """Those of a new authority."""
        folder.mkdir()
        authority = trustme.CA()
        found = Certificates(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
        authority.cert_pem.write_to_path(str(found.ca))
        issued = authority.issue_cert("segpipe.test")
        for number, blob in enumerate(issued.cert_chain_pems):
            blob.write_to_path(str(found.cert), append=number > 0)
        issued.private_key_pem.write_to_path(str(found.key))
        return found

    @property
    def yaml(self) -> dict[str, str]:
        """What a city's YAML says of them."""
        return {"ca": str(self.ca), "cert": str(self.cert), "key": str(self.key)}

    @property
    def options(self) -> list[str]:
        """The same for Dask's own commands."""
        return ["--tls-ca-file", str(self.ca), "--tls-cert", str(self.cert), "--tls-key", str(self.key)]


def wait_until(what: Callable[[], object], why: str) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.1)


@dataclass
class Hosts:
    """Where processes are started, and all that were. within: what a command is put behind, such as ip netns exec."""

    folder: Path
    certificates: Certificates | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, name: str, command: Sequence[str], within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start a process; what it prints is in a file of that name."""
        paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {
            f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
            for key, value in dask_settings(1).items()
        }
        environment = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)} | self.environment
        with (self.folder / f"{name}.txt").open("wb") as told:
            process = subprocess.Popen(
                [*within, sys.executable, *command], stdout=told, stderr=told, env=environment, start_new_session=True
            )
        self.started.append(process)
        return process

    def scheduler(self, host: str = "127.0.0.1", within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start a scheduler and wait for its address."""
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        module = ["-m", "distributed.cli.dask_scheduler", "--host", host, "--port", "0", "--no-dashboard"]
        protocol = ["--protocol", "tls", *self.certificates.options] if self.certificates else []
        process = self.start("scheduler", [*module, *protocol, "--scheduler-file", str(file)], within)

        def is_written() -> bool:
            with suppress(OSError, ValueError):
                return bool(json.loads(file.read_text())["address"])
            return False

        wait_until(is_written, "no scheduler")
        return process

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return str(json.loads((self.folder / "scheduler.json").read_text())["address"])

    def worker(self, name: str, within: Sequence[str] = (), *options: str) -> subprocess.Popen[bytes]:
        """Start a worker that predicts, with its nanny."""
        module = ["-m", "distributed.cli.dask_worker", self.address, "--name", name, "--nthreads", "2"]
        module += ["--no-dashboard", "--memory-limit", "2 GiB", "--local-directory", str(self.folder / "scratch")]
        encryption = self.certificates.options if self.certificates else []
        return self.start(name, [*module, *encryption, "--resources", "GPU=1", *options], within)

    def end(self) -> None:
        """Kill all that was started, and what they have started."""
        for process in self.started:
            with suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.Error):
                        child.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
