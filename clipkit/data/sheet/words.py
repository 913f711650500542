"""Texts for people: what a negative changes, and characters that no page or picture can hold."""

from __future__ import annotations

import re
from typing import Literal

Mark = Literal["same", "new", "gone"]
LONGEST = 200
"""Words up to which texts are compared: what it costs grows with their product."""
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with a replacement sign for control characters and halves of surrogate pairs."""
    return UNPRINTABLE.sub("\ufffd", text)


def changes(caption: str, negative: str) -> list[tuple[str, Mark]]:
    """The negative's words, `new` where they stand otherwise in the caption, and the caption's that are `gone`.

    Case does not count. A word that only moved is marked where it stands now.
    """
    old, new = printable(caption).split(), printable(negative).split()
    if max(len(old), len(new)) > LONGEST:
        return [(word, "same") for word in new]
    before, after = [word.casefold() for word in old], [word.casefold() for word in new]
    out: list[tuple[str, Mark]] = []
    i = j = 0
    for a, b in [*_common(before, after), (len(old), len(new))]:
        if j == b:  # nothing stands in their place
            out.extend((word, "gone") for word in old[i:a] if word.casefold() not in after)
        out.extend((word, "new") for word in new[j:b])
        out.extend((word, "same") for word in new[b : b + 1])
        i, j = a + 1, b + 1
    return out


def _common(a: list[str], b: list[str]) -> list[tuple[int, int]]:
    """Places (in a, in b) of a longest common subsequence. difflib would keep long blocks and lose exchanged words."""
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            longest[i][j] = longest[i + 1][j + 1] + 1 if a[i] == b[j] else max(longest[i + 1][j], longest[i][j + 1])
    out, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            out.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return out


def bytes_of(count: int) -> str:
    """1.2 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
