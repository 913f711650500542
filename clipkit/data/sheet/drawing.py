"""A contact sheet as one picture, with Pillow and the font that comes with it: Latin letters; others become boxes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from clipkit.data.sheet.pairs import Negative, Sheet, Shown, size_of
from clipkit.data.sheet.words import changes, printable

COLUMNS, CARD, THUMBNAIL, GAP = 2, 640, 208, 14
"""Cards side by side; pixels: width of a card, sides of a thumbnail, blank between things."""
SIZE, LINE = 15, 20
"""Pixels: height of letters, from line to line."""
LONGEST = 400
"""Characters of a text that are drawn."""
INK = {"same": "#1b1f24", "new": "#0b3d91", "gone": "#8a929c", "quiet": "#59636e", "bad": "#b3261e", "line": "#d9dde3"}


class Word(NamedTuple):
    """A word, and how it is drawn: a name of INK."""

    text: str
    style: str = "same"


@dataclass
class Text:
    """Words of one paragraph, and how far it stands in."""

    words: list[Word]
    indent: int = 0


def draw(sheet: Sheet) -> Image.Image:
    """The sheet; each card goes under the shorter column."""
    head = [Text(_words(sheet.title)), Text(_words(sheet.about, "quiet"))]
    width = COLUMNS * (CARD + GAP) + GAP
    top = _paragraphs(None, head, GAP, GAP, width - 2 * GAP) + GAP
    cards = [_card(pair) for pair in sheet.pairs]
    heights = [top] * COLUMNS
    places = []
    for card in cards:
        column = heights.index(min(heights))
        places.append((GAP + column * (CARD + GAP), heights[column]))
        heights[column] += card.height + GAP
    out = Image.new("RGB", (width, max(heights)), "white")
    _paragraphs(ImageDraw.Draw(out), head, GAP, GAP, width - 2 * GAP)
    for card, place in zip(cards, places):
        out.paste(card, place)
    return out


def _card(pair: Shown) -> Image.Image:
    texts, left = _texts(pair), 2 * GAP + THUMBNAIL
    room = CARD - left - GAP
    height = max(THUMBNAIL + GAP, _paragraphs(None, texts, left, GAP, room)) + GAP
    out = Image.new("RGB", (CARD, height), "white")
    canvas = ImageDraw.Draw(out)
    canvas.rectangle((0, 0, CARD - 1, height - 1), outline=INK["line"])
    if picture := pair.drawn.picture if pair.drawn else pair.picture:
        out.paste(_thumbnail(picture), (GAP, GAP))
    _paragraphs(canvas, texts, left, GAP, room)
    return out


def _thumbnail(picture: Image.Image) -> Image.Image:
    scale = THUMBNAIL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _texts(pair: Shown) -> list[Text]:
    """The paragraphs of a card."""
    facts = [f"{pair.id}", pair.where, f"group {pair.group}" if pair.group is not None else ""]
    facts.append(size_of(pair.picture) if pair.picture else "")
    out = [Text(_words(" · ".join(filter(None, facts)), "quiet"))]
    if pair.problem:
        out.append(Text(_words(f"! {pair.problem}", "bad")))
    if pair.note:
        out.append(Text(_words(pair.note, "quiet")))
    if pair.drawn:
        out += _captioned(pair.drawn.caption, pair.drawn.caption, pair.drawn.negatives)
        positives = pair.drawn.positives
        others = [text for text in pair.captions if text and text not in (pair.drawn.caption, *positives)]
        said = [f"positive: {text}" for text in positives] + [f"not drawn: {text}" for text in others]
        return out + [Text(_words(text, "quiet"), indent=2) for text in said]
    for c, caption in enumerate(pair.captions):
        out += _captioned(f"{c + 1}. {caption}", caption, pair.negatives_of(c))
    return out


def _captioned(said: str, caption: str, negatives: list[Negative]) -> Iterator[Text]:
    """A caption as it is `said`, and its negatives against it."""
    yield Text(_words(said))
    for negative in negatives:
        kind = _words(f"{negative['kind']}:", "quiet") if negative.get("kind") else []
        compared = changes(_short(caption), _short(negative["text"]))
        yield Text(kind + [Word(word, style) for word, style in compared], indent=2)


def _words(text: str, style: str = "same") -> list[Word]:
    return [Word(word, style) for word in printable(_short(text)).split()]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _paragraphs(canvas: ImageDraw.ImageDraw | None, texts: list[Text], left: int, top: int, room: int) -> int:
    """Where the texts end, drawn on a canvas or only measured."""
    blank = _width(" ")
    for text in texts:
        start = left + text.indent * SIZE // 2
        x: float = start
        for word in text.words:
            for piece in _pieces(word, left + room - start):
                wide = _width(piece.text)
                if x > start and x + wide > left + room:
                    x, top = start, top + LINE
                if canvas:
                    _draw_word(canvas, piece, x, top, wide)
                x += wide + blank
        top += LINE + LINE // 5
    return top


def _pieces(word: Word, room: float) -> Iterator[Word]:
    """A word in pieces that fit a line (writing without blanks is one long word)."""
    text = word.text
    while text:
        fits = len(text)
        while fits > 1 and _width(text[:fits]) > room:
            fits = max(1, int(fits * min(0.9, room / _width(text[:fits]))))
        yield Word(text[:fits], word.style)
        text = text[fits:]


def _draw_word(canvas: ImageDraw.ImageDraw, word: Word, x: float, y: int, wide: float) -> None:
    colour = INK[word.style]
    canvas.text((x, y), _drawable(word.text), fill=colour, font=_font())
    if word.style in ("new", "gone"):
        line = y + (SIZE + 3 if word.style == "new" else SIZE * 2 // 3)
        canvas.line((x, line, x + wide, line), fill=colour, width=2 if word.style == "new" else 1)


def _width(text: str) -> float:
    return _font().getlength(_drawable(text))


def _drawable(text: str) -> str:
    """Pillow without FreeType has only a bitmap font, which refuses what is not Latin-1."""
    return text if isinstance(_font(), ImageFont.FreeTypeFont) else text.encode("latin-1", "replace").decode("latin-1")


@cache
def _font() -> Any:
    return ImageFont.load_default(SIZE)
