"""Every form: an oracle scores 1, a constant encoder 0, a random one chance; aggregates, coverage, baselines."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clipkit.errors import UserError
from clipkit.evaluation import benchmark as data
from clipkit.evaluation.compositional import prepare
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.roots import Roots
from tests.evaluation.fakes import FORMS, Constant, Random, write_benchmark


def run(path, model, tie="official", roots=None, allow_missing=False):
    roots = roots or Roots()
    task = prepare(data.load(path), roots, allow_missing)
    return task.score(Embedder(model, roots), tie)


def edit(path, **fields):
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items())
    path.write_text(path.read_text() + lines)


def test_oracle_is_right_in_every_form(tmp_path):
    path, oracle = write_benchmark(tmp_path / "own")
    for tie in ("strict", "half", "lenient"):
        result = run(path, oracle, tie)
        assert {name: metric.value for name, metric in result.metrics.items() if metric.value != 1.0} == {}
        assert {"accuracy/micro", "i2t/micro", "t2i/micro", "group/micro", "i2t_all/micro", "binary/micro"} <= set(
            result.metrics
        )
        assert result.metrics["auroc/micro"].value == 1.0
    assert result.headline == "accuracy/micro"
    assert all(item["correct"] == 1.0 for item in result.items)


def test_constant_encoder_scores_0_when_ties_are_wrong(tmp_path):
    path, _ = write_benchmark(tmp_path / "own")
    result = run(path, Constant(), "strict")
    assert {metric.value for metric in result.metrics.values()} == {0.0}
    assert result.tie == {"policy": "strict", "rule": "strict", "rate": 1.0, "by_score": result.tie["by_score"]}
    assert set(result.tie["by_score"].values()) == {1.0}
    assert {metric.value for metric in run(path, Constant(), "lenient").metrics.values()} == {1.0}
    halves = run(path, Constant(), "half")
    assert halves.by_category["choice"]["i2t"].value == pytest.approx(0.2)
    assert halves.by_category["pictures"]["t2i"].value == 0.5


def test_random_encoder_scores_chance(tmp_path):
    path, _ = write_benchmark(tmp_path / "own", per_form=120)
    result = run(path, Random())
    for name, metric in result.metrics.items():
        # Three standard errors: a dozen correlated intervals of 95 % need not all hold.
        slack = 0.27 * (metric.high - metric.low)
        assert metric.low - slack <= metric.chance <= metric.high + slack, name
    for category, scores in result.by_category.items():
        assert scores, category


def test_official_tie_rule(tmp_path):
    path, _ = write_benchmark(tmp_path / "own", forms={"pair": [[1, 0]]})
    edit(path, official={"tie": "lenient"})
    result = run(path, Constant(), "official")
    assert result.score.value == 1.0
    assert (result.tie["policy"], result.tie["rule"]) == ("official", "lenient")


@pytest.mark.parametrize(
    ("form", "headline"),
    [("pair", "i2t/micro"), ("pictures", "t2i/micro"), ("winoground", "group/micro"), ("two_right", "i2t/micro")],
)
def test_headline_is_of_the_form(tmp_path, form, headline):
    path, oracle = write_benchmark(tmp_path / "own", forms={form: FORMS[form]})
    result = run(path, oracle)
    assert result.headline == headline
    assert "accuracy/micro" not in result.metrics


def test_aggregates(tmp_path):
    forms = {"swap_a": [[1, 0]], "swap_b": [[1, 0]], "add": [[1, 0]]}
    path, oracle = write_benchmark(tmp_path / "own", per_form=4, forms=forms)
    edit(
        path,
        aggregates={
            "swap": ["swap_a", "swap_b"],
            "both": {"mean": ["swap", "add"]},
            "nested": {"mean": ["both", "add"]},
            "seeds": {"over": "meta.seed"},
            "common": {"over": "category", "min_count": 5},
            "some": {"over": "category", "exclude": ["swap_a"]},
        },
        official={"headline": "i2t/both"},
    )
    # Wrong on purpose: all of swap_a, half of swap_b (its seed 1).
    for text in [t for t in oracle.truth if t.startswith("swap_a") or t in ("swap_b 1 text 0", "swap_b 3 text 0")]:
        if text.endswith("text 0"):
            wrong = text.replace("text 0", "text 1")
            oracle.truth[text], oracle.truth[wrong] = oracle.truth[wrong], oracle.truth[text]
    result = run(path, oracle)
    values = {name.removeprefix("i2t/"): metric.value for name, metric in result.metrics.items()}
    assert values["micro"] == pytest.approx(6 / 12)
    assert values["macro"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert values["swap"] == pytest.approx(0.25)
    assert values["both"] == pytest.approx(0.625)
    assert values["nested"] == pytest.approx((0.625 + 1) / 2)
    assert values["seeds"] == pytest.approx((4 / 6 + 2 / 6) / 2)
    assert values["some"] == pytest.approx(0.75)
    assert "common" not in values
    assert result.score is result.metrics["i2t/both"]
    assert result.breakdowns["meta.seed"]["1"]["i2t"].value == pytest.approx(2 / 6)
    assert {m.n for m in result.by_category["swap_a"].values()} == {4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aggregates": {"swap": ["swap_objekt"]}}, "own: aggregates.swap: no swap_objekt; did you mean swap_object"),
        ({"aggregates": {"all": {"mean": ["none"]}}}, "own: aggregates.all: no none"),
        ({"official": {"headline": "i2t/mikro"}}, "official.headline: no metric i2t/mikro; did you mean i2t/micro"),
    ],
)
def test_unknown_names(tmp_path, fields, message):
    path, oracle = write_benchmark(tmp_path / "own", forms={"swap_object": [[1, 0]]})
    edit(path, **fields)
    with pytest.raises(UserError, match=message):
        run(path, oracle)


def test_stated_chance(tmp_path):
    path, oracle = write_benchmark(tmp_path / "own", forms={"pair": [[1, 0]], "choice": [[1, 0, 0, 0]]})
    edit(path, chance={"pair": 0.6})
    result = run(path, oracle)
    assert result.by_category["pair"]["i2t"].chance == pytest.approx(0.6)
    assert result.metrics["i2t/macro"].chance == pytest.approx((0.6 + 0.25) / 2)


def test_missing_pictures(tmp_path):
    path, oracle = write_benchmark(tmp_path / "own", forms={"pair": [[1, 0]], "pictures": [[0], [1]]})
    for number in (0, 1, 6):
        (path.parent / "pictures" / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"3 of 18 pictures are missing: 3 of \./own"):
        run(path, oracle)
    result = run(path, oracle, allow_missing=True)
    assert result.n == 12 - 3
    assert result.coverage == {"share": 0.75, "rows": 12, "missing": {"./own": 3}}
    for picture in (path.parent / "pictures").iterdir():
        picture.unlink()
    with pytest.raises(UserError, match="no row is left of 12"):
        run(path, oracle, allow_missing=True)


def test_rows_marked_invalid_are_left_out(tmp_path):
    path, oracle = write_benchmark(tmp_path / "own", forms={"pair": [[1, 0]]})
    rows = path.parent / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[0]["valid"] = False
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    assert run(path, oracle).n == 5


def test_blind_baselines_find_what_gives_the_answer_away(tmp_path):
    path, oracle = write_benchmark(tmp_path / "own", forms={"pair": [[1, 0]], "other": [[1, 0]]})
    rows = path.parent / "rows.jsonl"
    rows.write_text(rows.read_text().replace('text 1"]', 'text 1 which is longer"]'))
    result = run(path, Random())
    shorter = result.baselines["shorter_text"]
    assert shorter["metrics"]["i2t/micro"] == 1.0 and shorter["by_category"]["pair"]["i2t"] == 1.0
    assert result.baselines["fewer_words"]["metrics"]["i2t/micro"] == 1.0
    # The oracle sees nothing of use in other pictures; a mean picture is near all right texts.
    blind = run(path, oracle).baselines
    assert blind["shuffled_pictures"]["metrics"]["i2t/micro"] == 0.5
    assert blind.keys() == {"shorter_text", "fewer_words", "text_prior", "shuffled_pictures"}


def test_pictures_shared_by_rows_widen_the_interval(tmp_path):
    path, _ = write_benchmark(tmp_path / "own", per_form=80, forms={"pair": [[1, 0]]})
    alone = run(path, Random()).score
    rows = path.parent / "rows.jsonl"
    lines = [json.loads(line) | {"cluster": str(n // 20)} for n, line in enumerate(rows.read_text().splitlines())]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    assert run(path, Random()).score.value == alone.value
    assert run(path, Random()).score != alone


def test_items_and_examples(tmp_path):
    path, oracle = write_benchmark(tmp_path / "own", per_form=12)
    oracle.truth["pair 0 text 0"], oracle.truth["pair 0 text 1"] = set(), oracle.truth["pair 0 text 0"]
    result = run(path, oracle)
    items = {item["id"]: item for item in result.items}
    assert items["pair/0"]["correct"] == 0.0 and items["pair/1"]["correct"] == 1.0
    assert items["winoground/0"]["decisions"] == dict.fromkeys(("accuracy", "group", "i2t", "t2i"), 1.0)
    assert np.shape(items["winoground/0"]["scores"]) == (2, 2)
    assert len(result.examples) == 16 and any(example["id"] == "pair/0" for example in result.examples)
    for example in result.examples:
        assert len(example["pictures"]) == len(example["scores"]) == len(example["match"])
        assert example["pictures"][0].startswith("data:image/jpeg;base64,")
        if example["form"] in ("i2t", "group"):
            right = [line[chosen] == 1 for line, chosen in zip(example["match"], example["choice"])]
            assert all(right) == (example["correct"] == 1.0)
    json.loads(result.to_json())


def test_equal_texts_and_pictures_are_a_tie_wherever_they_stand(tmp_path):
    # Five of these texts are the same string: whatever the batch, their similarities must be equal to the last bit.
    path, _ = write_benchmark(tmp_path / "own", per_form=50, forms={"choice": [[1, 0, 0, 0, 0]]})
    rows = path.parent / "rows.jsonl"
    lines = [json.loads(line) | {"texts": ["the same"] * 5} for line in rows.read_text().splitlines()]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    result = run(path, Random())
    assert (result.score.value, result.tie["rate"]) == (0.0, 1.0)


def test_crops_belong_to_the_row(tmp_path):
    path, _ = write_benchmark(tmp_path / "own", forms={"pair": [[1, 0]]})
    rows = path.parent / "rows.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines = [line | {"images": [{"path": "pictures/0.png", "bbox": [n, 0, 5, 5]}]} for n, line in enumerate(lines)]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    model = Random()
    run(path, model)
    assert len({key for key in model.seen if len(key) == 64}) == 6
