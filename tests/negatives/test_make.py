from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clipkit.data.build import Sample, write_shard
from clipkit.data.shards import Index
from clipkit.errors import UserError
from clipkit.negatives.make import KINDS, SOURCE, Recipe, claim, make, negatives

CAPTIONS = [
    ["A man in a blue shirt throws a ball to a brown dog .", "A guy plays with his dog"],
    ["a small red circle is to the left of a big blue square"],
    ["Two girls sit on a wooden bench in a park .", "", "two children on a bench"],
]


def shard(path: Path, shift: int = 0) -> Path:
    samples = [
        Sample(f"pair{i}", bytes([255, 216, shift, i]), "jpg", captions, {"group": f"g{i}", "scene": {"x": [i]}})
        for i, captions in enumerate(CAPTIONS)
    ]
    write_shard(samples, path)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    (tmp_path / "in").mkdir()
    return [shard(tmp_path / "in" / f"s-{i}.tar", i) for i in range(2)]


def contents(path: Path) -> list[dict[str, bytes]]:
    index = Index.load(path)
    return [index.read(id) for id in range(len(index))]


def test_everything_else_is_kept(shards: list[Path], tmp_path: Path) -> None:
    report = make(shards, tmp_path / "out", workers=1, progress=False)
    for source in shards:
        for old, new in zip(contents(source), contents(tmp_path / "out" / source.name)):
            assert {k: v for k, v in new.items() if k != "json"} == {k: v for k, v in old.items() if k != "json"}
            sheet = json.loads(new["json"])
            made = sheet.pop("negatives")
            assert sheet == json.loads(old["json"])
            assert [bool(group) for group in made] == [bool(caption) for caption in sheet["captions"]]
            for negative in (n for group in made for n in group):
                assert set(negative) == {"text", "kind", "source", "seed"}
                assert negative["kind"] in KINDS and negative["source"] == "rule" and negative["seed"] == 0
    assert report.captions == 10 and report.shards == 2 and report.share == 1.0
    assert json.loads(json.dumps(report.to_json()))["kinds"]["reshuffle"] == 10
    assert report.rows()[-1][0] == "any"


def test_bytes_do_not_depend_on_workers(shards: list[Path], tmp_path: Path) -> None:
    reports = [make(shards, tmp_path / str(n), per_kind=2, workers=n, progress=False) for n in (1, 2)]
    for source in shards:
        assert (tmp_path / "1" / source.name).read_bytes() == (tmp_path / "2" / source.name).read_bytes()
    assert reports[0].kinds == reports[1].kinds


def test_another_seed_gives_other_negatives() -> None:
    first, second = (negatives(CAPTIONS[0][0], Recipe(KINDS, 1, seed)) for seed in (0, 1))
    assert [n["text"] for n in first] != [n["text"] for n in second]


def test_finished_shards_are_kept(shards: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = make(shards, out, workers=1, progress=False)
    marks = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    again = make(shards, out, workers=1, progress=False)
    assert again.kept_shards == 2 and again.kinds == first.kinds and again.drops == first.drops
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == marks

    (out / "s-1.tar").unlink()  # as after a kill: only the missing one is made
    assert make(shards, out, workers=1, progress=False).kept_shards == 1

    assert make(shards, out, kinds=["reshuffle"], workers=1, progress=False).kept_shards == 0
    os.utime(shards[0], ns=(1, 1))
    assert make(shards, out, kinds=["reshuffle"], workers=1, progress=False).kept_shards == 1
    assert not list(out.glob(".*.tmp"))


def test_shards_of_others_are_not_replaced(shards: list[Path], tmp_path: Path) -> None:
    out, settings = tmp_path / "out", {"workers": 1, "progress": False}
    out.mkdir()
    theirs = shard(out / "s-1.tar").read_bytes()
    with pytest.raises(UserError, match=r"s-1\.tar: is there already, .*choose another folder or --overwrite"):
        make(shards, out, **settings)
    assert (out / "s-1.tar").read_bytes() == theirs and not (out / "s-0.tar").exists()
    assert make(shards, out, overwrite=True, **settings).kept_shards == 0
    assert make(shards, out, **settings).kept_shards == 2
    claim(out / "s-1.tar", SOURCE)  # as after a kill between the shard and its line in the ledger
    assert make(shards, out, **settings).kept_shards == 1
    with (out / "s-1.tar").open("ab") as file:  # somebody else's by now
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"s-1\.tar: is there already"):
        make(shards, out, seed=1, **settings)


def test_usual_negatives_only(shards: list[Path], tmp_path: Path) -> None:
    free, bound = (make(shards, tmp_path / str(n), usual=n, workers=n + 1, progress=False) for n in (0, 1))
    dropped = sum(drops["unusual neighbours"] for drops in bound.drops.values())
    assert dropped and sum(bound.kinds.values()) < sum(free.kinds.values())
    assert not any("unusual neighbours" in drops for drops in free.drops.values())
    assert make(shards, tmp_path / "1", usual=1, workers=1, progress=False).kept_shards == len(shards)
    assert make(shards, tmp_path / "1", usual=0, workers=1, progress=False).kept_shards == 0


def test_negatives_of_another_source_stay(tmp_path: Path) -> None:
    foreign = {"text": "a cat", "kind": "replace_nouns", "source": "llm"}
    stale = {"text": "a bat", "kind": "replace_nouns", "source": "rule"}
    (tmp_path / "in").mkdir()
    sample = Sample("a", b"\xff\xd8", "jpg", ["a dog on a log"], {"negatives": [[foreign, stale]]})
    write_shard([sample], tmp_path / "in" / "x.tar")
    make(tmp_path / "in", tmp_path / "out", workers=1, progress=False)
    (made,) = json.loads(contents(tmp_path / "out" / "x.tar")[0]["json"])["negatives"]
    assert made[0] == foreign and stale not in made and len(made) > 1


def test_mistakes(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean swap_nouns"):
        make(shards, tmp_path / "out", kinds=["swap_noun"], progress=False)
    with pytest.raises(UserError, match="choose another folder"):
        make(shards, shards[0].parent, progress=False)
    (tmp_path / "other").mkdir()
    twin = shard(tmp_path / "other" / "s-0.tar")
    with pytest.raises(UserError, match="2 shards have this name"):
        make([*shards, twin], tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"s-0\.tar: is a file"):
        make(shards, twin / "out", progress=False)


def test_real_captions(shared: Path) -> None:
    """Nine of ten Flickr8k captions and more get a negative; swaps and replacements reach their share."""
    index = Index.load(shared / "data" / "flickr8k_dev-000.tar")
    recipe, made = Recipe(KINDS, 1, 0), []
    for id in range(0, len(index), 10):
        captions = json.loads(index.read(id, ["json"])["json"])["captions"]
        made += [negatives(c, recipe, captions[:i] + captions[i + 1 :]) for i, c in enumerate(captions)]
    covered = {kind: sum(any(n["kind"] == kind for n in group) for group in made) / len(made) for kind in KINDS}
    assert all(made)
    least = {
        "reshuffle": 0.98,
        "swap_nouns": 0.7,
        "swap_adjectives": 0.2,
        "replace_adjectives": 0.5,
        "replace_nouns": 0.9,
    }
    assert all(covered[kind] >= share for kind, share in least.items()), covered
