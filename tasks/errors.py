"""The errors that a user can cause or meet. The command line alone turns them into one line and an exit code."""


class SegpipeError(Exception):
    """Base of all errors that are told to the user in one line, without a traceback.

    The message names the file, key or chunk, what was found and what was expected.
    """

    exit_code = 1


class UserError(SegpipeError):
    """The user's mistake, found before any work: a wrong key, file or combination. Exit code 2."""

    exit_code = 2


class RunError(SegpipeError):
    """Something failed while running. What was finished is kept, and running the command again resumes. Exit code 1."""


class WorkerError(RunError):
    """A worker cannot do what another can: another version, device or disk. worker: its address, if it is known."""

    def __init__(self, reason: str, worker: str = "") -> None:
        super().__init__(reason)
        self.worker = worker

    def __reduce__(self) -> tuple[type["WorkerError"], tuple[str, str]]:
        return type(self), (str(self), self.worker)


class TooLargeError(RunError):
    """A window does not fit into the memory of the GPU; half of it may."""

    def __init__(self, pixels: int, reason: str) -> None:
        super().__init__(
            f"the GPU has too little memory for a window of {pixels:,} px ({reason}); cure: a GPU with more"
            " of it free, or a smaller `grid: {block_px: …}`, which begins anew"
        )
        self.pixels = pixels
        self.reason = reason

    def __reduce__(self) -> tuple[type["TooLargeError"], tuple[int, str]]:
        return type(self), (self.pixels, self.reason)


class StorageError(RunError):
    """The store cannot be read or written: nobody answers, or it is gone. No other task fares better: the run ends."""


class DamageError(RunError):
    """A file that the ledger names is missing or damaged. Its entry is taken back: another pass makes it anew."""


class TileError(RunError):
    """A tile cannot be read. Carries the tile's path so that it can be named, skipped or repaired."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["TileError"], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class UnreachableError(TileError):
    """The server of a tile did not answer, or not in time: nothing is known of the tile."""
