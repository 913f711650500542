"""Example rows with their pictures, and what each run made of them.

Runs pick their examples by themselves; where one lacks another's example, its scores or answer come from its items.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipkit.evaluation.report.runs import Compared
from clipkit.evaluation.report.tables import chip
from clipkit.evaluation.report.words import listed, plain
from clipkit.html import Html, el, join

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
OPEN = 3
"""Examples of a group that are seen at once; the others can be unfolded."""


@dataclass
class Judged:
    """A run's view of an example: what it was shown and the scores it gave, or only how it ended."""

    run: int
    correct: float
    content: dict[str, Any] | None = None
    """pictures, texts, match."""
    scores: list[list[float]] | None = None
    """images × texts."""
    note: str = ""


@dataclass
class Example:
    """One row and every run's view of it."""

    id: str
    category: str
    form: str
    judged: list[Judged]
    worst: bool = False
    """Whether it is among those that some run has furthest wrong."""

    @property
    def right(self) -> tuple[int, ...]:
        """The runs that have it right."""
        return tuple(j.run for j in self.judged if j.correct == 1)


def collect(benchmark: Compared) -> list[Example]:
    """All examples of all runs, each with every run's view."""
    bases = {e["id"]: e for result in reversed(benchmark.results) if result for e in result.examples}
    items = [{i["id"]: i for i in result.items if i["id"] in bases} if result else {} for result in benchmark.results]
    own = [{e["id"]: e for e in result.examples} if result else {} for result in benchmark.results]
    out = []
    for name, base in bases.items():
        views = [_judged(run, base, own[run].get(name), items[run].get(name)) for run in range(len(own))]
        worst = any(e[name].get("worst") for e in own if name in e)
        out.append(Example(name, base["category"], base["form"], [view for view in views if view], worst))
    return out


def section(benchmark: Compared, names: Sequence[str]) -> Html | None:
    """The examples, those that the runs judge differently first."""
    groups: dict[tuple[int, ...], list[Example]] = defaultdict(list)
    everything = collect(benchmark)
    for example in everything:
        if not example.worst:
            groups[example.right].append(example)
    everyone = [run for run, result in enumerate(benchmark.results) if result]
    order = sorted(groups, key=lambda right: (right == tuple(everyone), not right, [-run for run in right]))
    worst = [example for example in everything if example.worst]
    parts = [_group("Furthest wrong", worst, names)] if worst else []
    parts += [_group(_outcome(right, everyone, names), groups[right], names) for right in order]
    return join(el("h3", "Examples"), _legend(), parts) if parts else None


def _group(title: str, examples: Sequence[Example], names: Sequence[str]) -> Html:
    shared_first = sorted(examples, key=lambda example: sum(j.scores is None for j in example.judged))
    cards = [_card(example, names) for example in shared_first]
    rest = el("summary", f"{len(cards) - OPEN} more"), el("div", cards[OPEN:], class_="cards")
    return join(
        el("h4", f"{title} ({len(cards)})"),
        el("div", cards[:OPEN], class_="cards"),
        el("details", rest) if cards[OPEN:] else None,
    )


def _outcome(right: tuple[int, ...], everyone: Sequence[int], names: Sequence[str]) -> str:
    several = len(everyone) > 1
    if list(right) == list(everyone):
        return "Right in all runs" if several else "Right"
    if not right:
        return "Wrong in all runs" if several else "Wrong"
    return f"Right only in {listed([names[run] for run in right])}"


def _legend() -> Html:
    return el(
        "p",
        "Similarities of picture and text; ",
        el("b", "✓"),
        " the model's choice, right; ",
        el("b", "✗"),
        " its choice, wrong; ",
        el("b", "="),
        " a tie of right and wrong; ",
        el("b", "○"),
        " the right answer, not chosen; underlined: a right pair. "
        "Furthest wrong: a wrong answer lies highest above the right one. All others are a seeded selection, wrong "
        "answers preferred: not the rates of the tables.",
        class_="quiet",
    )


def _judged(run: int, base: dict[str, Any], own: dict[str, Any] | None, item: dict[str, Any] | None) -> Judged | None:
    if own:
        return Judged(run, own["correct"], _content(own), own["scores"])
    if item is None:
        return None
    if "scores" in item:
        return Judged(run, item["correct"], _content(base), item["scores"])
    if item["correct"] == 1:
        return Judged(run, 1.0)
    chosen = f"chose {item['choice']}; " if "choice" in item else ""
    note = f"({chosen}right answer at place {item['rank']:g})" if "rank" in item else ""
    return Judged(run, item["correct"], note=note)


def _content(example: dict[str, Any]) -> dict[str, Any]:
    return {key: example[key] for key in ("pictures", "texts", "match")}


def _card(example: Example, names: Sequence[str]) -> Html:
    verdicts = [
        el("li", chip(names, j.run), " ", _verdict(j.correct), f" {j.note}" if j.note else None) for j in example.judged
    ]
    head = el(
        "header",
        el("span", "" if example.category == "all" else plain(example.category), class_="category"),
        el("ul", verdicts, class_="verdicts"),
    )
    views: list[list[Judged]] = []
    for judged in example.judged:
        if judged.scores is None:
            continue
        same = next((view for view in views if view[0].content == judged.content), None)
        if same:
            same.append(judged)
        else:
            views.append([judged])
    return el("article", head, _body(example, views, names), el("footer", example.id), class_="card")


def _verdict(correct: float) -> Html:
    sign, word, kind = ("✓", "right", "good") if correct == 1 else ("✗", "wrong", "bad")
    if 0 < correct < 1:
        sign, word, kind = "=", "tie", ""
    return el("span", f"{sign} {word}", class_=f"verdict {kind}")


def _body(example: Example, views: list[list[Judged]], names: Sequence[str]) -> list[Html]:
    first = views[0][0].content or {}
    pictures, texts = first["pictures"], first["texts"]
    if example.form == "binary":
        return [_pictures(first), el("p", texts[0], class_="text"), _says(views[0], names)]
    if len(pictures) == 1 and all(view[0].content["pictures"] == pictures for view in views if view[0].content):
        return [_pictures(first), *(_choice_of_text(view, names) for view in views)]
    if example.form == "t2i" and len(texts) == 1:
        return [el("p", texts[0], class_="text"), *(_choice_of_picture(view, names) for view in views)]
    grids = [_grid(judged, example.form, names) for view in views for judged in view]
    return [_pictures(first, lettered=True), _numbered(texts), *grids]


def _pictures(content: dict[str, Any], lettered: bool = False) -> Html:
    figures = []
    for number, source in enumerate(content["pictures"]):
        name = f"Picture {LETTERS[number]}" if lettered else "Picture"
        caption = el("figcaption", LETTERS[number]) if lettered else None
        figures.append(el("figure", _image(source, name, content, number), caption))
    return el("div", figures, class_="pictures")


def _image(source: str, name: str, content: dict[str, Any], number: int) -> Html:
    right = [text for text, match in zip(content["texts"], content["match"][number]) if match == 1]
    described = f"{name}: {'; '.join(right)}" if right else f"{name}; none of the texts is right"
    return el("img", src=source, alt=described, loading="lazy")


def _says(view: Sequence[Judged], names: Sequence[str]) -> Html:
    lines = []
    for judged in view:
        truth = bool(judged.content and judged.content["match"][0][0] == 1)
        said = {0.0: not truth, 1.0: truth}.get(judged.correct)
        answer = "undecided" if said is None else f"says {'true' if said else 'false'}"
        lines.append(el("li", chip(names, judged.run), f" {answer} at ", _score(judged.scores, 0, 0)))
    return el("ul", el("li", f"The text is {'true' if truth else 'false'}."), lines, class_="says")


def _choice_of_text(view: Sequence[Judged], names: Sequence[str]) -> Html:
    """Texts as lines, a column of scores for every run."""
    content = view[0].content or {}
    signs = [_signs(judged.scores[0] if judged.scores else [], content["match"][0]) for judged in view]
    heads = [el("th", "text", scope="col"), *(el("th", chip(names, j.run), scope="col") for j in view)]
    rows = [
        el("tr", el("th", text, scope="row"), (_scored(j, 0, t, sign[t]) for j, sign in zip(view, signs)))
        for t, text in enumerate(content["texts"])
    ]
    return el("table", el("thead", el("tr", heads)), el("tbody", rows), class_="scores")


def _choice_of_picture(view: Sequence[Judged], names: Sequence[str]) -> Html:
    """Pictures side by side, under each the scores of the runs."""
    content, figures = view[0].content or {}, []
    match = [line[0] for line in content["match"]]
    signs = [_signs([line[0] for line in judged.scores or []], match) for judged in view]
    for number, source in enumerate(content["pictures"]):
        scores = [
            el("span", chip(names, j.run), " ", _sign(sign[number]), _score(j.scores, number, 0), class_="under")
            for j, sign in zip(view, signs)
        ]
        right = "the text is right" if match[number] == 1 else "the text is wrong"
        image = el("img", src=source, alt=f"Picture {LETTERS[number]}; {right} of it", loading="lazy")
        figures.append(el("figure", image, el("figcaption", scores)))
    return el("div", figures, class_="pictures")


def _numbered(texts: Sequence[str]) -> Html:
    return el("ol", (el("li", text) for text in texts), class_="text")


def _grid(judged: Judged, form: str, names: Sequence[str]) -> Html:
    """Texts × pictures, with each picture's text below and each text's picture beside, as far as the form asks."""
    content, scores = judged.content or {}, judged.scores or []
    match, pictures, texts = content["match"], range(len(scores)), range(len(content["texts"]))
    columns, lines = form in ("group", "i2t"), form in ("group", "t2i")
    heads = [el("th", chip(names, judged.run), scope="col"), *(el("th", LETTERS[i], scope="col") for i in pictures)]
    rows = []
    for t in texts:
        cells = [el("td", _score(scores, i, t), class_="aim" if match[i][t] == 1 else None) for i in pictures]
        picked = _picked([scores[i][t] for i in pictures], [match[i][t] for i in pictures], LETTERS) if lines else None
        rows.append(el("tr", el("th", f"text {t + 1}", scope="row"), cells, el("td", picked) if picked else None))
    if lines:
        heads.append(el("th", "picks", scope="col"))
    if columns:
        numbers = [str(t + 1) for t in texts]
        picks = [el("td", _picked(scores[i], match[i], numbers)) for i in pictures]
        rows.append(el("tr", el("th", "picks text", scope="row"), picks, el("td") if lines else None))
    return el("table", el("thead", el("tr", heads)), el("tbody", rows), class_="scores grid")


def _picked(scores: Sequence[float], match: Sequence[int | None], called: Sequence[str]) -> Html:
    signs = _signs(scores, match)
    chosen = next(n for n, sign in enumerate(signs) if sign in ("✓", "✗", "="))
    return join(_sign(signs[chosen]), called[chosen])


def _signs(scores: Sequence[float], match: Sequence[int | None]) -> list[str]:
    """A sign for each answer: chosen and right or wrong, tied, right but not chosen."""
    judged = [score for score, m in zip(scores, match) if m is not None]
    chosen = next(n for n, (score, m) in enumerate(zip(scores, match)) if m is not None and score == max(judged))
    tied = {m for score, m in zip(scores, match) if m is not None and score == max(judged)} == {0, 1}
    signs = ["○" if m == 1 else "" for m in match]
    signs[chosen] = "=" if tied else "✓" if match[chosen] == 1 else "✗"
    return signs


def _scored(judged: Judged, picture: int, text: int, sign: str) -> Html:
    return el("td", _sign(sign), _score(judged.scores, picture, text), class_="chosen" if sign in ("✓", "✗") else None)


def _sign(sign: str) -> Html:
    said = {"✓": "chosen, right", "✗": "chosen, wrong", "=": "tie", "○": "right, not chosen"}.get(sign)
    kind = {"✓": "good", "✗": "bad", "○": "missed"}.get(sign, "")
    return el("span", sign, class_=f"sign {kind}", role="img" if said else None, aria_label=said, title=said)


def _score(scores: list[list[float]] | None, picture: int, text: int) -> Html:
    return el("span", f"{scores[picture][text]:.3f}" if scores else "", class_="score")
