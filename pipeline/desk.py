"""The desk: where files are written that a run publishes. Of a run in a bucket it is a folder of this machine.

Of a run folder on a disk it is the run folder itself: there is nothing to be brought or sent.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from segpipe.tasks.bucket import BucketFolder
from segpipe.tasks.errors import RunError

from .manifest import geopackages, outputs_of
from .plan import Plan
from .storage import Folder, desk_of

RECORDS = "tasks.jsonl"


@contextmanager
def desk(folder: Folder) -> Iterator[None]:
    """Have the desk of a run folder while the block runs; what a killed run has left on this machine goes."""
    if not isinstance(folder, BucketFolder):
        yield
        return
    path = desk_of(folder)
    shutil.rmtree(path, ignore_errors=True)
    try:
        # Names in a folder for temporary files can be guessed: it has to be ours, and is for nobody else.
        path.mkdir(mode=0o700)
    except OSError as error:
        raise RunError(f"{path}: cannot be made: {error.strerror}; expected room for files; cure: set TMPDIR") from None
    try:
        folder.download(RECORDS, path / RECORDS)
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def fetch(plan: Plan) -> None:
    """Bring the footprints that were published before, with which the new ones are compared."""
    if isinstance(plan.folder, BucketFolder):
        for name in geopackages(plan.folder):
            plan.folder.download(name, plan.output / name)


def show(plan: Plan, outputs: Collection[str]) -> None:
    """Upload what was published, each file to be seen when all of it is there; what only an earlier run had goes.

    outputs: names of files. GeoPackages of other names are left alone: somebody may have changed them.
    """
    folder = plan.folder
    if not isinstance(folder, BucketFolder):
        return
    for name in (*outputs, "city.yaml"):
        folder.upload(plan.output / name, name)
    old = outputs_of(folder)
    folder.remove(*(name for name in old if name not in outputs and not name.endswith(".gpkg")))
