from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipkit.data.world import build_world
from clipkit.data.world.tasks import TASKS
from clipkit.data.world.variants import CHANGES
from clipkit.errors import UserError

SMALL: dict[str, Any] = {
    "pictures": 30,
    "size": 48,
    "per_shard": 20,
    "dev_pictures": 10,
    "eval_rows": 8,
    "zeroshot_pictures": 42,
    "eval_seeds": (1, 2),
    "progress": False,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "w"
    build_world(out, workers=1, **SMALL)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*.*")
        if p.is_file()
    }


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {m.name: file.extractfile(m).read() for m in file.getmembers()}  # type: ignore[union-attr]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_same_seed_same_bytes_whatever_the_workers(world: Path, tmp_path: Path) -> None:
    build_world(tmp_path / "again", workers=2, **SMALL)
    assert digests(tmp_path / "again") == digests(world)


def test_a_smaller_world_is_the_start_of_a_larger_one(world: Path, tmp_path: Path) -> None:
    build_world(tmp_path / "less", workers=1, **SMALL | {"pictures": 20})
    assert (tmp_path / "less/train-000000.tar").read_bytes() == (world / "train-000000.tar").read_bytes()


def test_another_seed_another_world(world: Path, tmp_path: Path) -> None:
    build_world(tmp_path / "other", workers=1, **SMALL | {"seed": 1})
    shared = {*digests(tmp_path / "other").values()} & {*digests(world).values()}
    assert not shared


def test_shards_hold_pictures_captions_and_scenes(world: Path, oracle: Callable) -> None:
    assert sorted(p.name for p in world.glob("*.tar")) == ["dev-000000.tar", "train-000000.tar", "train-000001.tar"]
    pairs = members(world / "train-000000.tar")
    assert len(pairs) == 3 * 20
    for key in {name.rpartition(".")[0] for name in pairs}:
        sheet = json.loads(pairs[f"{key}.json"])
        assert sheet["group"] == key and pairs[f"{key}.txt"].decode() == sheet["captions"][0]
        assert len(sheet["captions"]) >= 2 and all(oracle(c, sheet["scene"]) for c in sheet["captions"])
        seen = {thing[what] for thing in sheet["scene"]["things"] for what in ("shape", "colour", "texture")}
        assert sheet["tags"] == sorted(seen)
        picture = Image.open(io.BytesIO(pairs[f"{key}.jpg"]))
        assert picture.size == (48, 48) and picture.format == "JPEG"


@pytest.mark.parametrize("name", ["dev", "test1", "test2"])
def test_evaluation_rows_agree_with_their_scenes(world: Path, name: str, oracle: Callable) -> None:
    folder = world / "eval" / name
    scenes = {line["path"]: line["scene"] for line in lines(folder / "scenes.jsonl")}
    rows = lines(folder / "rows.jsonl")
    assert Counter(row["category"] for row in rows) == dict.fromkeys(TASKS, 8)
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["valid"] is True and row["cluster"] in scenes
        assert row["meta"]["seed"] == int(name.removeprefix("test").replace("dev", "0"))
        assert row["meta"]["form"] == f"{len(row['images'])}x{len(row['texts'])}"
        for image, line in zip(row["images"], row["match"]):
            assert image["src"] == "world" and (world / image["path"]).is_file()
            verdicts = [bool(oracle(text, scenes[image["path"]])) for text in row["texts"]]
            assert verdicts == [bool(hit) for hit in line]


def test_no_picture_is_in_two_sets(world: Path) -> None:
    pictures = [data for tar in world.glob("*.tar") for name, data in members(tar).items() if name.endswith("jpg")]
    pictures += [path.read_bytes() for path in world.rglob("*.jpg")]
    assert len({*pictures}) == len(pictures)


def test_zeroshot_folders_and_templates(world: Path) -> None:
    about = json.loads((world / "world.json").read_text())
    for name, classes in {"shape": 6, "colour": 7, "texture": 4, "object": 42}.items():
        folders = sorted(p.name for p in (world / "eval/test1/zeroshot" / name).iterdir())
        assert folders == sorted(about["zeroshot"][name]["classes"]) and len(folders) == classes
        assert all(len([*p.iterdir()]) == -(-42 // classes) for p in (world / "eval/test1/zeroshot" / name).iterdir())
        assert all("{}" in template for template in about["zeroshot"][name]["templates"])


def test_world_json_tells_everything(world: Path) -> None:
    about = json.loads((world / "world.json").read_text())
    assert about["settings"] | {"progress": False} == SMALL | {"seed": 0, "eval_seeds": [1, 2], "drawn_negatives": 0}
    assert about["counts"]["eval/test1"]["rows"] == 8 * len(TASKS)
    assert about["sha256"]["train-000000.tar"] == digests(world)["train-000000.tar"]
    assert "eval/test2/**.jpg" in about["sha256"]


def test_mistakes_are_named(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a world"):
        build_world(world, **SMALL)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="no world"):
        build_world(tmp_path, overwrite=True, **SMALL)
    with pytest.raises(UserError, match="size should be 32 to 512"):
        build_world(tmp_path / "new", **SMALL | {"size": 8})
    with pytest.raises(UserError, match="eval_rows should be at least 1, got 0"):
        build_world(tmp_path / "new", **SMALL | {"eval_rows": 0})
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_overwrite_replaces_an_old_world(tmp_path: Path) -> None:
    build_world(tmp_path / "w", workers=1, **SMALL)
    build_world(tmp_path / "w", workers=1, overwrite=True, **SMALL | {"pictures": 10})
    assert sorted(p.name for p in (tmp_path / "w").glob("train*")) == ["train-000000.tar"]


def test_drawn_negatives_are_false_here_and_change_nothing_else(world: Path, tmp_path: Path, oracle: Callable) -> None:
    build_world(tmp_path / "drawn", workers=1, drawn_negatives=2, **SMALL)
    plain, drawn = (digests(folder) for folder in (world, tmp_path / "drawn"))
    assert {name for name in drawn if drawn[name] != plain[name]} == {
        "world.json",
        *(name for name in plain if name.startswith("train-")),
    }
    kinds = set()
    for tar in sorted(world.glob("train-*.tar")):
        before, after = members(tar), members(tmp_path / "drawn" / tar.name)
        assert all(after[name] == data for name, data in before.items() if not name.endswith(".json"))
        for name in (name for name in before if name.endswith(".json")):
            sheet = json.loads(after[name])
            negatives = sheet.pop("negatives")
            assert sheet == json.loads(before[name]) and len(negatives) == len(sheet["captions"])
            assert all(some == negatives[0] for some in negatives)
            for number, negative in enumerate(negatives[0]):
                assert negative["picture"] == number and not oracle(negative["text"], sheet["scene"])
                assert after[name.replace(".json", f".negative{number}.jpg")] != before[name.replace(".json", ".jpg")]
                kinds.add(negative["kind"])
    assert kinds == set(CHANGES)
