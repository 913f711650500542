"""Copies of a run's checkpoints in another place: a folder, or whatever fsspec has a URL for (s3, gs, ...).

    MIRROR/step_00000200/   the files of checkpoints/step_00000200; state.json comes last, and says that all are there

A copy that fails is tried again, then said and left out; it never ends the run. Credentials are the store's own matter.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipkit.checks import mirror_at_home
from clipkit.config import Config
from clipkit.data.remote import filesystem, within
from clipkit.data.web import Transient, shown
from clipkit.errors import UserError
from clipkit.model.spec import STEP, whole_checkpoints
from clipkit.training.retention import for_good, kept

TRIES, PAUSE_S = 4, 2.0
"""Attempts at one checkpoint, and the pause after the first, which doubles."""
LAST, TRIAL = "state.json", ".clipkit"
"""What a copy ends with; what is written, and taken away again, to see whether the place can be written."""


class Mirror:
    """The mirror of one run. Checkpoints are copied by a thread, one at a time; the newest waits, and those for good.

    Raises UserError where no store can be had at the address, and for the run's own checkpoints.
    """

    def __init__(self, config: Config):
        if problem := mirror_at_home(config):
            raise UserError(problem)
        self.url, self._config = config.mirror_url.rstrip("/"), config
        self._store, self._root = filesystem(self.url)
        self._thread = ThreadPoolExecutor(1)
        self._newest: Path | None = None
        self._reading: Path | None = None

    def push(self, checkpoint: Path) -> None:
        """Have it copied soon; those that still wait no longer count, but for what stays for good."""
        self._newest = checkpoint
        self._thread.submit(self._copy, checkpoint)

    def reads(self, checkpoint: Path) -> bool:
        """Whether it is being copied just now, and must stay."""
        return self._reading == checkpoint

    def close(self) -> None:
        """Wait until the newest checkpoint is copied, or given up."""
        self._thread.shutdown()

    def begin(self) -> None:
        """See that a new run has a place for its copies.

        Raises UserError for one that holds a run's already, which would pass for newer than the new run's, and for one
        that cannot be read and written.
        """
        try:
            whole = self._whole()
            if not whole:
                self._try()
        except (Transient, UserError, OSError) as error:
            raise UserError(self._useless(error)) from None
        if whole:
            raise UserError(
                f"mirror: {shown(self.url)}: holds a run's checkpoints already, at last {whole[-1]}; continue that run "
                "with --resume, or choose another mirror="
            )

    def fetch(self, checkpoints: Path) -> None:
        """Bring its newest checkpoint into the folder `checkpoints`, unless that has one as new.

        Raises UserError when it cannot be read, or written, and there is then none here either.
        """
        try:
            here, there = _names(checkpoints), self._whole()
            if there and (not here or there[-1] > here[-1]):
                self._download(there[-1], checkpoints)
            self._try()
        except (Transient, UserError, OSError) as error:
            here = _names(checkpoints)
            if not here:
                raise UserError(self._useless(error)) from None
            _say(f"{self._useless(error)}; going on from {here[-1]}")

    def _useless(self, error: Exception) -> str:
        return f"mirror: {shown(self.url)}: cannot be used: {error}; mend that, or choose another mirror="

    def _try(self) -> None:
        """Write a little and take it away: most stores have no folders that could be looked at instead."""
        self._ask("makedirs", self._root, exist_ok=True)
        self._ask("pipe_file", self._path(TRIAL), b"clipkit")
        self._ask("rm", self._path(TRIAL))

    def _copy(self, checkpoint: Path) -> None:
        reason: Exception | None = None
        copied = False
        for number in range(TRIES):
            if checkpoint != self._newest and not self._stays(checkpoint):
                break
            if reason:
                time.sleep(PAUSE_S * 2 ** (number - 1))
            try:
                self._reading = checkpoint
                if not copied:
                    self._upload(checkpoint)
                    copied = True
                self._clear()
                return
            except (Transient, UserError, OSError) as error:
                reason = error
            finally:
                self._reading = None
        else:
            failed = "what is old could not be removed from" if copied else f"{checkpoint.name} could not be copied to"
            _say(f"mirror: {failed} {shown(self.url)}, tried {TRIES} times: {reason}")
        if reason and not copied:
            self._forget(checkpoint)

    def _forget(self, checkpoint: Path) -> None:
        """Take away a copy that was given up: half as it is, it would keep the room that the next one needs."""
        with suppress(Transient, UserError, OSError):  # out of reach, perhaps; the next copy that is whole clears too
            self._remove(checkpoint.name)
            self._clear()

    def _stays(self, checkpoint: Path) -> bool:
        return checkpoint.name in for_good(_names(checkpoint.parent), self._config)

    def _upload(self, checkpoint: Path) -> None:
        self._remove(checkpoint.name)
        self._ask("makedirs", self._path(checkpoint.name), exist_ok=True)
        files = sorted(path for path in checkpoint.iterdir() if path.name != LAST)
        for file in [*files, checkpoint / LAST]:
            self._ask("put_file", str(file), self._path(checkpoint.name, file.name), size=file.stat().st_size)

    def _clear(self) -> None:
        """Take away what need not stay, and what was never whole."""
        stay = kept(self._whole(), self._config)
        for name in {path.rpartition("/")[2] for path in self._listed("step_*")} - set(stay):
            if re.fullmatch(STEP, name):
                self._remove(name)

    def _remove(self, name: str) -> None:
        """The last file first: what is half gone is not whole."""
        for path in (self._path(name, LAST), self._path(name)):
            if self._ask("exists", path):
                self._ask("rm", path, recursive=path != self._path(name, LAST))

    def _download(self, name: str, checkpoints: Path) -> None:
        partial = checkpoints / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in self._listed(f"{name}/*"):
            size = self._ask("info", path)["size"]
            self._ask("get_file", path, str(partial / path.rpartition("/")[2]), size=size)
        os.replace(partial, checkpoints / name)

    def _whole(self) -> list[str]:
        """Names of its whole checkpoints, oldest first."""
        self._store.invalidate_cache()
        names = (path.split("/")[-2] for path in self._listed(f"step_*/{LAST}"))
        return sorted(name for name in names if re.fullmatch(STEP, name))

    def _listed(self, pattern: str) -> list[str]:
        return sorted(self._ask("glob", self._path(pattern)))

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *names])

    def _ask(self, method: str, *words: Any, size: int = 0, **more: Any) -> Any:
        """One call to the store, with a deadline by `size`."""
        return within(lambda: getattr(self._store, method)(*words, **more), self.url, size)


def _names(checkpoints: Path) -> list[str]:
    """Of whole checkpoints in a run's folder, oldest first."""
    return [path.name for path in whole_checkpoints(checkpoints.parent)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
