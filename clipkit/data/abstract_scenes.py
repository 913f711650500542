"""Abstract Scenes with people's own words: CoDraw's descriptions of clip-art scenes, drawn from their pieces.

Reads a tar (or folder) with `scenes.jsonl.gz`, `Pngs/*.png` and `minimal_pairs/*.csv`: CoDraw (Kim et al., ACL 2019)
on Abstract Scenes (Zitnick & Parikh, CVPR 2013), minimal pairs by Nikolaus & Fourtassi (CMCL 2021). The scenes of the
minimal pairs are tests: they are never read as training or validation data.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipkit.data import counterfactuals as exact
from clipkit.data.build import Sample, encode_jpeg
from clipkit.data.files import Files
from clipkit.errors import UserError
from clipkit.registry import source

if TYPE_CHECKING:
    from PIL.Image import Image

CANVAS = (500, 400)
SCALE = (1.0, 0.7, 0.49)
"""Size of a piece by its depth z: near, middle, far."""
UNUSED = -10000
SUN, SKY = "s_3s.png", 0


@dataclass(frozen=True)
class Piece:
    """One piece of clip art: file, category (0 sky ... 7 toy), centre on the canvas, depth, mirrored or not."""

    png: str
    category: int
    x: float
    y: float
    z: int
    flip: bool


class AbstractScenes:
    """The opened data set: records, minimal pairs and a renderer that keeps every scaled piece."""

    def __init__(self, files: Files):
        self._files = files
        if "scenes.jsonl.gz" not in files:
            raise UserError(f"{files.path}: not the Abstract Scenes data: scenes.jsonl.gz is not in it")
        self._variants: dict[tuple[str, int, bool], Image] = {}

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """Scenes by number: {"image_id", "split", "scene", "messages", ...}."""
        lines = gzip.decompress(self._files["scenes.jsonl.gz"]).splitlines()
        return {record["image_id"]: record for record in map(json.loads, lines)}

    @cached_property
    def minimal_pairs(self) -> dict[str, list[dict[str, str]]]:
        """Rows {"img_id", "target_sentence", "distractor_sentence"} by kind; rows 2k and 2k+1 mirror each other."""
        tables = {}
        for name in sorted(n for n in self._files if n.startswith("minimal_pairs/") and n.endswith(".csv")):
            text = self._files[name].decode()
            tables[Path(name).stem.removeprefix("semantics_eval_")] = list(csv.DictReader(io.StringIO(text)))
        return tables

    @cached_property
    def held_out(self) -> set[int]:
        """Numbers of the scenes that belong to minimal pairs: by the tables, and by the records' own mark."""
        named = {int(row["img_id"]) for rows in self.minimal_pairs.values() for row in rows}
        return named | {number for number, record in self.records.items() if record.get("in_minimal_pairs")}

    def render(self, number: int, size: int) -> Image:
        """Scene `number` as an RGB picture of `size` x `size` pixels, the whole canvas squashed into it."""
        return self.draw(parse(self.records[number]["scene"]), size)

    def draw(self, pieces: list[Piece], size: int) -> Image:
        """Any pieces, in the same way."""
        from PIL.Image import Resampling

        canvas = self._background.copy()
        for piece in paint_order(pieces):
            picture = self._variant(piece)
            corner = (round(piece.x - picture.width / 2), round(piece.y - picture.height / 2))
            canvas.paste(picture, corner, picture)
        return canvas.resize((size, size), Resampling.BICUBIC)

    @cached_property
    def _background(self) -> Image:
        return self._open("background.png").convert("RGB")

    def _variant(self, piece: Piece) -> Image:
        from PIL.Image import Resampling, Transpose

        key = (piece.png, piece.z, piece.flip)
        if key not in self._variants:
            picture = self._open(piece.png)
            width, height = (round(side * SCALE[piece.z]) for side in picture.size)
            picture = picture.resize((width, height), Resampling.BICUBIC)
            self._variants[key] = picture.transpose(Transpose.FLIP_LEFT_RIGHT) if piece.flip else picture
        return self._variants[key]

    def _open(self, png: str) -> Image:
        from PIL import Image

        return Image.open(io.BytesIO(self._files[f"Pngs/{png}"])).convert("RGBA")


def parse(scene: str) -> list[Piece]:
    """The pieces that a scene string places on the canvas: a count, then 8 fields a piece."""
    count, *fields = scene.rstrip(",").split(",")
    if len(fields) != 8 * int(count):
        raise UserError(f"scene string: {count} pieces need {8 * int(count)} fields, found {len(fields)}: {scene[:60]}")
    rows = (fields[i : i + 8] for i in range(0, len(fields), 8))
    pieces = [Piece(png, int(cat), float(x), float(y), int(z), flip == "1") for png, _, _, cat, x, y, z, flip in rows]
    return [piece for piece in pieces if piece.x != UNUSED]


def paint_order(pieces: list[Piece]) -> list[Piece]:
    """Back to front: the sun, what else is in the sky, then from far to near, in list order within each."""

    def depth(piece: Piece) -> tuple[int, int]:
        if piece.category == SKY:
            return (0, 0) if piece.png == SUN else (1, 0)
        return (2, -piece.z)

    return sorted(pieces, key=depth)


@source()
def abstract_scenes(
    path: str | Path,
    *,
    split: Literal["train", "val", "test"] = "train",
    size: int = 128,
    per_scene: int = 8,
    max_words: int = 45,
    seed: int = 0,
    names: float = 0.0,
    statements: int = 0,
    counterfactuals: bool = False,
) -> Iterator[Sample]:
    """Scenes of one split as `size` x `size` JPEGs, each with up to `per_scene` captions of at most `max_words` words.

    A caption is one to three consecutive messages of the Teller, cleaned. Scenes of minimal pairs appear in no split
    but `test`; scenes whose Teller never describes anything are left out.

    `names`: share of captions that call the children Mike and Jenny; `statements`: short captions made of the pieces
    ("mike is sad"), so many a scene. `counterfactuals`: the two children exchanged, whole, their faces or their poses,
    as pictures of negatives (KEY.negative0.jpg), with captions that are true of those alone.
    """
    data = AbstractScenes(Files(path))
    chosen = [number for number, record in data.records.items() if record["split"] == split]
    if split != "test":
        chosen = [number for number in chosen if number not in data.held_out]
    if not chosen:
        raise UserError(f"{path}: no scenes in split {split}")
    for number in chosen:
        record = data.records[number]
        messages = [text for message in record["messages"] if (text := clean(message))]
        captions = captions_of(messages, per_scene, max_words, random.Random(f"{seed}/{number}"))
        if captions:
            pieces = parse(record["scene"])
            sample = Sample(f"{number:05d}", encode_jpeg(data.draw(pieces, size)), "jpg", captions)
            sample.extra["scene"] = {"pieces": [asdict(piece) for piece in pieces]}
            if names or statements:
                _own_words(sample, pieces, names, statements, random.Random(f"{seed}/{number}/words"))
            if counterfactuals:
                _add_counterfactuals(sample, pieces, data, size)
            yield sample


MESSAGE, STATEMENT = "message", "statement"
"""Kinds of captions, where both are there."""


def _own_words(sample: Sample, pieces: list[Piece], names: float, statements: int, rng: random.Random) -> None:
    """Names for some captions' children, and statements behind the captions."""
    sample.captions[:] = dict.fromkeys(exact.named(caption, names, rng) for caption in sample.captions)
    said = list(dict.fromkeys(exact.statements(pieces, rng)))[:statements]
    sample.extra["caption_kinds"] = [MESSAGE] * len(sample.captions) + [STATEMENT] * len(said)
    sample.captions += said


def _add_counterfactuals(sample: Sample, pieces: list[Piece], data: AbstractScenes, size: int) -> None:
    """Pictures with the children exchanged, and for each caption those of them that it is false of."""
    negatives: list[list[dict[str, Any]]] = [[] for _ in sample.captions]
    for other in exact.counterfactuals(pieces):
        texts = [exact.said_of(caption, other) for caption in sample.captions]
        if any(texts):
            number = len(sample.negative_images)
            sample.negative_images[f"negative{number}.jpg"] = encode_jpeg(data.draw(other.pieces, size))
            for group, text in zip(negatives, texts):
                if text:
                    group.append({"text": text, "kind": f"exchange_{other.kind}", "source": SCENE, "picture": number})
    sample.extra["negatives"] = negatives


SCENE = "scene"
"""The `source` of negatives that were drawn."""


def captions_of(messages: list[str], count: int, max_words: int, rng: random.Random) -> list[str]:
    """Up to `count` different captions: runs of 1-3 consecutive messages that go through the whole description in turn.

    A run is cut before the message that would take it over `max_words`; a longer single message is left out.
    """
    captions: dict[str, None] = {}
    for _ in range(count):  # each pass cuts the description at other places
        start = 0
        while start < len(messages):
            wanted = rng.randint(1, 3)
            run = [messages[start]]
            for message in messages[start + 1 : start + wanted]:
                if len(" ".join([*run, message]).split()) > max_words:
                    break
                run.append(message)
            start += len(run)
            caption = " . ".join(run)
            if len(caption.split()) <= max_words:
                captions[caption] = None
    return list(captions)[:count]


# The Teller also chats, asks for a look at the drawing, and afterwards corrects a picture that we do not have.
_CHAT = re.compile(
    r"\b(?:check\w*|peek\w*|peep\w*|hi|hello|hey|thanks?|thx|ty|ok|okay|yes|yep|nope|submit|ready|done|finish\w*|perfect"
    r"|great|awesome|sorry|good|nice|bye|everything|anything|questions?|chance|you|your)\b"
    r"|\b(?:can|may|should|let|will|'ll|gonna) (?:i |me |'s |we )?(?:take a |have a )?(?:look|see)\b"
    r"|\bthat (?:'s|is|was|should be) (?:it|all)\b|^no$"
)
_CORRECTION = re.compile(
    r"\b(?:move|flip|swap|switch|change|fix|adjust|shift|bring|raise|make|should|needs?|instead|wrong|correct\w*)\b"
    r"|\b(?:bit|little|sizes?) (?:more|up|down|bigger|smaller)\b"
)
_SUBJECT = re.compile(
    r"\b(?:boys?|girls?|mikes?|jenn?ys?|kids?|children|s?he|her|his|him|they|suns?|clouds?|tree|trees|oak|pine|bush|apple"
    r"|balloons?|helicopter|(?:air)?plane|rocket|lightning|rain\w*|sandbox|slide|swings?|tent|grill|bbq|table|fire"
    r"|campfire|toy|bee|horse|snake|cat|dog|bear|duck|owl|hat|cap|crown|(?:sun)?glasses|\w*ball|bat|frisbee|kite|glove"
    r"|rac(?:ket|quet)|shovel|bucket|pail|pie|pizza|(?:ham)?burger|soda|drink|cup|ketchup|mustard|bottle)\b"
)
_SENTENCE = re.compile(r"\s*[.?!;:]+(?:\s+|$)")
_CLAUSE = re.compile(r"[\s,-]*(?:,|\b(?:and then|and|then) (?=(?:i|we|can|may|let)\b))\s*")


def clean(message: str) -> str:
    """What a message says about the scene, in lower case; empty for chat, requests for a look and corrections."""
    text = re.sub(r"\s+", " ", message.lower().replace("''", " inches ").replace("`", "'"))
    if _CORRECTION.search(text):
        return ""
    sentences = (_CLAUSE.split(sentence) for sentence in _SENTENCE.split(text))
    kept = (" , ".join(clause for clause in clauses if clause and not _CHAT.search(clause)) for clauses in sentences)
    said = " . ".join(sentence for sentence in kept if sentence)
    return said if _SUBJECT.search(said) and len(said.split()) >= 4 else ""
