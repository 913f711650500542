"""Commands as users type them, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from clipkit import cli


class Outcome:
    """What a command left behind."""

    def __init__(self, result: Any):
        self.status, self.out, self.err, self.exception = (
            result.exit_code,
            result.stdout,
            result.stderr,
            result.exception,
        )


def run(*words: str | Path, stdin: str | None = None) -> Outcome:
    return Outcome(CliRunner().invoke(cli.app, [str(word) for word in words], input=stdin))


def well(*words: str | Path, stdin: str | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = run(*words, stdin=stdin)
    assert done.status == 0, done.err or done.exception
    return done.out


def wrong(*words: str | Path) -> str:
    """The message of a command that must blame the user."""
    done = run(*words)
    assert done.status == 2 and done.err and "Traceback" not in done.err
    return done.err
