"""What a language model answered, in an append-only JSONL file: paid for once, found again by what was asked."""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from clipkit.errors import UserError


class Question(NamedTuple):
    """One caption, and what it is to become; `picture` is the mark of one that is shown beside it (album.py)."""

    caption: str
    kind: str
    picture: str = ""


@dataclass(frozen=True)
class Order:
    """All that decides an answer besides the question."""

    model: str
    count: int
    """Texts asked for."""
    seed: int
    prompts: dict[str, str]
    """Mark of the prompt of each kind."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the user adds to requests: temperature, ..."""

    def fields(self, question: Question) -> dict[str, Any]:
        """The question as the file keeps it; equal fields, equal question."""
        return {
            "caption": question.caption,
            "kind": question.kind,
            "picture": question.picture,
            "prompt": self.prompts[question.kind],
            "model": self.model,
            "seed": self.seed,
            "count": self.count,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class Answer:
    """The texts; or, where there are none and asking again is no use, why. `tokens`: (in, out) of all attempts."""

    texts: tuple[str, ...] = ()
    failed: str = ""
    tokens: tuple[int, int] = (0, 0)


class Answers:
    """The file at `path`, to be used as a context; only one process at a time may have it open to write.

    A line is whole or does not count: a torn last one, as a kill leaves it, is cut off; others that cannot be read are
    passed over. In memory is where each answer lies, not the answer. Raises UserError when another process has it.
    """

    def __init__(self, path: str | Path, write: bool = True):
        self.path, self.write = Path(path), write
        self.tokens: dict[tuple[str, str, str], Counter[str]] = {}
        """(kind, prompt, model) → answers, tokens in and out."""
        self._places: dict[bytes, int] = {}
        self._end = 0

    def __enter__(self) -> Answers:
        self._file = self._opened()
        self._file.seek(0)
        for line in self._file:
            if line.endswith(b"\n"):
                self._index(line)
                self._end += len(line)
        if self.write:
            self._file.truncate(self._end)
        return self

    def _opened(self) -> IO[bytes]:
        if not self.write:
            return self.path.open("rb") if self.path.is_file() else io.BytesIO()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise UserError(f"{self.path}: another call is asking into this file; wait for it, or stop it") from None
        return file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()

    @property
    def size(self) -> int:
        """Bytes of the file; grows with every answer."""
        return self._end

    def __contains__(self, fields: dict[str, Any]) -> bool:
        return _key(fields) in self._places

    def get(self, fields: dict[str, Any]) -> Answer | None:
        """The answer to a question, as `Order.fields` gives it."""
        place = self._places.get(_key(fields))
        if place is None:
            return None
        self._file.seek(place)
        entry = json.loads(self._file.readline())
        return Answer(tuple(entry["texts"]), entry["failed"], tuple(entry["tokens"]))

    def add(self, entries: Iterable[tuple[dict[str, Any], Answer]]) -> None:
        """Keep answers; they are on the disk when this returns."""
        lines = [_line(fields, answer) for fields, answer in entries]
        self._file.write(b"".join(lines))
        self._file.flush()
        os.fsync(self._file.fileno())
        for line in lines:
            self._index(line)
            self._end += len(line)

    def _index(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            key, (tokens_in, tokens_out) = _key(entry), entry["tokens"]
            of = entry["kind"], entry["prompt"], entry["model"]
        except (ValueError, KeyError, TypeError):
            return  # of another make, or damaged on the disk: asked again
        self._places[key] = self._end
        self.tokens.setdefault(of, Counter()).update({"answers": 1, "in": tokens_in, "out": tokens_out})


_ASKED = ("caption", "kind", "picture", "prompt", "model", "seed", "count", "settings")


def _key(fields: dict[str, Any]) -> bytes:
    asked = [fields[name] for name in _ASKED]
    return blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).digest()


def _line(fields: dict[str, Any], answer: Answer) -> bytes:
    # ASCII: captions can hold halves of surrogate pairs, which UTF-8 does not take.
    return json.dumps(fields | vars(answer)).encode() + b"\n"
