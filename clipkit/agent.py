"""torchrun, but its exit status says how the ranks ended: `python -m clipkit.agent [TORCHRUN OPTIONS] -m clipkit ...`.

torchrun itself ends with 1 whatever its ranks ended with, so that nothing above it can tell a run that was stopped and
has saved (`guard.requeue_code`) from one that failed, or a mistake in the config (2) from a lost node.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Status: that of the rank that failed first, or 128 + n where signal n ended it, or told this process to stop."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main()
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        _, first = error.get_first_failure()
        sys.exit(first.exitcode if first.exitcode > 0 else 128 - first.exitcode)
    except SignalException as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    main()
