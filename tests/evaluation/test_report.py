"""The report: its numbers, its markup, and its behaviour in a real browser."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from clipkit import html
from clipkit.errors import UserError
from clipkit.evaluation.report import charts, examples, lines, markdown_table, words, write_report
from clipkit.evaluation.report.lines import Line
from clipkit.evaluation.report.paired import Change, Pairing
from clipkit.evaluation.report.runs import compare, read_runs
from clipkit.evaluation.result import Metric
from clipkit.evaluation.stats import holm, mcnemar, paired_bootstrap
from tests.evaluation.report_runs import FORMS, HOSTILE, compositional, retrieval, write_run, zeroshot
from tests.markup import CHROMIUM, Markup
from tests.markup import browse as in_browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("runs")
    return [("clip", write_run(folder / "clip", 3)), (f"degla{HOSTILE}", write_run(folder / "degla", 8))]


@pytest.fixture(scope="module")
def report(runs: list[tuple[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("report") / "new" / "report.html")


@pytest.fixture(scope="module")
def page(report: Path) -> Markup:
    return Markup(report.read_text())


def test_elements_escape_everything_but_markup():
    made = html.el("td", "a<b", None, [html.el("b", "&"), "c"], class_="x", data_sort=0.5, hidden=True, title=None)
    assert made == '<td class="x" data-sort="0.5" hidden>a&lt;b<b>&amp;</b>c</td>'
    assert html.el("img", alt='"') == '<img alt="&quot;">'


def test_nothing_is_loaded_and_nothing_lies_beside(report: Path, page: Markup):
    assert sorted(p.name for p in report.parent.iterdir()) == [
        "report.csv",
        "report.html",
        "report.jsonl",
        "report.md",
    ]
    links = [a.get("src") or a.get("href") or "" for tag in ("img", "link", "script", "a") for a in page.all(tag)]
    assert all(link.startswith(("data:", "#")) for link in links if link)
    assert "default-src 'none'" in next(a["content"] or "" for a in page.all("meta") if a.get("http-equiv"))


def test_data_cannot_become_markup(report: Path, page: Markup):
    assert HOSTILE not in report.read_text() and len(page.all("script")) == 1
    assert HOSTILE in "".join(page.text)


def test_tables_and_pictures_are_described(page: Markup):
    assert len(page.all("table")) > 10
    assert sum(a.get("class") == "sortable" for a in page.all("table")) == len(page.all("caption"))
    assert all(a["alt"] for a in page.all("img")) and page.all("img")
    assert all(a.get("role") == "img" for a in page.all("svg")) and page.all("svg")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= set(ids)


def test_the_page_says_what_was_measured(page: Markup):
    text = "".join(page.text)
    measured = ("30.0", "80.0", "73.3", "62.5", "Famous B/32", "swap object", "mean of categories", "By seed", "R@1")
    known = ("data.negatives", "term igc", "Settings in which the runs differ", "0123456789ab", "Commonest mistakes")
    for wanted in measured + known:
        assert wanted in text
    assert "optim.lr" in text and text.index("optim.lr") > text.index("All settings")


def test_headline_lines(runs: list[tuple[str, Path]]):
    found = lines.headlines(compare(read_runs(runs)))
    assert [line.key for line in found] == ["accuracy/macro", "accuracy/swap", "top1", "t2i/r1", "i2t/r1"]
    first, swap = found[0], found[1]
    assert first.published == {"Famous B/32": 0.733} and first.chance == 0.5 and first.blind is not None
    assert swap.note == "rows of swap_object, swap_attribute" and swap.n == 60
    corrected = lines.adjusted(found)
    tests = {n: line.changes[0].p for n, line in enumerate(found) if line.changes[0]}
    assert corrected == {
        (int(n), 0): p for n, p in holm({str(n): p for n, p in tests.items() if p is not None}).items()
    }


def test_a_pooled_aggregate_is_tested_by_mcnemar():
    first, second = compositional(3), compositional(8)
    change = Pairing(first, second).metric("accuracy/swap")
    credits = [[i["correct"] for i in r.items if i["category"].startswith("swap")] for r in (first, second)]
    assert change is not None and change.test == "exact McNemar" and change.p == mcnemar(*credits).p
    assert change.value == pytest.approx(np.mean(credits[1]) - np.mean(credits[0]))


def test_a_mean_of_categories_is_tested_by_bootstrap():
    first, second = compositional(3), compositional(8)
    second.items = second.items[:-10]  # only shared rows count
    change = Pairing(first, second).metric("accuracy/macro")
    gaps = [
        np.mean([b["correct"] - a["correct"] for a, b in zip(first.items, second.items) if a["category"] == form])
        for form in FORMS
    ]
    assert change is not None and change.test == "paired bootstrap"
    assert change.value == pytest.approx(np.mean(gaps))
    assert change.low is not None and change.high is not None and change.low < change.value < change.high


def test_rows_that_share_a_cluster_are_tested_by_bootstrap():
    first, second = compositional(3), compositional(8)
    for result in (first, second):
        for n, item in enumerate(result.items):
            item["cluster"] = str(n // 2)
    change = Pairing(first, second).category("swap_object", "accuracy")
    rows = [(a["correct"], b["correct"], a["cluster"]) for a, b in zip(first.items, second.items)][:30]
    plain = paired_bootstrap(*zip(*rows))
    assert change is not None and change.test == "paired bootstrap" and change.value == pytest.approx(plain.value)


def test_metrics_without_rows_have_no_test():
    assert Pairing(retrieval(3), retrieval(5)).metric("i2t/median_rank") == Change(0.0)
    assert Pairing(zeroshot(3), zeroshot(5)).metric("mean_per_class") == Change(pytest.approx(0.2))
    assert Pairing(zeroshot(3), zeroshot(5)).metric("top5") is None
    first, second = retrieval(3), retrieval(5)
    for key, expected in (("t2i/r1", 0.2), ("t2i/r5", 0.0)):
        change = Pairing(first, second).metric(key)
        assert change is not None and change.value == pytest.approx(expected) and change.p is not None


def test_aggregates_of_aggregates_and_fields():
    first, second = compositional(3), compositional(8)
    spec = {"mean": ["swap", "truth"], "over": None, "min_count": 1, "exclude": []}
    over = {"mean": None, "over": "category", "min_count": 1, "exclude": ["truth"]}
    rest = {"mean": None, "over": "meta.relation", "min_count": 1, "exclude": []}
    for result in (first, second):
        result.about["aggregates"] |= {"both": spec, "without": over, "unknown": rest}
        result.metrics |= {f"accuracy/{name}": Metric(0.5, 0.4, 0.6, 90) for name in ("both", "without", "unknown")}
    gap = {
        form: np.mean([b["correct"] - a["correct"] for a, b in zip(first.items, second.items) if a["category"] == form])
        for form in FORMS
    }
    pairing = Pairing(first, second)
    found = {name: pairing.metric(f"accuracy/{name}") for name in ("both", "without", "unknown")}
    swap = (gap["swap_object"] + gap["swap_attribute"]) / 2
    assert found["both"] and found["both"].value == pytest.approx((swap + gap["truth"]) / 2)
    assert found["without"] and found["without"].value == pytest.approx(
        np.mean([gap[f] for f in FORMS if f != "truth"])
    )
    assert found["unknown"] == Change(0.0)


def test_examples_stand_side_by_side(runs: list[tuple[str, Path]]):
    benchmarks = compare(read_runs(runs))
    pairs, animals = examples.collect(benchmarks[0]), examples.collect(benchmarks[1])
    assert len({example.id for example in pairs}) == len(pairs) == 5 * len(FORMS)
    assert all(len(example.judged) == 2 and all(j.scores for j in example.judged) for example in pairs)
    only_first = next(example for example in animals if example.id.endswith("/0.jpg"))
    assert [j.correct for j in only_first.judged] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("scores", "match", "signs"),
    [
        ([0.2, 0.1], [1, 0], ["✓", ""]),
        ([0.1, 0.2, 0.3], [1, 0, None], ["○", "✗", ""]),
        ([0.2, 0.2], [0, 1], ["=", "○"]),
        ([0.3, 0.2, 0.3], [1, 0, 1], ["✓", "", "○"]),
    ],
)
def test_signs(scores: list[float], match: list[int | None], signs: list[str]):
    assert examples._signs(scores, match) == signs


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 100, [0, 20, 40, 60, 80, 100]), (0.1, 0.55, [0.1, 0.2, 0.3, 0.4, 0.5]), (0, 512000, [0, 200000, 400000])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_words():
    assert words.label("i2t/macro") == "picture → text, mean of categories"
    assert (words.signed(-0.051, "top1"), words.signed(1e-5, "top1"), words.signed(2, "median_rank")) == (
        "−5.1",
        "0.0",
        "+2.0",
    )
    assert words.verdict(Change(0.1), 0.01) == ("▲", "better") and words.verdict(Change(0.1), None) == ("", "")
    assert [words.short(v) for v in (12_000, 1.5e6, 0.0004)] == ["12k", "1.5M", "0.0004"]


def test_markdown(runs: list[tuple[str, Path]]):
    table = markdown_table([runs[0], ("b|c", runs[1][1])]).splitlines()
    assert table[0] == "| benchmark | metric | clip | b\\|c | b\\|c − clip | chance | n |"
    assert len(table) == 7 and table[2].count("72.0 (") == 0 and "▲ +50.0" in table[2]


def test_csv(report: Path):
    rows = list(csv.DictReader(report.with_suffix(".csv").read_text().splitlines()))
    swap = [r for r in rows if r["metric"] == "accuracy/swap"]
    assert [r["value"] for r in swap] == ["0.3", "0.8"] and {r["n"] for r in rows if r["field"] == "meta.seed"} == {
        "75"
    }
    assert {r["field"] for r in rows} == {"", "category", "meta.seed"}


def test_unlike_runs_are_pointed_out(runs: list[tuple[str, Path]], tmp_path: Path):
    text = write_report([runs[0], ("few", write_run(tmp_path / "few", 8, rows=25))], tmp_path / "r.html").read_text()
    assert "the runs differ in rows" in text and "covers 83.3 % of the benchmark" in text


def test_one_run_three_runs_and_training_alone(runs: list[tuple[str, Path]], tmp_path: Path):
    one = Markup(write_report(runs[:1], tmp_path / "one.html").read_text())
    assert "tested lines" not in "".join(one.text) and len(one.all("svg")) > 10
    shutil.copytree(runs[0][1], tmp_path / "bare", ignore=shutil.ignore_patterns("results"))
    three = [*runs, ("clip", tmp_path / "bare"), ("clip", runs[0][1])]
    text = "".join(Markup(write_report(three, tmp_path / "three.html").read_text()).text)
    assert "clip (2)" in text and "clip (3)" in text
    alone = "".join(Markup(write_report([("bare", tmp_path / "bare")], tmp_path / "bare.html").read_text()).text)
    assert "learning rate" in alone and "Protocol" not in alone


def test_many_categories_are_folded(tmp_path: Path):
    result = zeroshot(9)
    result.by_category = {f"class {n}": {"top1": Metric(n / 100, 0.0, 1.0, 10, 0.01)} for n in range(100)}
    result.save(tmp_path / "results")
    page = Markup(write_report([("a", tmp_path)], tmp_path / "r.html").read_text())
    assert "All 100 categories" in page.text
    shown = [a for a in page.all("svg") if a.get("class") == "track"]
    assert len(shown) == 1 + 24


def test_nothing_to_report_and_broken_results(tmp_path: Path):
    with pytest.raises(UserError, match="nothing to report"):
        write_report([("a", tmp_path)], tmp_path / "r.html")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x.json").write_text(json.dumps({"benchmark": "x"}))
    with pytest.raises(UserError, match=r"x\.json: not a clipkit result file"):
        write_report([("a", tmp_path)], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_every_row_with_what_each_run_made_of_it(report: Path, runs: list[tuple[str, Path]]):
    rows = [json.loads(line) for line in report.with_suffix(".jsonl").read_text().splitlines()]
    first, second = (
        {(r.benchmark, i["id"]): i["correct"] for r in run.results.values() for i in r.items} for run in read_runs(runs)
    )
    assert {(row["benchmark"], row["id"]) for row in rows} == first.keys() | second.keys()
    for row in rows:
        place = row["benchmark"], row["id"]
        expected = {"clip": first.get(place), f"degla{HOSTILE}": second.get(place)}
        assert row["correct"] == {name: value for name, value in expected.items() if value is not None}
    assert report.with_suffix(".md").read_text() == markdown_table(runs)


def test_radar_by_category():
    """Corners lie on the spokes, as far out as the share; what names share is left out."""
    found = [
        Line((f"World, part {n}", "top-1"), "top1", [Metric(v, v, v, 9) for v in values], [])
        for n, values in enumerate([(0.0, 1.0), (0.5, 0.25), (1.0, 0.75), (0.2, 0.4)])
    ]
    page = Markup(str(charts.radar("By category", found, ["a", "b"])))
    outlines = [a["points"] for a in page.all("polygon") if "curve" in (a["class"] or "")]
    corners = [[tuple(map(float, corner.split(","))) for corner in (points or "").split()] for points in outlines]
    middle = (230.0, 155.0)
    assert [round(math.dist(corner, middle) / 122, 2) for corner in corners[0]] == [0.0, 0.5, 1.0, 0.2]
    assert corners[1][0] == (230.0, 33.0) and corners[0][1] == (291.0, 155.0)  # upwards, then to the right
    assert "part 0" in page.text and "World, part 0, top-1" in page.text
    assert charts.radar("", found[:2], ["a", "b"]) is None and charts.radar("", found * 5, ["a", "b"]) is None
    holes = [replace(found[0], metrics=[None, found[0].metrics[1]]), *found[1:]]
    assert (
        sum("curve" in (a["class"] or "") for a in Markup(str(charts.radar("", holes, ["a", "b"]))).all("polygon")) == 1
    )


def test_reliability_shows_every_bin(page: Markup):
    said = [text for text in page.text if "% sure" in text]
    assert sum("45 % sure, 30 % right, n 20" in text for text in said) == 2  # one a run
    assert sum("85 % sure" in text and "n 40" in text for text in said) == 2
    assert any("expected calibration error" in text and "10.0 % in clip" in text for text in page.text)


def test_furthest_wrong_come_first(tmp_path: Path):
    result = compositional(3)
    result.examples[2]["worst"] = result.examples[7]["worst"] = True
    result.save(tmp_path / "results")
    text = "".join(Markup(write_report([("a", tmp_path)], tmp_path / "r.html").read_text()).text)
    assert "Furthest wrong (2)" in text and text.index("Furthest wrong (2)") < text.index("Wrong (")
    assert text.count(result.examples[2]["id"]) == 1


CHECKS = """
for (const head of document.querySelectorAll("th button")) { head.click(); head.click(); }
const table = document.querySelector("table.sortable"), heads = [...table.tHead.rows[0].cells];
const column = heads.findIndex((head) => head.textContent.includes("clip"));
const values = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.sort));
const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
const button = (n) => heads[n].querySelector("button");
button(column).click(); const falling = values();
button(column).click(); const rising = values();
button(0).click(); const sorted = names();
parent.postMessage({
  falling, rising, sorted, order: heads[0].getAttribute("aria-sort"),
  wide: document.documentElement.scrollWidth > innerWidth, width: innerWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  page: getComputedStyle(document.body).backgroundColor,
  pictures: [...document.images].every((i) => i.naturalWidth > 0),
}, "*");
"""


@pytest.fixture
def browse(report: Path, tmp_path: Path) -> Callable[..., str]:
    """Chromium's output for the report in a frame of some width."""
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    return partial(in_browser, report, CHECKS, tmp_path)


@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browse: Callable[..., str], width: int):
    markup = Markup(browse(width, "--dump-dom"))
    found = json.loads(markup.all("html")[0]["data-found"] or "")
    assert found["width"] == width and not found["wide"]
    assert found["rising"] == sorted(found["rising"]) == found["falling"][::-1] and len(set(found["rising"])) > 1
    assert found["order"] == "ascending" and found["sorted"] == sorted(found["sorted"])
    assert found["pictures"] and not found["dark"] and found["page"] == "rgb(255, 255, 255)"


def test_dark_in_a_browser(browse: Callable[..., str], tmp_path: Path):
    markup = Markup(browse(390, "--dump-dom", "--blink-settings=preferredColorScheme=0"))
    found = json.loads(markup.all("html")[0]["data-found"] or "")
    assert found["dark"] and found["page"] != "rgb(255, 255, 255)"
    browse(390, f"--screenshot={tmp_path / 'dark.png'}")
    assert (tmp_path / "dark.png").stat().st_size > 10_000
