"""A user's own code, named as `package.module:name`: a network or a loss."""

from __future__ import annotations

import importlib


def is_own(name: str) -> bool:
    """Whether a name is one of a user's own code: `package.module:name`."""
    return ":" in name


def import_own(name: str) -> object:
    """What is named. ImportError, in one line, for whatever its module ends in, and where it has no such name."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # of whatever kind: the module is the user's own
        raise ImportError(f"{module!r} cannot be imported: {in_one_line(error)}") from error
    if not hasattr(found, attribute):
        raise ImportError(f"{module!r} has no function {attribute!r}, and no class of that name")
    return getattr(found, attribute)


def in_one_line(error: Exception) -> str:
    """The kind of an error of a user's own code, and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())
