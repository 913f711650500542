"""Ending a run whose evaluations no longer get better: the rule by a loop, real runs, killed and resumed."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

import clipkit
from clipkit import config as configuration
from clipkit.errors import UserError
from clipkit.evaluation.pareto import Point
from clipkit.evaluation.result import Metric, Result
from clipkit.training import loop, stopping
from clipkit.training.stopping import Stopping

BENCHMARKS = {"own_pairs": "compositional", "own_classes": "zeroshot"}


def result(name: str, value: float) -> Result:
    metrics = {"top": Metric(value, value, value, 10), "median_rank": Metric(10 * value, 1, 9, 10)}
    return Result(name, BENCHMARKS[name], "1", name, 10, "top", metrics, {}, [])


def planted(places: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluations that give these pairs of (recognition, composition) one after the other; what has been asked for."""
    asked: list[int] = []

    def evaluate(*_: object, **__: object) -> list[Result]:
        recognition, composition = places[len(asked)]
        asked.append(len(asked))
        return [result("own_pairs", composition), result("own_classes", recognition)]

    monkeypatch.setattr(loop, "evaluate", evaluate)
    known(monkeypatch)
    return asked


def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both benchmarks are in the suite."""

    class Named:
        def __init__(self, name: str) -> None:
            self.name, self.kind = name, BENCHMARKS[name]

    monkeypatch.setattr(stopping.benchmark, "suite", lambda name: list(BENCHMARKS))
    monkeypatch.setattr(stopping.benchmark, "load", Named)
    monkeypatch.setattr(loop, "check_suite", lambda suite, roots: None)


def run(tree: dict, resume: bool = False) -> Path:
    return loop.train(configuration.validate(tree), resume=resume)


@pytest.fixture
def tree(tiny_tree: dict) -> dict:
    """20 steps, evaluated after every second one."""
    batch = tiny_tree["batch_size"]
    stop = {"metric": "pareto", "patience": 2}
    return tiny_tree | {
        "samples": 20 * batch,
        "evaluate_every": 2 * batch,
        "suite": "own",
        "stop": stop,
        "log_every": 1,
    }


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_no_better_twice_in_a_row_ends_the_run(tree: dict, monkeypatch: pytest.MonkeyPatch):
    places = [(0.8, 0.5), (0.7, 0.6), (0.75, 0.55), (0.7, 0.6), (0.6, 0.4), (0.9, 0.9)]
    asked = planted(places, monkeypatch)
    folder = run(tree)
    assert [line["better"] for line in lines(folder)] == [True, True, True, False, False] and len(asked) == 5
    assert [line["step"] for line in lines(folder)] == [0, 2, 4, 6, 8]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in log) == 8
    assert [line["evaluation"]["own_pairs"] for line in log if "evaluation" in line] == [c for _, c in places[:5]]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000008"]
    best = json.loads((folder / "best" / "model.json").read_text())["evaluation"]
    assert best == {"step": 2, "values": [0.7, 0.6]}
    assert clipkit.load(folder / "best").embed_texts(["a red wall"]).shape[0] == 1
    assert run(tree, resume=True) == folder and len(asked) == 5  # it stays over


def test_killed_and_resumed_it_ends_as_if_never_killed(tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed between a checkpoint and the evaluation after the same step, and again two steps later."""
    places = [(0.8, 0.5), (0.7, 0.6), (0.75, 0.55), (0.7, 0.6), (0.6, 0.4)]
    tree |= {"save_every": tree["evaluate_every"]}
    planted(places, monkeypatch)
    whole = run(tree | {"out": str(tmp_path / "whole")})
    tree |= {"out": str(tmp_path / "killed")}
    asked = planted(places, monkeypatch)
    judge = Stopping.judge
    for step in (4, 6):

        def killed(self: Stopping, at: int, results: list[Result], model: object, step: int = step) -> None:
            if at == step:
                asked.pop()
                raise KeyboardInterrupt
            judge(self, at, results, model)  # type: ignore[arg-type]

        monkeypatch.setattr(Stopping, "judge", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tree, resume=(tmp_path / "killed" / "checkpoints").exists())
        assert max(line["step"] for line in lines(tmp_path / "killed")) == step - 2
    monkeypatch.setattr(Stopping, "judge", judge)
    folder = run(tree, resume=True)
    for name in ("evaluations.jsonl", "best/model.json"):
        assert (folder / name).read_text() == (whole / name).read_text()
    for name in ("best", "checkpoints/step_00000008"):
        one, other = (load_file(place / name / "model.safetensors") for place in (folder, whole))
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def evaluated(folder: Path) -> list[int]:
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in log if "evaluation" in line]


@pytest.mark.parametrize(("every", "steps"), [(20, [20]), (8, [8, 16, 20]), (5, [5, 10, 15, 20])])
@pytest.mark.parametrize("metric", ["", "own_classes"])
def test_the_last_step_is_evaluated_once(
    tree: dict, metric: str, every: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
):
    """With a metric to stop by, what there was before the first step too; nothing more when it is taken up again."""
    asked = planted([(0.1 * n, 0.5) for n in range(6)], monkeypatch)
    tree |= {"evaluate_every": every * tree["batch_size"], "stop": {"metric": metric}}
    folder = run(tree)
    expected = [0, *steps] if metric else steps
    assert evaluated(folder) == expected and len(asked) == len(expected)
    if metric:
        assert [line["step"] for line in lines(folder)] == expected
        assert json.loads((folder / "best" / "model.json").read_text())["evaluation"]["step"] == 20
    run(tree, resume=True)
    assert evaluated(folder) == expected and len(asked) == len(expected)


@pytest.mark.parametrize("metric", ["", "own_classes"])
def test_killed_in_its_last_evaluation_a_run_makes_up_for_it(tree: dict, metric: str, monkeypatch: pytest.MonkeyPatch):
    tree |= {"evaluate_every": tree["samples"], "stop": {"metric": metric}}
    places = [(0.5, 0.5)] if metric else []
    planted(places, monkeypatch)  # and no more: the last evaluation raises
    with pytest.raises(IndexError):
        run(tree)
    planted([(0.6, 0.5)], monkeypatch)
    assert evaluated(run(tree, resume=True)) == ([0, 20] if metric else [20])


@pytest.mark.parametrize(
    ("old", "new"), [("own_pairs", "pareto"), ("pareto", "own_pairs"), ("own_pairs", "own_pairs:median_rank")]
)
def test_another_metric_is_refused_at_resume(tree: dict, old: str, new: str, monkeypatch: pytest.MonkeyPatch):
    planted([(0.1 * n, 0.1 * n) for n in range(11)], monkeypatch)
    folder = run(tree | {"stop": {"metric": old}, "samples": tree["evaluate_every"]})
    assert {line["metric"] for line in lines(folder)} == {old}
    before = {name: (folder / name).read_text() for name in ("config.yaml", "evaluations.jsonl")}
    said = f"judged by {old}, and stop.metric is {new}; resume with stop.metric={old}, or start a new run"
    with pytest.raises(UserError, match=re.escape(said)):
        run(tree | {"stop": {"metric": new}}, resume=True)
    assert before == {name: (folder / name).read_text() for name in before}
    run(tree | {"stop": {"metric": old}}, resume=True)


@pytest.mark.parametrize("metric", ["own_classes", "own_classes:median_rank"])
def test_one_metric(tree: dict, metric: str, monkeypatch: pytest.MonkeyPatch):
    """Of ranks less is better; an equal evaluation is no better."""
    values = [0.5, 0.6, 0.6, 0.59, 0.7]
    if metric.endswith("rank"):
        values = [1 - value for value in values]
    planted([(value, 0.0) for value in values], monkeypatch)
    folder = run(tree | {"stop": {"metric": metric, "patience": 2}})
    assert [line["better"] for line in lines(folder)] == [True, True, False, False]
    assert json.loads((folder / "best" / "model.json").read_text())["evaluation"]["step"] == 2


def test_the_rule_by_a_loop(tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Better: no earlier evaluation comes within `least` in both, and not too much zero-shot accuracy is lost."""
    known(monkeypatch)
    draw = random.Random(1)
    for least, most_loss in ((0.0, 1.0), (0.05, 1.0), (0.0, 0.2)):
        stop = {"metric": "pareto", "patience": 4, "least": least, "most_loss": most_loss}
        judge = Stopping(configuration.validate(tree | {"stop": stop}), tmp_path, 0)
        monkeypatch.setattr(stopping, "save", lambda *_, **__: None)
        places = [(draw.random(), draw.random()) for _ in range(40)]
        for n, (x, y) in enumerate(places):
            judge.judge(n, [result("own_pairs", y), result("own_classes", x)], None)  # type: ignore[arg-type]
            expected = x >= places[0][0] - most_loss
            for a, b in places[:n]:
                expected = expected and not (a + least >= x and b + least >= y)
            assert judge.lines[-1]["better"] == expected
        allowed = [place for place in places if place[0] >= places[0][0] - most_loss]
        assert Point(*places[judge.best]).composition == max(y for _, y in allowed)
        last = [line["better"] for line in judge.lines]
        assert judge.enough == (not any(last[-4:]))
        (tmp_path / "evaluations.jsonl").unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stop": {"metric": "own_pears"}},
            "stop.metric: own_pears is neither pareto nor in suite own; did you mean own_pairs",
        ),
        ({"stop": {"metric": "own_pairs:tip"}}, "stop.metric: own_pairs has no metric tip; did you mean top"),
        ({"stop": {"metric": "own_pairs"}, "evaluate_every": 0}, "stop.metric needs evaluate_every"),
        ({"stop": {"metric": "own_pairs", "most_loss": 0.1}}, "stop.most_loss: belongs to stop.metric: pareto"),
        ({"stop": {"least": 0.1}}, "stop.least: belongs to stop.metric, which is empty"),
    ],
)
def test_mistakes(tree: dict, changes: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    planted([(0.5, 0.5)], monkeypatch)
    with pytest.raises(UserError, match=re.escape(message)):
        run(tree | changes)


def test_pareto_needs_both_kinds(tree: dict, monkeypatch: pytest.MonkeyPatch):
    known(monkeypatch)
    monkeypatch.setattr(stopping.benchmark, "suite", lambda name: ["own_pairs"])
    with pytest.raises(
        UserError,
        match="stop.metric: pareto needs zero-shot and compositional benchmarks; suite own has no zeroshot one",
    ):
        run(tree)


@pytest.mark.parametrize("stop", [{}, {"metric": "world_dev_object"}])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "wrold"}, "suite: no suite called wrold; did you mean world?"),
        ({"suite": "nothing.yaml:mine"}, "suite: nothing.yaml: not a readable YAML file"),
        ({"suite": "world_dev"}, r"world_dev: source world .* has no root[\s\S]*roots=\{SOURCE: FOLDER_OR_TAR\}"),
        ({"suite": "world_dev", "roots": {"world": "nowhere"}}, "roots: world=nowhere: no such folder or tar"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_training(tree: dict, stop: dict, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        run(tree | {"stop": stop} | changes)
    assert not Path(tree["out"].format(name="tiny")).exists()
