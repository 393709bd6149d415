"""The folder of a run that somebody names: by its path, its s3:// URL, or the city.yaml of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segpipe.tasks.bucket import BucketFolder
from segpipe.tasks.errors import SegpipeError, UserError

from .config import load_city
from .manifest import MANIFEST, outputs_of
from .storage import Folder, folder_at


def folder_of(run: str) -> Folder:
    """The run folder, which need not be there. The `storage` of a city.yaml counts; else the environment does."""
    if run.endswith((".yaml", ".yml")) and Path(run).is_file():
        config = load_city(Path(run))
        config.find_buckets()
        return config.folder
    return folder_at(run)


@contextmanager
def brought(folder: Folder) -> Iterator[Path]:
    """The published files of a run on this machine: where they lie, or, from a bucket, copies while the block runs.

    UserError where the bucket cannot be asked, or holds no published run there.
    """
    if not isinstance(folder, BucketFolder):
        yield folder.path
        return
    folder.check("RUN")
    with tempfile.TemporaryDirectory(prefix="segpipe-run-") as name:
        path = Path(name)
        if not folder.download(MANIFEST, path / MANIFEST):
            raise UserError(f"{folder}: no manifest of a finished run in it; expected the output of `segpipe run`")
        for output in (*outputs_of(folder), "city.yaml"):
            (path / output).parent.mkdir(parents=True, exist_ok=True)
            folder.download(output, path / output)
        try:
            yield path
        except SegpipeError as error:
            error.args = tuple(str(it).replace(name, str(folder)) for it in error.args)
            raise
