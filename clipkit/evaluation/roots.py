"""Where pictures and rows lie: `source` -> folder, tar, or several tars. Paths inside a source are never trusted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from clipkit.data.shards import TarFolder
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.evaluation.benchmark import Source

EVERYWHERE = "*"
"""The key of `roots` whose folder holds every source that has no root of its own."""


class Place(Protocol):
    """Files by relative path."""

    def paths(self, below: str = "") -> list[str]:
        """Every file below a folder, sorted, with its whole path."""
        ...

    def __contains__(self, path: object) -> bool: ...

    def read(self, path: str) -> bytes:
        """The file's bytes."""
        ...


class Folder:
    """A folder on disk."""

    def __init__(self, root: Path):
        self.root = root

    def paths(self, below: str = "") -> list[str]:
        files = (self.root / below).rglob("*")
        return sorted(path.relative_to(self.root).as_posix() for path in files if path.is_file())

    def __contains__(self, path: object) -> bool:
        return (self.root / str(path)).is_file()

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()


class Tars:
    """One or several tars as one folder, read in place; a name that an earlier tar has too gets its tar's in front."""

    def __init__(self, files: list[Path]):
        self._where: dict[str, tuple[TarFolder, str]] = {}
        for file in files:
            tar = TarFolder(file)
            for name in tar.paths():
                self._where[f"{file.name}/{name}" if name in self._where else name] = (tar, name)

    def paths(self, below: str = "") -> list[str]:
        start = f"{below}/" if below else ""
        return sorted(path for path in self._where if path.startswith(start))

    def __contains__(self, path: object) -> bool:
        return path in self._where

    def read(self, path: str) -> bytes:
        tar, name = self._where[path]
        return tar.read(name)


class Roots:
    """`source` -> place, opened when first asked for.

    `roots`: source -> folder, tar or glob of tars; under "*" one folder for all others, in which a source lies under
    its usual name (`Source.files`) or its own. `sources` is what the benchmarks know of theirs.
    """

    def __init__(self, roots: Mapping[str, str | Path] | None = None):
        self.roots = {name: Path(path).expanduser() for name, path in (roots or {}).items()}
        self.sources: dict[str, Source] = {}
        self._places: dict[str, Place | None] = {}

    def bind(self, src: str, folder: Path) -> None:
        """Let `src` be this folder."""
        self._places[src] = Folder(folder)

    def place(self, src: str) -> Place | None:
        """Where the source lies; None if no root says so. Raises UserError if the root does not exist."""
        if src not in self._places:
            self._places[src] = self._find(src)
        return self._places[src]

    def within(self, src: str, pattern: str) -> str:
        """The source made of the tars that match `pattern` inside `src`; `src` itself where the pattern is empty."""
        if not pattern:
            return src
        inside, name = self.need(src), f"{src}:{safe(pattern)}"
        if name not in self._places:
            files = sorted(inside.root.glob(pattern)) if isinstance(inside, Folder) else []
            if not files:
                raise UserError(f"source {src}: no {pattern} in it")
            self._places[name] = Tars(files)
        return name

    def need(self, src: str) -> Place:
        """The source's place. Raises UserError saying what the source is and how to give its root."""
        place = self.place(src)
        if place is None:
            raise UserError(f"source {self.describe(src)} has no root")
        return place

    def has(self, src: str, path: str) -> bool:
        """Whether the file is there."""
        place = self.place(src)
        return place is not None and safe(path) in place

    def read(self, src: str, path: str) -> bytes:
        """The file's bytes. Raises UserError when it is missing."""
        if safe(path) not in (place := self.need(src)):
            raise UserError(f"source {src}: no file {path} in it")
        return place.read(path)

    def paths(self, src: str, folder: str = "") -> list[str]:
        """All files of the source below `folder`, with their whole paths."""
        return self.need(src).paths(safe(folder).rstrip("/") if folder else "")

    def describe(self, src: str) -> str:
        """The source's name and what it is."""
        return f"{src} ({self.sources[src].about})" if src in self.sources else src

    def _find(self, src: str) -> Place | None:
        usual = self.sources[src].files if src in self.sources else ""
        if src in self.roots:
            place = _open(self.roots[src], usual)
            if place is None:
                raise UserError(f"roots: {src}={self.roots[src]}: no such folder or tar")
            return place
        if EVERYWHERE in self.roots:
            common = self.roots[EVERYWHERE]
            candidates = [usual, src, f"{src}.tar", f"{src}-*.tar"]
            return next((p for c in candidates if c and (p := _open(common / c, usual))), None)
        return None


def _open(path: Path, usual: str) -> Place | None:
    """The folder (or the source's usual tars inside it), tar or glob of tars at `path`; None if there is nothing."""
    if path.is_dir():
        tars = sorted(path.glob(usual)) if usual.endswith(".tar") else []
        return Tars(tars) if tars else Folder(path)
    if path.is_file():
        return Tars([path])
    files = sorted(path.parent.glob(path.name)) if path.name else []
    return Tars(files) if files else None


def split_reference(reference: str) -> tuple[str, str]:
    """`source:path` -> (source, path); without a source ("", path)."""
    src, colon, path = reference.partition(":")
    return (src, path) if colon else ("", reference)


def safe(path: str) -> str:
    """The path, if it stays inside its source. Raises UserError."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or not path:
        raise UserError(
            f"{path!r}: paths of pictures and rows must stay inside their source (no .., no absolute paths)"
        )
    return path
