"""The page: from the headline down to single rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from importlib import resources

from clipkit.evaluation import pareto
from clipkit.evaluation.report import charts, examples, lines, protocol, training
from clipkit.evaluation.report.lines import Line
from clipkit.evaluation.report.runs import Compared, Run, compare
from clipkit.evaluation.report.tables import chip, metric_table, table
from clipkit.evaluation.report.words import KINDS, NONE, is_rank, label, listed, number, plain, verdict
from clipkit.evaluation.result import Metric
from clipkit.html import Html, document, el, join

ASSETS = resources.files("clipkit.evaluation.report") / "assets"
MOST_BARS = 24
"""Categories shown as bars; of more, those that differ or fail most."""


def page(runs: Sequence[Run]) -> str:
    """The whole HTML file."""
    names, benchmarks = [run.name for run in runs], compare(list(runs))
    title, script = f"{listed(names)}: clipkit report", (ASSETS / "report.js").read_text()
    body = join(_header(runs, benchmarks), el("main", _sections(runs, benchmarks, names)))
    return document(title, body, style=(ASSETS / "report.css").read_text(), script=script)


def _header(runs: Sequence[Run], benchmarks: Sequence[Compared]) -> Html:
    names, now = [run.name for run in runs], datetime.now().astimezone()
    date = el("time", f"{now:%Y-%m-%d %H:%M %Z}", datetime=now.isoformat(timespec="minutes"))
    count = f"{len(benchmarks)} {'benchmark' if len(benchmarks) == 1 else 'benchmarks'}"
    return el(
        "header",
        el("h1", "Report: ", [[", " if n else "", chip(names, n)] for n in range(len(names))]),
        el("p", date, f" · {count} · clipkit", class_="quiet"),
        class_="page",
    )


def _sections(runs: Sequence[Run], benchmarks: Sequence[Compared], names: Sequence[str]) -> list[Html]:
    found = [
        ("Results", "results", _results(benchmarks, names) if benchmarks else None),
        ("Recognition and composition", "tradeoff", _tradeoff(benchmarks, names)),
        *((b.any.title, b.anchor, _benchmark(b, names)) for b in benchmarks),
        ("Training", "training", training.section(runs)),
        ("Settings", "settings", training.settings(runs)),
        ("Protocol", "protocol", protocol.section(benchmarks, names) if benchmarks else None),
    ]
    shown = [part for part in found if part[2]]
    links = [el("li", el("a", title, href=f"#{anchor}")) for title, anchor, _ in shown]
    parts = [el("section", el("h2", title), body, id=anchor) for title, anchor, body in shown]
    return [el("nav", el("ul", links), aria_label="Contents"), *parts]


def _results(benchmarks: Sequence[Compared], names: Sequence[str]) -> Html:
    shown = lines.headlines(benchmarks)
    caption = "Headline of every benchmark, in percent"
    drawn = [line for line in shown if not is_rank(line.key)]
    return join(
        _summary(shown, names),
        charts.radar("Headlines, in percent", _named_by_benchmark(drawn), names),
        charts.bars("Headlines.", drawn, names),
        metric_table(caption, ["benchmark", "metric"], shown, names),
        protocol.warnings(benchmarks),
        _how_to_read(names),
    )


def _named_by_benchmark(shown: Sequence[Line]) -> list[Line]:
    """The first line of every benchmark."""
    return list({line.labels[0]: line for line in reversed(shown)}.values())[::-1]


def _summary(shown: Sequence[Line], names: Sequence[str]) -> Html | None:
    """One sentence for every run but the first."""
    corrected = lines.adjusted(shown)
    items = []
    for run in range(len(names) - 1):
        changes = [(line.changes[run], corrected.get((place, run))) for place, line in enumerate(shown)]
        count = Counter(verdict(change, p)[1] for change, p in changes if change and p is not None)
        said = f" against {names[0]}: better in {count['better']}, worse in {count['worse']}, "
        tested = f"no clear difference in {count['no clear difference']} of {count.total()} tested lines."
        items.append(el("p", el("b", chip(names, run + 1)), said + tested, class_="summary"))
    return join(items) if items else None


def _how_to_read(names: Sequence[str]) -> Html:
    points = [
        "Numbers are percent of rows judged right, the range beside is the 95 % interval (Wilson; cluster bootstrap "
        "where rows share a picture or parts are averaged).",
        "Chance is what random similarities give. Blind is the best of the baselines that cannot understand: shorter "
        "text, fewer words, the text nearest to the mean picture, pictures exchanged. A number near blind says little.",
    ]
    if len(names) > 1:
        points.append(
            f"Differences are against {names[0]}, in points, on the rows that both runs have, with a paired interval. "
            "▲ better and ▼ worse at the 5 % level; ≈ no clear difference. p is of the exact McNemar test for "
            "independent rows judged right or wrong, else of a paired cluster bootstrap, corrected by Holm over "
            "all tests of the same table."
        )
    return el("details", el("summary", "How to read this"), el("ul", (el("li", point) for point in points)))


def _tradeoff(benchmarks: Sequence[Compared], names: Sequence[str]) -> Html | None:
    """The Pareto picture: the means of the zero-shot and of the compositional headlines that all runs have."""
    full = [b for b in benchmarks if all(b.results)]
    axes = [[b for b in full if b.any.kind == kind] for kind in ("zeroshot", "compositional")]
    if not all(axes) or len(names) == 1:
        return None
    points = [_means_of(axes, run) for run in range(len(names))]
    said = [f"{listed([b.any.title for b in axis])}" for axis in axes]
    text = (
        f"To the right: zero-shot accuracy, the mean of {said[0]}. "
        f"Upwards: compositional accuracy, the mean of {said[1]}. Upper right is better; whiskers are 95 % intervals. "
        "A step up is compositional gain, a step to the left zero-shot loss: what hard negatives add in height should "
        "not cost width. The dashed line joins the runs that no other beats in both."
    )
    picture = charts.scatter(
        "Zero-shot against compositional accuracy", ("zero-shot →", "compositional ↑"), points, names
    )
    places = [pareto.Point(x.value, y.value) for x, y in points]
    heads = ["run", "zero-shot", "compositional", "zero-shot changes", "compositional changes", "beaten by"]
    rows = [
        [names[run], *_means(points, run), _said([n for n, p in zip(names, places) if p.beats(places[run])])]
        for run in range(len(names))
    ]
    figures = table(f"Means in percent; changes against {names[0]} in points", heads, rows)
    return join(el("div", picture, el("p", text, class_="quiet"), class_="beside"), figures)


def _means(points: Sequence[tuple[Metric, Metric]], run: int) -> list[str]:
    """Both means, and how far they are from the first run's."""
    pairs = [(value.value, start.value) for value, start in zip(points[run], points[0])]
    changes = [f"{100 * (value - start):+.1f}" if run else NONE for value, start in pairs]
    return [*(f"{100 * value:.1f}" for value, _ in pairs), *changes]


def _said(names: Sequence[str]) -> str:
    return listed(names) if names else "none"


def _means_of(axes: Sequence[Sequence[Compared]], run: int) -> tuple[Metric, Metric]:
    recognition, composition = ([result for b in axis if (result := b.results[run])] for axis in axes)
    return pareto.mean(recognition), pareto.mean(composition)


def _reliability(benchmark: Compared, names: Sequence[str]) -> Html | None:
    found = [
        (run, result.details["calibration"])
        for run, result in enumerate(benchmark.results)
        if result and result.details.get("calibration", {}).get("bins")
    ]
    if not found:
        return None
    errors = listed([f"{100 * one['ece']:.1f} % in {names[run]}" for run, one in found])
    text = (
        "To the right: the probability of the class chosen, at the model's own scale. Upwards: how often that class is "
        "right. On the dashed line probabilities are true; below it the model is surer than it should be. The larger a "
        f"mark, the more pictures. Mean distance from the line (expected calibration error): {errors}."
    )
    picture = charts.reliability([(run, one["bins"]) for run, one in found], names)
    return join(el("h3", "Calibration"), el("div", picture, el("p", text, class_="quiet"), class_="beside"))


def _benchmark(benchmark: Compared, names: Sequence[str]) -> Html:
    categories, other = lines.categories(benchmark), lines.other_scores(benchmark)
    by_category = _by("category", categories, names)
    if len(categories) > MOST_BARS:
        by_category = _fold(f"All {len(categories)} categories", by_category)
    return join(
        _about(benchmark, names),
        metric_table("All metrics, in percent where they are shares", ["metric"], lines.metrics(benchmark), names),
        charts.radar("By category, in percent", categories, names),
        charts.bars("By category.", _telling(categories), names) if len(categories) > 1 else None,
        by_category,
        _fold("Other scores by category", _by("category", other, names)) if other else None,
        (_by(plain(name), lines.breakdown(benchmark, name), names) for name in benchmark.any.breakdowns),
        _baselines(benchmark, names),
        _reliability(benchmark, names),
        _confusions(benchmark, names),
        examples.section(benchmark, names),
    )


def _by(what: str, shown: Sequence[Line], names: Sequence[str]) -> Html | None:
    """Lines of (value of a field, score); a score that all share moves to the caption."""
    if len(shown) < 2:
        return None
    scores = {line.labels[1] for line in shown}
    if len(scores) > 1:
        return metric_table(f"By {what}, in percent", [what, "score"], shown, names)
    alone = [replace(line, labels=line.labels[:1]) for line in shown]
    return metric_table(f"By {what}: {scores.pop()}, in percent", [what], alone, names)


def _fold(title: str, body: Html | None) -> Html:
    return el("details", el("summary", title), body)


def _telling(categories: Sequence[Line]) -> Sequence[Line]:
    """All categories, or of too many those where the runs differ most (one run: where it fails most)."""
    if len(categories) <= MOST_BARS:
        return categories

    def dull(line: Line) -> float:
        largest = max((abs(change.value) for change in line.changes if change), default=None)
        return min(m.value for m in line.metrics if m) if largest is None else -largest

    return sorted(categories, key=dull)[:MOST_BARS]


def _about(benchmark: Compared, names: Sequence[str]) -> Html:
    result = benchmark.any
    rates = [(r.tie.get("rate", 0.0), name) for r, name in zip(benchmark.results, names) if r]
    ties = [f"{100 * rate:.1f} % of rows in {name}" for rate, name in rates]
    facts = {
        "Kind": KINDS[result.kind],
        "Headline": label(result.headline),
        "Rows": f"{result.n:,}, version {result.version}",
        "Ties": f"{result.tie.get('rule')} ({result.tie.get('policy')} rule), {listed(ties)}",
        **_geometry(benchmark, names),
        "Note": result.about.get("note", ""),
        "Leakage": result.about.get("leakage", ""),
        "Licence": result.about.get("licence", ""),
        "Published numbers": "; ".join(dict.fromkeys(entry["source"] for entry in result.about.get("reference", []))),
    }
    said = [[el("dt", name), el("dd", text)] for name, text in facts.items() if text]
    return join(el("p", result.about.get("about", "")), el("dl", said))


def _geometry(benchmark: Compared, names: Sequence[str]) -> dict[str, str]:
    """What probabilities and embeddings are like, where the kind of benchmark tells."""
    details = [(r.details, name) for r, name in zip(benchmark.results, names) if r]
    calibrated = [f"{100 * d['calibration']['ece']:.1f} % in {name}" for d, name in details if "calibration" in d]
    spread = [
        f"{d['alignment']:.2f}, {d['uniformity']['pictures']:.2f}, {d['uniformity']['captions']:.2f}, "
        f"{d['modality_gap']:.2f} in {name}"
        for d, name in details
        if "modality_gap" in d
    ]
    said = {
        "Calibration error (probability of the class chosen against how often it is right)": calibrated,
        "Alignment of pairs, uniformity of pictures, of captions, modality gap": spread,
    }
    return {what: listed(found) for what, found in said.items() if found}


def _baselines(benchmark: Compared, names: Sequence[str]) -> Html | None:
    rows = [
        [f"{baseline['title']}", names[run], number(baseline["metrics"].get(result.headline), result.headline)]
        for run, result in enumerate(benchmark.results)
        if result
        for baseline in result.baselines.values()
    ]
    caption = f"Blind baselines: {label(benchmark.any.headline)}, in percent, ties as coin tosses"
    return _fold("Blind baselines", table(caption, ["baseline", "beside", "value"], rows)) if rows else None


def _confusions(benchmark: Compared, names: Sequence[str]) -> Html | None:
    rows = [
        [f"{pair['class']}", pair["taken_for"], names[run], pair["count"], f"{100 * pair['share']:.1f} %"]
        for run, result in enumerate(benchmark.results)
        if result
        for pair in result.details.get("confusions", [])
    ]
    heads = ["class", "taken for", "run", "pictures", "of the class"]
    return _fold("Commonest mistakes", table("Commonest mistakes", heads, rows)) if rows else None
