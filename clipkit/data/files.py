"""A folder, a tar or a single file behind one face: name -> bytes. Tars are read in place and never unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from clipkit.data.shards import TarFolder
from clipkit.errors import UserError


class Files(Mapping[str, bytes]):
    """Files by relative name, sorted, read when asked for. Raises UserError when there is nothing at `path`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._readers: dict[str, Callable[[], bytes]]
        if self.path.is_dir():
            files = sorted(p for p in self.path.rglob("*") if p.is_file())
            self._readers = {p.relative_to(self.path).as_posix(): p.read_bytes for p in files}
        elif not self.path.is_file():
            raise UserError(f"{path}: no such file or folder")
        elif tarfile.is_tarfile(self.path):
            tar = TarFolder(self.path)
            self._readers = {name: partial(tar.read, name) for name in tar.paths()}
        else:
            self._readers = {self.path.name: self.path.read_bytes}

    def __getitem__(self, name: str) -> bytes:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)
