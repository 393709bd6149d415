"""What a run tells, kept in a file or told as lines of JSON: for batch systems, and for who reads them by machine."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from segpipe.tasks.errors import UserError

LOGGER = logging.getLogger("segpipe")


class JsonLines(logging.Formatter):
    """A line of JSON a record: time, level, event, message, and the values that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        """One record as one line."""
        return json_line(record.levelname, record.getMessage(), record.created, **getattr(record, "values", {}))


def json_line(level: str, message: str, at: float, event: str = "message", **values: object) -> str:
    """One line of JSON. at: seconds since 1970."""
    when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": when, "level": level.lower(), "event": event, "message": message, **values}, default=str)


def tell(message: str, level: int = logging.INFO, **values: Any) -> None:
    """Log a message, with values for those who read JSON."""
    LOGGER.log(level, message, extra={"values": values})


@contextmanager
def logging_to(file: Path | None, as_json: bool) -> Iterator[None]:
    """Append what is logged to a file, and, as JSON, to standard error. UserError for a file that cannot be written."""
    handlers: list[logging.Handler] = []
    if file is not None:
        try:
            handlers.append(logging.FileHandler(file, encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--log-file {file}: {error.strerror}; expected a file that can be written") from None
    if as_json:
        handlers.append(logging.StreamHandler(sys.stderr))
    plain = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in handlers:
        handler.setFormatter(JsonLines() if as_json else plain)
        LOGGER.addHandler(handler)
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.INFO)
    # A warning without a handler would go to standard error by Python's last resort.
    LOGGER.propagate = False
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
        for handler in handlers:
            LOGGER.removeHandler(handler)
            handler.close()
