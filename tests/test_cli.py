from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main
from PIL import Image

import clipkit
from clipkit import cli
from clipkit import config as configuration
from clipkit.commands.tables import check_tables
from tests.typed import run, well, wrong

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} picture\nall of it is {name}\n")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from clipkit.model.load import build, save
    from clipkit.settings import ModelConfig

    folder = tmp_path_factory.mktemp("model")
    tiny = configuration.load("debug").model.model_dump() | {"embed_dim": 16}
    save(build(ModelConfig.model_validate(tiny)).eval(), folder)
    return folder


# help and errors


def commands(group: Any, *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*above, name), command
        if hasattr(command, "commands"):
            yield from commands(command, *above, name)


def test_every_command_explains_itself_and_its_options() -> None:
    found = dict(commands(typer.main.get_command(cli.app)))
    assert {("train",), ("eval",), ("zeroshot",), ("shards", "build"), ("negatives", "make"), ("bench", "list")} <= set(
        found
    )
    for words, command in found.items():
        assert command.help, words
        for option in command.params:
            assert option.help, f"{' '.join(words)}: {option.name} has no help"
    assert "..." not in "".join(well("--help").splitlines(keepends=True)[2:])


def test_the_version() -> None:
    assert well("--version").strip() == f"clipkit {clipkit.__version__}"


def test_a_users_mistake_is_one_message_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("sed: 1")
    done = run("config", "check", tmp_path / "x.yaml")
    assert done.status == 2 and done.out == ""
    assert done.err == "x.yaml:\n  sed: no such setting; did you mean seed?\n"


@pytest.mark.parametrize(("raised", "status"), [(KeyboardInterrupt(), 130), (RuntimeError("ours"), 1)])
def test_interrupts_and_our_own_errors(monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(configuration, "load", fail)
    done = run("config", "check", "debug")
    assert done.status == status
    if status == 1:
        assert done.exception is raised


def test_the_exit_status_of_a_real_process(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(clipkit.__file__).parent.parent)}
    command = [sys.executable, "-m", "clipkit", "config", "check", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("nothing: no such file") and "Traceback" not in done.stderr


# config, train, demo


def test_config_show_fills_everything_in(tmp_path: Path) -> None:
    shown = well("config", "show", "debug", "optim.lr=0.5")
    (tmp_path / "again.yaml").write_text(shown)
    assert configuration.load(tmp_path / "again.yaml") == configuration.load("debug", ["optim.lr=0.5"])


def test_config_schema_is_json() -> None:
    assert "optim" in json.loads(well("config", "schema"))["properties"]


def test_config_check_counts_the_steps() -> None:
    assert "20 steps of 32 pairs, into runs/debug" in well("config", "check", "debug")


@pytest.mark.parametrize(
    ("words", "restarts", "resume"), [((), "0", False), (("--resume",), "0", True), ((), "2", True)]
)
def test_train_hands_the_checked_config_on(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], restarts: str, resume: bool
) -> None:
    from clipkit.training import loop

    calls = []
    monkeypatch.setattr(loop, "train", lambda config, *, resume: calls.append((config, resume)))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    well("train", "debug", "data.train=[]", *words, "seed=7")
    assert calls == [(configuration.load("debug", ["data.train=[]", "seed=7"]), resume)]


def test_train_refuses_settings_and_shards_before_anything_else(tmp_path: Path) -> None:
    assert "did you mean seed?" in wrong("train", "debug", "sed=7")
    assert "nothing.tar: no such" in wrong("train", "debug", f"data.train=[{tmp_path}/nothing.tar]")
    (tmp_path / "empty.tar").write_bytes(b"")
    assert "empty.tar" in wrong("train", "debug", f"data.train=[{tmp_path}/empty.tar]")


def test_demo_settings_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from clipkit import demo

    calls = []
    monkeypatch.setattr(demo, "run", lambda out, **settings: calls.append((out, settings)))
    well("demo", "--out", tmp_path, "--pictures", "64", "samples=64")
    assert calls == [(tmp_path, {"pictures": 64, "settings": ("samples=64",)})]


# shards, negatives, world


def test_a_folder_becomes_shards(pictures: Path, tmp_path: Path) -> None:
    said = well("shards", "build", pictures, "--out", tmp_path, "--per-shard", "2", "--name", "train")
    assert said.splitlines()[-1] == f"2 shards in {tmp_path}, read as folder"
    assert sorted(p.name for p in tmp_path.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]

    found = json.loads(well("shards", "index", tmp_path / "*.tar", "--json", "-"))
    assert found["samples"] == 3
    assert well("shards", "index", tmp_path / "*.tar").splitlines()[-1] == "all\t3"
    assert "3 pairs in 2 shards, all readable" in well("shards", "check", tmp_path / "*.tar")

    pair = json.loads(well("shards", "show", tmp_path / "*.tar", "--start", "1"))
    assert pair["captions"] == ["a green picture", "all of it is green"] and pair["picture"] == "40x30"
    assert "there are fewer" in wrong("shards", "show", tmp_path / "*.tar", "--start", "3")
    assert "overwrite" in wrong("shards", "build", pictures, "--out", tmp_path, "--name", "train")


def test_build_checks_the_formats_own_settings(pictures: Path, tmp_path: Path) -> None:
    words = ("shards", "build", pictures, "--out", tmp_path)
    problems = wrong(*words, "--set", "caption=x.csv", "--set", "missing=maybe").splitlines()
    assert problems[0] == "--set:" and len(problems) == 3
    assert "caption: no such setting; did you mean captions?" in problems[1]
    assert "no source called foldr; did you mean folder?" in wrong(*words, "--from", "foldr")


def test_check_names_what_is_wrong(pictures: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in {"a.png": b"no picture", "a.txt": b"text", "b.txt": b"alone"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    done = run("shards", "check", tmp_path / "x.tar", "--json", tmp_path / "found.json")
    assert done.status == 2 and "2 problems" in done.err
    tables = [table.splitlines() for table in done.out.split("\n\n")]
    assert tables[0][0] == "problem\ttimes\tshards" and set(tables[0][1:]) == {
        "unreadable picture\t1\t1",
        "missing picture\t1\t1",
    }
    assert tables[1][1] == f"{tmp_path / 'x.tar'}\t1\t1 missing picture, 1 unreadable picture"
    assert tables[2][1] == "x.tar/b\tmissing picture"
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["samples"] == 1 and found["usable"] == 0
    assert sum(found["reasons"].values()) == 2


def test_the_worst_of_many_shards_are_listed() -> None:
    problems = {f"{n}.tar": {"samples": 9, "problems": {"empty caption": n} if n else {}} for n in range(30)}
    found = {"reasons": {"empty caption": 435}, "shards": problems, "examples": {"empty caption": [["a", "b"]]}}
    reasons, shards, _ = check_tables(found)
    assert reasons.rows == [("empty caption", 435, 29)]
    assert shards.title == "the worst 20 of 29 shards with problems"
    assert len(shards.rows) == 20 and shards.rows[0] == ("29.tar", 9, "29 empty caption")


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> Path:
    well("shards", "build", pictures, "--out", tmp_path / "shards")
    return tmp_path / "shards"


def test_stats_are_a_table_and_json(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkit.data.pace.PAIRS", 64)
    said = well("shards", "stats", shards, "--workers", "1", "--json", tmp_path / "stats.json")
    counts, distributions, *_ = (table.splitlines() for table in said.split("\n\n"))
    assert "pairs\t3\t1 shards, 0.0 MB" in counts and "captions\t6\t2.00 a pair" in counts
    assert any(line.startswith("seconds an epoch") and "estimated from" in line for line in counts)
    assert distributions[0].split("\t") == ["", "mean", "least", "q5", "q50", "q95", "q99", "greatest"]
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found["pairs"] == 3 and found["pictures"]["formats"] == {"PNG": 3}
    sampled = well("shards", "stats", shards, "--sample", "2", "--seed", "4", "--workers", "1")
    assert "  looked at\t2\ta sample, seed 4" in sampled


def test_nouns_become_tags_and_tags_a_vocabulary(shards: Path, tmp_path: Path) -> None:
    assert "no pair has tags" in wrong("shards", "tags", shards, "--out", tmp_path / "tags.txt")
    said = well("shards", "nouns", shards, "--out", tmp_path / "tagged", "--workers", "1")
    assert said.startswith(f"1 shards in {tmp_path / 'tagged'}: 3 tags for 3 pairs, 0 of them without; 3 are words")
    words = ("shards", "tags", tmp_path / "tagged", "--out", tmp_path / "tags.txt", "--top", "5")
    found = json.loads(well(*words, "--json", "-"))
    assert found == {"pairs": 3, "tagged": 3, "words": 1, "kept": {"picture": 3}, "share": 1.0}
    assert "is there already" in wrong(*words)
    lines = well(*words, "--overwrite").splitlines()
    assert lines[:2] == ["word\tpictures", "picture\t3"] and "1 of 1 words in" in lines[2]


def test_show_writes_contact_sheets(shards: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "new" / "sheet.html", tmp_path / "sheet.png"
    said = well("shards", "show", shards, "--html", page, "--png", picture, "--random", "1", "-n", "2")
    assert said.splitlines() == [f"2 pairs in {page}", f"2 pairs in {picture}"]
    assert page.read_text().count("<article") == 2
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
    well("shards", "show", shards, "--html", page)
    assert page.read_text().count("<article") == 3


def test_names_and_texts_that_no_output_takes(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in {
            "a.png": b"none",
            "a.json": b'{"captions": ["half \\ud800 of"]}',
            "caf\udce9.txt": b"x",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    done = run("shards", "check", tmp_path / "x.tar", "--json", tmp_path / "found.json")
    assert done.status == 2 and "x.tar/caf?" in done.out and "caf?" in (tmp_path / "found.json").read_text()
    assert json.loads(well("shards", "show", tmp_path / "x.tar"))["problem"].startswith("broken json: half a surrogate")


def test_show_draws_as_training_does(shards: Path) -> None:
    words = ("shards", "show", shards, "--train", "debug", "--set", "batch_size=2", "-n", "2")
    first = well(*words)
    assert first == well(*words, "--step", "0") != well(*words, "--step", "1")
    pair = json.loads(well(*words[:-2], "--step", "3"))
    assert pair["drawn"]["picture"] == "64x64" and pair["drawn"]["caption"] in pair["captions"]
    assert pair["drawn"]["step"] == 3
    assert "belong to --train" in wrong("shards", "show", shards, "--step", "1")
    assert "belong to --train" in wrong("shards", "show", shards, "--set", "seed=1")
    assert "batch_size: 32 is more than the 3" in wrong("shards", "show", shards, "--train", "debug")


def bag_of(text: str) -> str:
    return " ".join(sorted(text.lower().replace(".", " ").split()))


def test_negatives_are_made_beside_the_captions(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    well("shards", "build", pictures, "--out", tmp_path / "plain")
    shards = str(tmp_path / "plain" / "*.tar")
    well(
        "negatives",
        "make",
        shards,
        "--out",
        tmp_path / "made",
        "--kinds",
        "reshuffle,replace_adjectives",
        "--per-kind",
        "2",
    )
    pair = json.loads(well("shards", "show", tmp_path / "made"))
    kinds = {negative["kind"] for negatives in pair["negatives"] for negative in negatives}
    assert kinds and kinds <= {"reshuffle", "replace_adjectives"}
    message = wrong("negatives", "make", shards, "--out", tmp_path / "other", "--kinds", "reshufle")
    assert "did you mean reshuffle?" in message
    found = json.loads(well("negatives", "audit", tmp_path / "made", "--json", "-", "--html", tmp_path / "page.html"))
    counts = {name: kind["count"] for name, kind in found["kinds"].items()}
    assert counts.pop("all") == sum(counts.values()) > 0
    assert "reshuffle" in (tmp_path / "page.html").read_text()
    assert "--out DIR belongs to" in wrong("negatives", "audit", tmp_path / "made", "--balance", "0.65")

    numbers: dict[str, int] = {}  # to this guide the same words in any order are one text
    guide = SimpleNamespace(
        embed_texts=lambda texts: torch.eye(200)[[numbers.setdefault(bag_of(t), len(numbers)) for t in texts]]
    )
    monkeypatch.setattr("clipkit.model.load.load", lambda ref: guide)
    well("negatives", "audit", tmp_path / "made", "--guide", "any", "--out", tmp_path / "left")
    left = json.loads(well("negatives", "audit", tmp_path / "left", "--json", "-"))["kinds"]
    assert left["replace_adjectives"]["count"] == counts["replace_adjectives"]
    assert left.get("reshuffle", {"count": 0})["count"] < counts["reshuffle"]


def test_world_settings_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from clipkit.data.world import build

    calls = []

    def build_world(out: Path, **settings: Any) -> dict[str, Any]:
        calls.append((out, settings))
        return {"counts": {"train": 5, "eval/dev": {"rows": 2, "pictures": 1}}}

    monkeypatch.setattr(build, "build_world", build_world)
    said = well(
        "world",
        "build",
        tmp_path,
        "--pictures",
        "5",
        "--seed",
        "3",
        "--size",
        "48",
        "--eval-rows",
        "2",
        "--drawn-negatives",
        "4",
    )
    assert calls == [
        (tmp_path, {"pictures": 5, "seed": 3, "size": 48, "eval_rows": 2, "drawn_negatives": 4, "overwrite": False})
    ]
    assert said.splitlines() == ["part\tholds", "train\t5 pairs", "eval/dev\t2 rows 1 pictures"]


def test_export_writes_a_model_that_loads_again(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "alone"
    assert well("export", model, "--to", "clipkit", "--out", out) == f"{out}: clipkit, embeds as {model}\n"
    assert sorted(file.name for file in out.iterdir()) == ["model.json", "model.safetensors"]
    assert "is there already" in wrong("export", out, "--to", "open_clip", "--out", out)
    assert "holds no teacher" in wrong("export", model, "--teacher", "--to", "clipkit", "--out", tmp_path / "other")


# zeroshot, eval, bench


def test_zeroshot_ranks_the_classes_of_each_picture(model: Path, pictures: Path, tmp_path: Path) -> None:
    words = ("zeroshot", model, pictures / "red.png", "--classes", "red, green,blue", "--top", "2")
    lines = well(*words).splitlines()
    assert lines[0] == "picture\tclass\t2." and len(lines) == 2
    (found,) = json.loads(well(*words, "--json", "-"))
    assert found["image"] == str(pictures / "red.png")
    assert len(found["classes"]) == 2 and found["classes"][0]["probability"] >= found["classes"][1]["probability"]
    assert {answer["class"] for answer in found["classes"]} <= {"red", "green", "blue"}


def test_zeroshot_takes_folders_globs_lists_and_files(model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    (tmp_path / "templates.txt").write_text("{} things.\n")
    classes = ("--classes-file", tmp_path / "classes.txt", "--templates", tmp_path / "templates.txt", "--json", "-")
    names = sorted(str(p) for p in pictures.glob("*.png"))
    for images, stdin in ((pictures, None), (pictures / "*.png", None), ("-", "\n".join(names) + "\n\n")):
        found = json.loads(well("zeroshot", model, images, *classes, stdin=stdin))
        assert [picture["image"] for picture in found] == names


def test_zeroshot_writes_a_table_and_goes_on_with_it(model: Path, pictures: Path, tmp_path: Path) -> None:
    words = (
        "zeroshot",
        model,
        pictures,
        "--classes",
        "red,green",
        "--none-below",
        "2",
        "--out",
        tmp_path / "found.csv",
    )
    assert "there already\t0" in well(*words)
    lines = (tmp_path / "found.csv").read_text().splitlines()
    assert len(lines) == 4 and all(line.split(",")[1] == "none of these" for line in lines[1:])
    assert "there already\t3" in well(*words)
    assert "--out and --json: give one of them" in wrong(*words, "--json", "-")
    assert "holds answers of another model" in wrong(*words[:-4], "--out", tmp_path / "found.csv")


def test_zeroshot_wants_one_kind_of_classes(model: Path, pictures: Path) -> None:
    assert "give one of --classes" in wrong("zeroshot", model, pictures)
    assert "give one of --classes" in wrong("zeroshot", model, pictures, "--classes", "a", "--dataset", "cifar10")


@pytest.fixture
def benchmark(pictures: Path, tmp_path: Path) -> Path:
    rows = [
        {
            "id": name,
            "category": "colour",
            "images": [{"src": "here", "path": f"{name}.png"}],
            "texts": [f"a {name} picture", "something else"],
            "match": [[1, 0]],
        }
        for name in COLOURS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "colours.yaml").write_text(
        "name: colours\nkind: compositional\nversion: '1'\ntitle: Colours\n"
        "sources: {here: {about: three pictures}}\nrows: [rows.jsonl]\n"
    )
    return tmp_path / "colours.yaml"


def test_eval_writes_results(model: Path, pictures: Path, benchmark: Path, tmp_path: Path) -> None:
    words = ("eval", model, "--benchmark", benchmark, "--root", f"here={pictures}", "--out", tmp_path / "results")
    (result,) = json.loads(well(*words, "--json", "-"))
    assert result["benchmark"] == "colours" and result["n"] == 3
    assert json.loads((tmp_path / "results" / "colours.json").read_text()) == result
    assert "colours" in well(*words)


def test_compare_puts_runs_side_by_side(model: Path, pictures: Path, benchmark: Path, tmp_path: Path) -> None:
    for run_name in ("plain", "other"):
        words = ("eval", model, "--benchmark", benchmark, "--root", f"here={pictures}")
        well(*words, "--out", tmp_path / run_name / "results")
    report = tmp_path / "report.html"
    assert well("compare", tmp_path / "plain", tmp_path / "other", "--out", report).strip() == str(report)
    page = report.read_text()
    assert "plain" in page and "other" in page and "Colours" in page
    (tmp_path / "empty").mkdir()
    assert "empty" in wrong("compare", tmp_path / "empty", "--out", report)


def test_eval_says_what_is_missing(model: Path, benchmark: Path) -> None:
    assert "here" in wrong("eval", model, "--benchmark", benchmark)
    assert "name a --suite or a --benchmark" in wrong("eval", model)
    assert "--root here: is written NAME=VALUE" in wrong("eval", model, "--benchmark", benchmark, "--root", "here")


def test_a_runs_results_lie_in_the_run(tmp_path: Path) -> None:
    from clipkit.evaluation.forgetting import run_of

    last = tmp_path / "run" / "checkpoints" / "step_00000001"
    last.mkdir(parents=True)
    for model in (tmp_path / "run", last):
        assert run_of(str(model)) == tmp_path / "run"
    assert run_of("ViT-B-32:openai") is None


def test_bench_check_reads_rows_and_finds_pictures(pictures: Path, benchmark: Path) -> None:
    said = well("bench", "check", benchmark, "--root", f"here={pictures}")
    assert said.splitlines()[1] == "colours\t3\t3\t0\t4"


def test_bench_check_counts_rows_without_pictures(benchmark: Path) -> None:
    done = run("bench", "check", benchmark)
    assert done.status == 2 and done.out.splitlines()[1] == "colours\t3\t3\t3\t4"
    assert "colours: 3 of 3 pictures are missing: 3 of here (three pictures)" in done.err


def test_bench_get_says_how_else_annotations_are_got(tmp_path: Path) -> None:
    message = wrong("bench", "get", "winoground", "--out", tmp_path)
    assert "no plain address serves its annotations" in message and "facebook/winoground" in message


def test_bench_list_names_every_packaged_benchmark() -> None:
    from clipkit.evaluation.benchmark import packaged

    listed = json.loads(well("bench", "list", "--json", "-"))
    assert {b["name"] for b in listed["benchmarks"]} == set(packaged())
    assert "world_shape" in listed["suites"]["world"]


def test_bench_convert_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert "did you mean sugarcrepe?" in wrong("bench", "convert", "sugarcrep", tmp_path, "--out", tmp_path)
    message = wrong("bench", "convert", "flickr8k_order", tmp_path, "--out", tmp_path, "--set", "seed=many")
    assert 'seed: should be a whole number, got "many"' in message
