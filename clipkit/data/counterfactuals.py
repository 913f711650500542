"""Abstract Scenes with one thing exchanged between the two children, and the words that say so.

Every child is a picture of one of seven poses and five faces. Exchanged whole, the boy stands where the girl stood and
does what she did; or only faces or poses change over. So the picture is exact, and a caption says of the other picture
what it said of this one, with the children's words exchanged, or with the other child's mood or pose. Only captions
that are false of the scene itself come out: their children differ in something that is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipkit.data.abstract_scenes import Piece

CHILD = re.compile(r"hb([01])_(\d+)s\.png$")
FACES = 5
MOODS = ("angry", "happy", "happy", "sad", "surprised")
"""By face; the second and third differ in the mouth alone, and both are called happy."""
POSES = ("standing", "standing", "kicking", "running", "sitting", "sitting", "standing")
"""By pose: arms out, arms up, kicking, running, legs crossed, legs out, one arm up."""
NAMES = (("boy", "mike"), ("girl", "jenny"))

MOOD_WORDS = {
    "angry": ("angry", "mad"),
    "happy": ("happy", "smiling"),
    "sad": ("sad", "crying"),
    "surprised": ("surprised", "shocked", "startled"),
}
_MOOD_OF = {word: mood for mood, words in MOOD_WORDS.items() for word in words}
POSE_WORDS = ("standing", "kicking", "running", "sitting")
_PLACE = re.compile(r"\b(?:left|right|middle|center|top|bottom|front|behind|under|next|near|beside|above|below)\b")
_SAID = re.compile(rf"\b({'|'.join([*_MOOD_OF, *POSE_WORDS])})\b")
_BOY, _GIRL = re.compile(r"\b(?:boys?|mike)\b"), re.compile(r"\b(?:girls?|jenn?y)\b")
_SEX = re.compile(r"\b(boys?|girls?|mike|jenn?y|he|she|him|his|her|hers|himself|herself)\b( ?)(\w*)")
_OTHER = {
    "boy": "girl", "girl": "boy", "boys": "girls", "girls": "boys", "mike": "jenny", "jenny": "mike", "jeny": "mike",
    "he": "she", "she": "he", "him": "her", "his": "her", "hers": "his", "himself": "herself", "herself": "himself",
}  # fmt: skip
_SMALL = frozenset(
    ["", "is", "and", "in", "on", "at", "with", "to", "up", "out", "a", "the", "of", "has", "as",
     "holding", "facing", "by"]
)  # fmt: skip


@dataclass(frozen=True)
class Child:
    """One of the two: place in the list of pieces, sex (0 boy, 1 girl), pose and face."""

    at: int
    sex: int
    pose: int
    face: int

    @property
    def mood(self) -> str:
        """What the face is called."""
        return MOODS[self.face]

    @property
    def does(self) -> str:
        """What the pose is called."""
        return POSES[self.pose]

    @property
    def png(self) -> str:
        """The file."""
        return f"hb{self.sex}_{self.pose * FACES + self.face}s.png"


@dataclass(frozen=True)
class Counterfactual:
    """What was exchanged ("roles", "moods" or "poses"), and the pieces of the other picture."""

    kind: str
    pieces: list[Piece]
    children: tuple[Child, Child]


def children(pieces: Sequence[Piece]) -> list[Child]:
    """The children of a scene, the boy first."""
    found = []
    for at, piece in enumerate(pieces):
        if match := CHILD.match(piece.png):
            found.append(Child(at, int(match[1]), *divmod(int(match[2]), FACES)))
    return sorted(found, key=lambda child: child.sex)


def counterfactuals(pieces: Sequence[Piece]) -> list[Counterfactual]:
    """The pictures that an exchange between boy and girl gives; none where there are not both, or they are alike."""
    found = children(pieces)
    if [child.sex for child in found] != [0, 1]:
        return []
    boy, girl = found
    made = [("roles", replace(boy, sex=1), replace(girl, sex=0))]
    if boy.mood != girl.mood:
        made.append(("moods", replace(boy, face=girl.face), replace(girl, face=boy.face)))
    if boy.does != girl.does:
        made.append(("poses", replace(boy, pose=girl.pose), replace(girl, pose=boy.pose)))
    return [Counterfactual(kind, _with(pieces, a, b), (boy, girl)) for kind, a, b in made]


def _with(pieces: Sequence[Piece], *changed: Child) -> list[Piece]:
    """The pieces with children of other files."""
    out = list(pieces)
    for child in changed:
        out[child.at] = replace(out[child.at], png=child.png)
    return out


def said_of(caption: str, other: Counterfactual) -> str:
    """The caption that says of the other picture what this one says of the scene; "" where it may hold of both."""
    boy, girl = other.children
    about = bool(_BOY.search(caption)), bool(_GIRL.search(caption))
    if not any(about):
        return ""
    if other.kind == "roles":
        return exchanged(caption) if _tells(caption, boy, girl) else ""
    if all(about):
        return exchanged(caption) if _only(caption, other.kind) else ""
    one, two = (boy, girl) if about[0] else (girl, boy)
    mine, theirs = (one.mood, two.mood) if other.kind == "moods" else (one.does, two.does)
    words = [word for word in _SAID.findall(caption) if (word in _MOOD_OF) == (other.kind == "moods")]
    if len(words) != 1 or _MOOD_OF.get(words[0], words[0]) != mine:
        return ""
    article = "an" if theirs[0] in "aeiou" else "a"
    return re.sub(rf"\b(an? )?{words[0]}\b", lambda match: f"{article} {theirs}" if match[1] else theirs, caption)


def exchanged(caption: str) -> str:
    """The caption with the words for boy and girl exchanged, pronouns included."""

    def other(match: re.Match[str]) -> str:
        word, gap, following = match.groups()
        if word != "her":
            return _OTHER.get(word, word) + gap + following
        return ("him" if following in _SMALL else "his") + gap + following

    return _SEX.sub(other, caption)


def _tells(caption: str, boy: Child, girl: Child) -> bool:
    """Whether the caption says something in which the two differ: a mood, a pose, or a place."""
    words = _SAID.findall(caption)
    moods, poses = [w for w in words if w in _MOOD_OF], [w for w in words if w not in _MOOD_OF]
    if (moods and boy.mood != girl.mood) or (poses and boy.does != girl.does):
        return True
    return bool(_PLACE.search(caption))


def _only(caption: str, kind: str) -> bool:
    """Whether a caption of both children is short and of moods (or poses) alone: its exchange says what changed."""
    words = _SAID.findall(caption)
    fitting = [word for word in words if (word in _MOOD_OF) == (kind == "moods")]
    return len(words) == len(fitting) == 2 and not _PLACE.search(caption) and len(caption.split()) <= 9


def statements(pieces: Sequence[Piece], rng: Random) -> Iterator[str]:
    """Short plain captions, true of the scene, in a random order: how each child feels, what it does, and of both."""
    found = children(pieces)
    texts = [
        f"{name} is {what}"
        for child in found
        for name, what in (
            (rng.choice(NAMES[child.sex]), rng.choice(MOOD_WORDS[child.mood])),
            (rng.choice(NAMES[child.sex]), child.does),
        )
    ]
    if len(found) == 2:
        boy, girl = found if rng.random() < 0.5 else found[::-1]
        for a, b in ((boy.mood, girl.mood), (boy.does, girl.does)):
            first, second = rng.choice(NAMES[boy.sex]), rng.choice(NAMES[girl.sex])
            texts.append(f"{first} is {a} and {second} is {b}" if a != b else f"{first} and {second} are {a}")
    rng.shuffle(texts)
    yield from (re.sub(r"\b(boy|girl)\b", r"the \1", text) for text in texts)


def named(caption: str, share: float, rng: Random) -> str:
    """The caption with "boy" and "girl" called by their names, with a chance of `share`; all of it or nothing."""
    if rng.random() >= share:
        return caption
    caption = re.sub(r"\b(?:the|a|an|one)? ?\bboy\b(?!')", " mike", caption)
    caption = re.sub(r"\b(?:the|a|an|one)? ?\bgirl\b(?!')", " jenny", caption)
    return re.sub(r"\s+", " ", caption).strip()
