"""`evaluate`: files, one embedding for all benchmarks, all missing things in one message, every rank."""

from __future__ import annotations

import io
import json
from functools import partial

import pytest
from rich.console import Console

from clipkit.errors import UserError
from clipkit.evaluation.result import Result
from clipkit.evaluation.run import evaluate, print_results
from tests.evaluation.fakes import Constant, Random, picture, write_benchmark
from tests.ranks import run_ranks


@pytest.fixture
def own(tmp_path):
    return write_benchmark(tmp_path / "own")


def second(path):
    """Another benchmark on the same rows."""
    other = path.with_name("other.yaml")
    other.write_text(path.read_text().replace("name: own", "name: other"))
    return other


def test_files_and_round_trip(own, tmp_path):
    path, oracle = own
    (result,) = evaluate(oracle, benchmarks=[path], out=tmp_path / "results", model_name="oracle", show=False)
    files = list((tmp_path / "results").iterdir())
    assert [file.name for file in files] == ["own.json"]
    read = Result.read(files[0])
    assert (read.model, read.n, read.headline) == ("oracle", 60, "accuracy/micro")
    assert read.score.value == result.score.value
    assert read.to_json() == files[0].read_text()
    tree = json.loads(files[0].read_text())
    assert {"benchmark", "kind", "version", "n", "metrics", "by_category", "baselines", "tie", "items"} <= tree.keys()
    assert tree["metrics"]["accuracy/micro"].keys() == {"value", "low", "high", "n", "chance"}
    assert tree["protocol"].keys() >= {"benchmark_sha256", "rows_sha256", "clipkit"}


def test_not_a_result(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="not a clipkit result file"):
        Result.read(tmp_path / "x.json")


def test_each_picture_and_text_is_embedded_once_for_all_benchmarks(own):
    path, _ = own
    model = Random()
    # The rows lie in one source, so both benchmarks name the same pictures.
    for name in ("own", "other"):
        text = path.read_text().replace("rows: [rows.jsonl]", "rows: ['src:rows.jsonl']")
        (path.parent / f"{name}2.yaml").write_text(text.replace("name: own", f"name: {name}"))
    files = [path.parent / "own2.yaml", path.parent / "other2.yaml"]
    results = evaluate(model, benchmarks=files, roots={"src": path.parent}, show=False)
    assert results[0].metrics == results[1].metrics
    assert len(model.seen) == len(set(model.seen))


def test_everything_missing_in_one_message(own, tmp_path):
    path, _ = own
    (path.parent / "pictures" / "0.png").unlink()
    with pytest.raises(UserError) as error:
        evaluate(Random(), benchmarks=[path, second(path), "cifar10", "flickr8k_order"], show=False)
    message = str(error.value)
    assert "own: 1 of 84 pictures are missing: 1 of ./own" in message
    assert "other: 1 of 84 pictures are missing" in message
    assert "cifar10: source cifar10 (CIFAR-10 test pictures" in message
    assert "flickr8k_order: source bench (clipkit bench convert flickr8k_order" in message
    assert "--root SOURCE=FOLDER_OR_TAR" in message and "--allow-missing" in message
    (result,) = evaluate(Random(), benchmarks=[path], allow_missing=True, show=False)
    assert result.n == 59


def test_nothing_named():
    with pytest.raises(UserError, match="name a suite"):
        evaluate(Random())


def test_suite_of_zero_shot_sets(tmp_path):
    for name in ("daisy", "dandelion", "roses", "sunflowers", "tulips"):
        (tmp_path / "flowers5" / name).mkdir(parents=True)
        picture(len(name)).save(tmp_path / "flowers5" / name / "a.png")
    (tmp_path / "suites.yaml").write_text("flowers: [flowers5]\n")
    suite = f"{tmp_path}/suites.yaml:flowers"
    (result,) = evaluate(Constant(), suite, roots={"*": tmp_path}, show=False)
    assert (result.benchmark, result.n, result.score.value) == ("flowers5", 5, 0.0)


def test_table(own, capsys):
    path, oracle = own
    (path.parent / "pictures" / "0.png").unlink()
    results = evaluate(oracle, benchmarks=[path], allow_missing=True, model_name="oracle")
    assert "accuracy/micro" in capsys.readouterr().out
    console = Console(file=io.StringIO(), width=80)
    print_results(results, console)
    text = console.file.getvalue()
    assert "100.0" in text and "chance" in text and "coverage 98.3%, missing pictures: 1 of ./own" in text
    assert max(map(len, text.splitlines())) <= 80


def _on_ranks(path, out, rank, world):
    (result,) = evaluate(Random(), benchmarks=[path], out=out, show=False, batch_size=4)
    return result.to_json()


def test_all_ranks_hold_the_result_and_one_writes(own, tmp_path):
    path, _ = own
    alone = _on_ranks(path, None, 0, 1)
    assert run_ranks(partial(_on_ranks, path, tmp_path / "results"), 2) == [alone, alone]
    assert (tmp_path / "results" / "own.json").read_text() == alone
