"""The one exception for a user's mistake, those for a run told to stop and a rank left alone; the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend: says what, where, what was found and what to do. Exit status 2, no traceback."""


class Stopped(Exception):
    """A run was told to stop, has saved and can be resumed; `code` is the exit status that says so."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class PeerFailed(Exception):
    """Another rank has failed first, and this one ends with it; `code` is the exit status of that one."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean X?"` for the nearest valid name, else the list of valid names."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; valid names: {', '.join(names)}" if names else ""
