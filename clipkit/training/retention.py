"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Sequence

from clipkit.config import Config


def kept(names: Sequence[str], config: Config) -> list[str]:
    """Of checkpoints `step_00000200`, oldest first, those that stay: the newest `keep`, and those for good."""
    stay = {*names[-config.keep :], *for_good(names, config)}
    return [name for name in names if name in stay]


def for_good(names: Sequence[str], config: Config) -> list[str]:
    """The first at or after every multiple of `keep_every` samples."""
    stay, behind = [], 0
    for name in names if config.keep_every else ():
        passed = int(name.removeprefix("step_")) * config.batch_size // config.keep_every
        if passed > behind:
            stay.append(name)
            behind = passed
    return stay
