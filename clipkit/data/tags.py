"""The vocabulary of tags: a text file with one word a line, whose line number is the word's place.

`KEY.json` names what is to be seen (`tags`); training knows the words of one vocabulary and leaves the others out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from clipkit.data.build import tracked
from clipkit.data.members import SHEETS, Unreadable, plain, read_sheet, tags_of
from clipkit.data.shards import Index, write_atomic
from clipkit.errors import UserError


@lru_cache
def vocabulary(path: str) -> dict[str, int]:
    """Word → place, of a file with one word a line; blank lines do not count.

    Raises UserError for a file that is not there, holds nothing, or names a word twice. Read once a process.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no vocabulary of tags ({error}); make one with clipkit shards tags") from None
    places: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        word = plain(line)
        if word in places:
            raise UserError(f"{path}: line {number}: {word!r} is there already; each word should have one line")
        if word:
            places[word] = len(places)
    if not places:
        raise UserError(f"{path}: holds no word; a vocabulary has one a line")
    return places


def count_tags(patterns: str | Path | Sequence[str | Path], progress: bool = True) -> tuple[Counter[str], int, int]:
    """(pictures a word is a tag of, by word; pictures with a tag; pairs) over all shards.

    Raises UserError for a pair that cannot be read.
    """
    index = Index.load(patterns, progress=progress)
    words: Counter[str] = Counter()
    tagged = 0
    ids = range(len(index))
    for id in tracked(ids, "counting tags", len(ids)) if progress else ids:
        try:
            tags = {*tags_of(read_sheet(index.read(id, SHEETS)))}
        except Unreadable as error:
            raise UserError(f"{index.where(id)}: {error}; mend the shard (clipkit shards check)") from None
        words.update(tags)
        tagged += bool(tags)
    return words, tagged, len(index)


def write_vocabulary(words: Counter[str], top: int, path: str | Path, overwrite: bool = False) -> list[tuple[str, int]]:
    """Write the `top` most frequent words to `path`, the commonest first and equals by the alphabet; returns them.

    Raises UserError when there is none, or the file is there (unless `overwrite`).
    """
    if not words:
        raise UserError("no pair has tags: KEY.json should hold a list of words (clipkit shards nouns makes one)")
    kept = sorted(words.items(), key=lambda item: (-item[1], item[0]))[:top]
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path}: is there already, and models may have learnt by it; choose another name or overwrite")
    write_atomic(Path(path), "".join(f"{word}\n" for word, _ in kept).encode())
    return kept
