"""Stored outputs of a locked image tower: one float32 row a sample, in an .npy file read through memory mapping.

FILE.npy counts only together with FILE.json, which is written last and says what it was computed from. A row of NaN
stands for a picture that could not be read. Axes: N samples of the index, f features.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.shards import write_atomic


class FeatureStore:
    """One file of features; holds only the path, so that it travels to workers as cheaply as a name.

    `job` names the computation (the same on all its ranks), so that two runs never write to one temporary file.
    """

    def __init__(self, path: str | Path, job: str = ""):
        self.path = Path(path)
        self._sheet = self.path.with_suffix(".json")
        self._partial = self.path.with_suffix(f".{job}.partial.npy")

    def matches(self, fingerprint: dict[str, Any]) -> bool:
        """Whether the file is complete and was computed from just this."""
        return (
            self.path.is_file()
            and self._sheet.is_file()
            and json.loads(self._sheet.read_text()) == json.loads(json.dumps(fingerprint))
        )

    def create(self, samples: int, width: int) -> np.ndarray:
        """A writable map [N f] of zeros under a temporary name (one process creates it)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return np.lib.format.open_memmap(self._partial, mode="w+", dtype=np.float32, shape=(samples, width))

    def attach(self) -> np.ndarray:
        """The same map for another process that fills its own rows."""
        return np.load(self._partial, mmap_mode="r+")

    def commit(self, fingerprint: dict[str, Any]) -> None:
        """All rows are written and flushed: put the file in place and say what it holds (one process does so)."""
        self._sheet.unlink(missing_ok=True)
        os.replace(self._partial, self.path)
        write_atomic(self._sheet, json.dumps(fingerprint, indent=1).encode())

    def __getitem__(self, ids: np.ndarray | int) -> np.ndarray:
        """Rows [n f] of dense ids, or the row [f] of one."""
        return self._rows[ids]

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __reduce__(self) -> tuple[type[FeatureStore], tuple[Path]]:
        return FeatureStore, (self.path,)  # a map would be pickled row by row
