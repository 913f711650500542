"""torchrun, but its exit status says how the ranks ended: `python -m clipkit.agent [TORCHRUN OPTIONS] -m clipkit ...`.

torchrun itself ends with 1 whatever its ranks ended with, so that nothing above it can tell a run that was stopped and
has saved (`guard.requeue_code`) from one that failed, or a mistake in the config (2) from a lost node.
"""

from __future__ import annotations

import signal
import sys
from typing import Any


def main() -> None:
    """Status: that of the rank that failed first, or 128 + n where signal n ended it, or told this process to stop."""
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
