"""torchrun, but its exit status says how the ranks ended: `python -m clipkit.agent [TORCHRUN OPTIONS] -m clipkit ...`.

torchrun itself ends with 1 whatever its ranks ended with, so that nothing above it can tell a run that was stopped and
has saved (`guard.requeue_code`) from one that failed, or a mistake in the config (2) from a lost node.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROUNDS = "CLIPKIT_ROUNDS"
"""Environment variable with a folder in which every rank that an agent starts leaves a mark."""


def restarted() -> bool:
    """Whether this rank has been started before by the same agent; to be asked once.

    torchrun counts the rounds after a failure only, not those that begin because nodes come or go.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return True
    if not (folder := os.environ.get(ROUNDS)):
        return False
    mark = Path(folder) / os.environ.get("LOCAL_RANK", "0")
    before = mark.exists()
    mark.touch()
    return before


def main() -> None:
    """Status: that of the rank that failed first, or 128 + n where signal n ended it, or told this process to stop."""
    with TemporaryDirectory(prefix="clipkit_") as rounds:
        os.environ[ROUNDS] = rounds
        try:
            _run()
        finally:
            del os.environ[ROUNDS]


def _run() -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        sys.exit(_status(error))
    except SignalException as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.sigval)


def _status(error: Any) -> int:
    """Of the rank that failed first; where it was on its way out and killed by us, of one that ended because of it."""
    _, first = error.get_first_failure()
    codes = [failure.exitcode for failure in error.failures.values()]
    code = first.exitcode
    if code == -signal.SIGTERM:
        code = next((other for other in codes if other > 0), code)
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    main()
