"""What must hold before work: of a scheduler's address and certificates, of each worker, and of all together."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from segpipe.tasks.errors import SegpipeError, UserError

from .devices import take_own_device
from .plan import model_file
from .stages import Site
from .workers import Crew, allowance, gpus_bytes

ANSWER_S = 15.0
"""Within this time whatever is wrong before work is told."""
LOOK_S = 12.0
"""What a worker is given to look at a tile, the store and the weights."""
PACKAGES = ("segpipe", "torch", "zarr", "dask")
"""All that work on a run have these in one version."""
Tls = Mapping[str, Path]
"""PEM files: ca, cert, key."""


@dataclass(frozen=True)
class Facts:
    """What a worker process is and has. memory_bytes: its limit, or all that its machine gives it."""

    address: str
    predicts: bool
    device: str
    torch: str
    cores: int
    threads: int
    memory_bytes: int
    gpu_bytes: int = 0


# The scheduler


def check_address(named: str, address: str, tls: Tls | None) -> None:
    """Knock at a scheduler: UserError if nobody is there, or will not talk to us, or is not to be trusted.

    named: how the YAML or the command line names it. Dask itself would try again and again, and tell it in tracebacks.
    """
    parts = urlsplit(address)
    try:
        place = (parts.hostname or "", parts.port or 0)
    except ValueError:
        place = ("", 0)
    if parts.scheme not in ("tcp", "tls") or not all(place):
        raise UserError(f"{named}: {address}: expected a Dask scheduler such as tcp://host:8786 or tls://host:8786")
    if parts.scheme == "tls" and tls is None:
        raise UserError(f"{named}: {address}: no certificate to show; expected `cluster: {{tls: {{ca, cert, key}}}}`")
    if parts.scheme == "tcp" and tls is not None:
        raise UserError(f"{named}: {address}: expected tls://…, for `cluster: {{tls: …}}` is given")
    context = None if tls is None else tls_context(tls)
    try:
        with socket.create_connection(place, ANSWER_S) as plain:
            plain.settimeout(ANSWER_S / 5)
            if context is None:
                _check_plain(named, address, plain, place)
            else:
                _check_encrypted(named, address, plain, context)
    except OSError as error:
        raise UserError(
            f"{named}: {address}: no answer ({error.strerror or type(error).__name__}); expected a Dask scheduler"
        ) from None


def tls_context(tls: Tls) -> ssl.SSLContext:
    """What a client shows and trusts. UserError for a file that is not there, or is none of that kind."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
    # As Dask: whom the authority has signed is trusted, whatever it is called.
    context.check_hostname = False
    for part, path in tls.items():
        if not path.is_file():
            raise UserError(f"cluster.tls.{part}: {path}: no such file; expected a PEM file")
    try:
        context.load_verify_locations(tls["ca"])
    except (ssl.SSLError, OSError) as error:
        raise UserError(f"cluster.tls.ca: {tls['ca']}: {_of_ssl(error)}; expected a PEM certificate") from None
    try:
        context.load_cert_chain(tls["cert"], tls["key"])
    except (ssl.SSLError, OSError) as error:
        raise UserError(
            f"cluster.tls.cert: {tls['cert']}: {_of_ssl(error)}; expected a PEM certificate and the key of it in"
            f" {tls['key']}"
        ) from None
    return context


def _check_plain(named: str, address: str, plain: socket.socket, place: tuple[str, int]) -> None:
    """A scheduler without encryption greets at once; one with waits for our greeting."""
    try:
        if plain.recv(1):
            return
    except TimeoutError:
        pass
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(place, ANSWER_S / 5) as other, context.wrap_socket(other):
            encrypted = True
    except ssl.SSLError as error:
        encrypted = "ALERT" in (error.reason or "")
    except OSError:
        encrypted = False
    cure = "it is encrypted; expected tls://… and `cluster: {tls: {ca, cert, key}}`"
    raise UserError(f"{named}: {address}: {cure if encrypted else 'it says nothing; expected a Dask scheduler'}")


def _check_encrypted(named: str, address: str, plain: socket.socket, context: ssl.SSLContext) -> None:
    try:
        with context.wrap_socket(plain) as encrypted:
            # Whether our certificate is taken is told after the handshake.
            encrypted.recv(1)
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{named}: {address}: its certificate is not to be trusted ({error.verify_message}); expected one that the"
            " authority in `cluster.tls.ca` has signed"
        ) from None
    except ssl.SSLError as error:
        raise UserError(
            f"{named}: {address}: encryption is refused ({_of_ssl(error)}); expected a scheduler with TLS that takes"
            " `cluster.tls.cert`"
        ) from None


def _of_ssl(error: OSError) -> str:
    reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
    return str(reason).lower().replace("_", " ")


def address_in(file: Path) -> str:
    """The address that a scheduler has written into a file. UserError where there is none."""
    try:
        return str(json.loads(file.read_text())["address"])
    except OSError as error:
        raise UserError(f"cluster.scheduler_file: {file}: {error.strerror}; expected what a scheduler wrote") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"cluster.scheduler_file: {file}: no address in it; expected what a scheduler wrote") from None


# The workers: functions that run there


def own_versions() -> dict[str, str]:
    """Versions of the packages that must be the same on all machines; builds of torch may differ."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "none"
    return found


def facts_here(dask_worker: Any) -> Facts:
    """What the worker process is and has in which this runs; a worker that does not predict has no device."""
    predicts = bool(dask_worker.state.total_resources.get("GPU", 0) >= 1)
    kind, gpu_bytes = {"device": "", "torch": ""}, 0
    if predicts:
        from segpipe.models.predictor import device_recipe, resolve_device

        take_own_device()
        kind, gpu_bytes = device_recipe(resolve_device()), next(iter(gpus_bytes()), 0)
    limit = int(dask_worker.memory_manager.memory_limit or allowance()[1])
    threads = int(dask_worker.state.nthreads)
    return Facts(
        dask_worker.address, predicts, kind["device"], kind["torch"], allowance()[0], threads, limit, gpu_bytes
    )


def unfit_because(site: Site, versions: Mapping[str, str]) -> str:
    """Why the process in which this runs cannot work on a plan; an empty text: it can.

    versions: the driver's.
    """
    for package, found in own_versions().items():
        if found != versions[package]:
            return f"it has {package} {found}; expected {versions[package]}, as the driver"
    looks = {
        f"the weights {site.plan.model_url or site.plan.model}": _weights_are_the_same,
        f"the tile {site.plan.tiles[0].path}": _tile_can_be_read,
        f"the output {site.folder}": _store_can_be_written,
    }
    for what, look in looks.items():
        if reason := _within(LOOK_S / len(looks), look, site):
            return f"{what}: {reason}"
    return ""


def _within(seconds: float, look: Callable[[Site], str], site: Site) -> str:
    """What a look finds wrong: a share that hangs is not waited for."""
    found = [f"no answer within {seconds:.0f} s"]

    def call() -> None:
        try:
            found[0] = look(site)
        except (SegpipeError, OSError, ValueError) as error:
            found[0] = str(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]


def _weights_are_the_same(site: Site) -> str:
    from segpipe.models.weights import file_digest

    found = file_digest(model_file(site.plan))
    return "" if found == site.plan.model_digest else f"another file than the driver's, with digest {found}"


def _tile_can_be_read(site: Site) -> str:
    from segpipe.tasks.read import read_header

    read_header(site.plan.tiles[0].path)
    return ""


def _store_can_be_written(site: Site) -> str:
    from .lock import lock_token

    unit = f"{socket.gethostname()}-{threading.get_native_id()}"
    site.ledger.record("probe", unit, "")
    site.ledger.forget("probe", unit)
    if site.plan.lock and lock_token(site.folder) != site.plan.lock:
        return "not the folder that the driver writes to; expected one that all machines share"
    return ""


# All of them together


def choose_crew(named: str, facts: Sequence[Facts], want: str | None = None) -> tuple[Crew, frozenset[str]]:
    """The workers that are to predict, all of one kind of device and one torch, and the addresses of those left out.

    A GPU wins over any number of CPUs, else the majority. want: the device that has to be. UserError if nobody has the
    resource GPU.
    """
    able = [it for it in facts if it.predicts]
    if not able:
        raise UserError(
            f"{named}: {len(facts)} workers, none with the resource GPU; expected at least one started with"
            ' --resources "GPU=1"'
        )
    kinds = Counter((it.device, it.torch) for it in able)
    wanted = [kind for kind in kinds if want in (None, kind[0])]
    if not wanted:
        raise UserError(f"{named}: workers are {', '.join(sorted({it.device for it in able}))}; expected {want}")
    best = max(wanted, key=lambda kind: (kind[0].startswith("cuda"), kinds[kind], kind))
    chosen = [it for it in able if (it.device, it.torch) == best]
    out = Counter(f"{it.device} with torch {it.torch}" for it in able if (it.device, it.torch) != best)
    notes = tuple(
        f"{count} of {len(able)} workers are left out: they are {kind}, and the others {best[0]} with torch {best[1]}"
        for kind, count in sorted(out.items())
    )
    crew = Crew(
        device=best[0],
        torch=best[1],
        workers=len(chosen),
        cores=min(max(1, min(it.cores, it.threads)) for it in chosen),
        memory_bytes=min(it.memory_bytes for it in chosen),
        gpu_bytes=min(it.gpu_bytes for it in chosen),
        notes=notes,
    )
    return crew, frozenset(it.address for it in able if it not in chosen)
