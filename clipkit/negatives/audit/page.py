"""An audit as one HTML file: the kinds in a table, then each with its cues and some negatives to look at."""

from __future__ import annotations

from importlib import resources

from clipkit.data.sheet.words import changes, printable
from clipkit.html import Html, document, el, join
from clipkit.negatives.audit import Audit, Kind, Sample
from clipkit.negatives.audit.balancing import Balance

COLUMNS = (
    "kind", "negatives", "captions with one", "words", "captions' words", "candidates kept", "AUC", "95 % interval",
    "told from its caption",
)  # fmt: skip
BALANCED = ("kind", "negatives", "left", "AUC", "AUC after", "95 % interval", "told", "told after", "note")
ABOUT = (
    "AUC is how often a classifier that sees texts only, none of them of the same picture, puts a negative above a "
    "caption: 0.5 where the text says nothing, 1 where the picture is not needed. The last column is the share of "
    "negatives it tells from their own caption."
)


def page(found: Audit, title: str, balanced: Balance | None = None) -> str:
    """The whole file."""
    about = f"{found.captions:,} captions of {found.pictures:,} pictures"
    header = el("header", el("h1", printable(title)), el("p", about, class_="quiet"), el("p", ABOUT))
    after = None
    if balanced:
        rows = [kind.row(name) for name, kind in balanced.kinds.items()]
        after = el("section", el("h2", "Balanced"), _table(BALANCED, rows))
    kinds = [_section(name, kind) for name, kind in found.kinds.items()]
    style = "".join(
        (resources.files(folder) / file).read_text()
        for folder, file in (("clipkit.data.sheet", "sheet.css"), ("clipkit.negatives.audit", "audit.css"))
    )
    body = join(header, _table(COLUMNS, found.rows()), after, _dropped(found), kinds)
    return document(f"{printable(title)}: negatives", body, style=style)


def _dropped(found: Audit) -> Html | None:
    """What the filters of `negatives make` left out, by kind."""
    rows = [
        (kind, count, reason)
        for kind, reasons in sorted(found.dropped.items())
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
    ]
    if not rows:
        return None
    return el("section", el("h2", "Candidates dropped"), _table(("kind", "candidates", "reason"), rows))


def _section(name: str, kind: Kind) -> Html:
    cues = [(cue.cue, f"{cue.negatives:.1%}", f"{cue.captions:.1%}") for cue in kind.cues]
    return el(
        "section",
        el("h2", printable(name)),
        el("h3", "The most telling words, pairs and lengths") if cues else None,
        _table(("cue", "negatives with it", "captions with it"), cues) if cues else None,
        el("h3", f"{len(kind.samples)} of {kind.count:,}, by chance"),
        el("ul", [_sample(sample) for sample in kind.samples], class_="texts"),
    )


def _sample(sample: Sample) -> Html:
    tags = {"same": "span", "new": "mark", "gone": "del"}
    words = [(el(tags[how], word), " ") for word, how in changes(sample.caption, sample.text)]
    caption = el("span", printable(sample.caption), dir="auto", class_="text")
    negative = el("span", words, dir="auto", class_="text")
    return el("li", caption, el("ul", el("li", negative), class_="negatives"))


def _table(columns: tuple[str, ...], rows: list[tuple]) -> Html:
    head = el("thead", el("tr", [el("th", column) for column in columns]))
    body = [el("tr", [el("td", printable(str(cell))) for cell in row]) for row in rows]
    return el("div", el("table", head, el("tbody", body)), class_="scroll", tabindex="0")
