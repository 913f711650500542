"""A contact sheet as HTML: cards that fill the width of the window, thumbnails embedded."""

from __future__ import annotations

import base64
import json
from importlib import resources

from PIL import Image

from clipkit.data.build import encode_jpeg
from clipkit.data.sheet.pairs import Drawn, Negative, Sheet, Shown, size_of
from clipkit.data.sheet.words import bytes_of, changes, printable
from clipkit.html import Html, document, el, join

THUMBNAIL = 384
"""Longest side in pixels: twice what is shown, for screens with fine pixels."""
QUALITY = 85


def page(sheet: Sheet) -> str:
    """The whole HTML file."""
    count = [f"{kind} {times}" for kind, times in sheet.kinds().items()]
    unusable = sum(bool(pair.problem) for pair in sheet.pairs)
    header = el(
        "header",
        el("h1", printable(sheet.title)),
        el("p", printable(sheet.about), class_="quiet"),
        el("p", "Negatives by kind: ", printable(", ".join(count)), ".") if count else None,
        _legend() if count else None,
        el("p", f"{unusable} of these pairs cannot be used.", class_="problem") if unusable else None,
    )
    style = (resources.files("clipkit.data.sheet") / "sheet.css").read_text()
    cards = el("main", [_card(pair) for pair in sheet.pairs], class_="cards")
    return document(f"{printable(sheet.title)}: clipkit", join(header, cards), style=style)


def _legend() -> Html:
    new, gone = el("mark", "marked"), el("del", "struck out")
    return el("p", "In a negative, words that differ from its caption are ", new, ", words it leaves out ", gone, ".")


def _card(pair: Shown) -> Html:
    drawn = pair.drawn
    return el(
        "article",
        el("header", el("b", f"{pair.id}"), " ", el("span", printable(pair.where), class_="where")),
        el("p", f"⚠ {printable(pair.problem)}", class_="problem") if pair.problem else None,
        el("p", printable(pair.note), class_="quiet") if pair.note else None,
        _figure(drawn.picture if drawn else pair.picture, pair),
        _row(drawn, pair) if drawn else _captions(pair),
        _facts(pair),
        class_="card",
    )


def _figure(picture: Image.Image | None, pair: Shown) -> Html | None:
    if picture is None:
        return None
    return el("img", src=_thumbnail(picture), alt=printable(next(filter(None, pair.captions), "")), loading="lazy")


def _thumbnail(picture: Image.Image) -> str:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return f"data:image/jpeg;base64,{base64.b64encode(encode_jpeg(small, QUALITY)).decode()}"


def _captions(pair: Shown) -> Html | None:
    """All captions as they are stored, each with its negatives."""
    items = [_caption(pair, c) for c in range(len(pair.captions))]
    return el("ol", items, class_="texts") if items else None


def _caption(pair: Shown, c: int) -> Html:
    text = pair.captions[c]
    return el("li", _text(text) if text else el("i", "empty"), _negatives(text, pair.negatives_of(c)))


def _row(drawn: Drawn, pair: Shown) -> Html:
    """The caption that was drawn with its negatives and positives; the others below."""
    others = [text for text in pair.captions if text and text not in (drawn.caption, *drawn.positives)]
    return join(
        el("ul", el("li", el("b", _text(drawn.caption)), _negatives(drawn.caption, drawn.negatives)), class_="texts"),
        _list("Positives:", drawn.positives),
        _list("Not drawn:", others),
    )


def _list(headline: str, texts: list[str]) -> Html | None:
    return el("div", headline, el("ul", [el("li", _text(text)) for text in texts]), class_="quiet") if texts else None


def _negatives(caption: str, negatives: list[Negative]) -> Html | None:
    return el("ul", [_negative(caption, negative) for negative in negatives], class_="negatives") if negatives else None


def _negative(caption: str, negative: Negative) -> Html:
    tags = {"same": "span", "new": "mark", "gone": "del"}
    words = [(el(tags[how], word), " ") for word, how in changes(caption, negative["text"])]
    rest = {key: value for key, value in negative.items() if key not in ("text", "kind")}
    kind = el("span", printable(str(negative.get("kind") or "")), class_="kind", title=_json(rest) if rest else None)
    return el("li", kind, " ", el("span", words, dir="auto", class_="text"))


def _text(text: str) -> Html:
    # A direction of its own: marks of right-to-left writing in a caption then turn nothing else.
    return el("span", printable(text), dir="auto", class_="text")


def _facts(pair: Shown) -> Html:
    sizes = [f"{suffix} {bytes_of(count)}" for suffix, count in pair.members.items()]
    facts = [size_of(pair.picture)] if pair.picture else []
    if pair.drawn:
        facts.append(f"seen as {size_of(pair.drawn.picture)}")
    facts += [f"group {printable(pair.group)}"] if pair.group is not None else []
    rest = el("details", el("summary", "more"), el("code", _json(pair.extra))) if pair.extra else None
    return el("footer", " · ".join([*facts, *sizes]), rest)


def _json(value: dict[str, object]) -> str:
    return printable(json.dumps(value, ensure_ascii=False))
