"""Shards out of what people have: every source, read back through the index."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from clipkit.data.build import Sample, build_shards, encode_jpeg, safe_key, write_shards
from clipkit.data.shards import Index
from clipkit.data.sources import guess
from clipkit.errors import UserError
from clipkit.registry import SOURCES

from .conftest import noise_picture, sample

JPEG = [encode_jpeg(noise_picture(i)) for i in range(3)]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """a/0.jpg, a/1.jpg and b.png (really a WebP)."""
    folder = tmp_path / "pictures"
    (folder / "a").mkdir(parents=True)
    for i in range(2):
        (folder / "a" / f"{i}.jpg").write_bytes(JPEG[i])
    noise_picture(2).save(folder / "b.png", "WEBP")
    return folder


def records(out: Path) -> dict[str, dict[str, Any]]:
    """All that lies in the shards of a folder: KEY.json by key, with the picture's bytes and the text added."""
    index = Index.load(out)
    found = {}
    for id in range(len(index)):
        members = index.read(id)
        picture = members.get("jpg") or members["png"]
        found[index.key(id)] = json.loads(members["json"]) | {"picture": picture, "txt": members["txt"].decode()}
    return found


def built(path: Path, tmp_path: Path, *args: Any, **settings: Any) -> dict[str, dict[str, Any]]:
    build_shards(path, tmp_path / "out", *args, progress=False, **settings)
    return records(tmp_path / "out")


def test_write_and_read_back_in_several_shards(tmp_path: Path) -> None:
    shards = write_shards((sample(i, group="g", scene={"n": i}) for i in range(5)), tmp_path, per_shard=2, name="train")
    assert [s.name for s in shards] == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert sorted(tmp_path.iterdir()) == shards
    found = records(tmp_path)
    assert len(found) == 5 and found["k00003"]["picture"] == sample(3).image
    assert found["k00003"]["captions"] == sample(3).captions and found["k00003"]["txt"] == sample(3).captions[0]
    assert found["k00003"]["negatives"] == sample(3).extra["negatives"] and found["k00003"]["group"] == "g"


# webdataset leaves closing the tar to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_webdataset_reads_the_same_pairs(tmp_path: Path) -> None:
    dotted = Sample("some.folder/my.picture", JPEG[0], "jpg", ["words"])
    (shard,) = write_shards([dotted, sample(1)], tmp_path)
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))  # type: ignore[attr-defined]
    assert [s["__key__"] for s in theirs] == ["some_folder/my_picture", "k00001"]
    assert theirs[0]["jpg"] == JPEG[0] and theirs[0]["txt"] == b"words"


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    a, b = (write_shards([sample(1), sample(2)], tmp_path / name)[0].read_bytes() for name in "ab")
    assert a == b


def test_old_shards_are_never_mixed_with_new_ones(tmp_path: Path) -> None:
    write_shards([sample(i) for i in range(3)], tmp_path, per_shard=1)
    with pytest.raises(UserError, match="already holds 3 shards"):
        write_shards([sample(9)], tmp_path)
    write_shards([sample(9)], tmp_path, overwrite=True)
    assert list(records(tmp_path)) == ["k00009"] and len(list(tmp_path.iterdir())) == 1


def test_a_failed_build_leaves_no_half_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two samples have the key k00001"):
        write_shards([sample(1), sample(1)], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["../../etc/x", "/abs/x", "a b.c", "ü/1"])
def test_keys_are_safe(key: str) -> None:
    safe = safe_key(key)
    assert safe and "." not in safe and not safe.startswith("/") and safe_key(safe) == safe


def test_folder_with_texts_beside(pictures: Path, tmp_path: Path) -> None:
    for name, text in (("a/0", "one\ntwo\n\n"), ("a/1", "three"), ("b", "four")):
        (pictures / f"{name}.txt").write_text(text)
    found = built(pictures, tmp_path)
    assert found["a/0"]["captions"] == ["one", "two"] and found["a/0"]["picture"] == JPEG[0]
    assert Image.open(io.BytesIO(found["b"]["picture"])).format == "JPEG"
    (pictures / "a" / "1.txt").unlink()
    with pytest.raises(UserError, match=r"1\.jpg: no caption: there is no 1\.txt beside it"):
        build_shards(pictures, tmp_path / "out2")


def test_folder_with_a_captions_file(pictures: Path, tmp_path: Path) -> None:
    rows = [{"file_name": "a/0.jpg", "text": ["one", "two"], "group": "g"}, {"file_name": "b.png", "text": "four"}]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = built(pictures, tmp_path)
    assert found["a/0"]["captions"] == ["one", "two"] and found["a/0"]["group"] == "g" and len(found) == 2
    with pytest.raises(UserError, match="no such captions file"):
        build_shards(pictures, tmp_path / "out2", captions="nothing.csv")


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_joins_the_rows_of_a_picture(pictures: Path, tmp_path: Path, separator: str) -> None:
    with (pictures / "table.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["filepath", "title"], ["a/0.jpg", 'one, "quoted"'], ["b.png", "x"], ["a/0.jpg", "two"]])
    found = built(pictures / "table.csv", tmp_path)
    assert found["a/0"]["captions"] == ['one, "quoted"', "two"] and found["b"]["captions"] == ["x"]


def test_csv_columns_and_missing_files(pictures: Path, tmp_path: Path) -> None:
    table = pictures / "t.csv"
    table.write_text("where,what\na/0.jpg,one\nnone.jpg,two\n")
    with pytest.raises(UserError, match=r"which column is the image\? .* found where, what"):
        build_shards(table, tmp_path / "out")
    columns = {"image": "where", "caption": "what"}
    with pytest.raises(UserError, match=r"line 3: no picture .*none\.jpg"):
        build_shards(table, tmp_path / "out", **columns)
    assert list(built(table, tmp_path, overwrite=True, missing="skip", **columns)) == ["a/0"]
    with pytest.raises(UserError, match="no column whree; did you mean where"):
        build_shards(table, tmp_path / "out3", image="whree")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: should be an object"),
        ('{"image": "a/0.jpg", "caption": ""}', "line 1: should have a caption"),
        ('{"image": "", "caption": "x"}', "line 1: no image"),
    ],
)
def test_jsonl_mistakes(pictures: Path, tmp_path: Path, line: str, problem: str) -> None:
    (pictures / "x.jsonl").write_text(line)
    with pytest.raises(UserError, match=problem):
        build_shards(pictures / "x.jsonl", tmp_path / "out")


def test_coco(pictures: Path, tmp_path: Path) -> None:
    tree = {
        "images": [{"id": 7, "file_name": "a/1.jpg", "license": 3}, {"id": 8, "file_name": "gone.jpg"}],
        "annotations": [{"image_id": i, "caption": c} for i, c in ((7, " one "), (8, "x"), (7, "two"))],
    }
    (pictures / "captions_val.json").write_text(json.dumps(tree))
    found = built(pictures / "captions_val.json", tmp_path, missing="skip")
    assert found["a/1"]["captions"] == ["one", "two"] and found["a/1"]["license"] == 3 and len(found) == 1
    tree["annotations"] = [{"image_id": 7, "bbox": [0, 0, 1, 1]}]
    (pictures / "instances.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="annotations without captions"):
        build_shards(pictures / "instances.json", tmp_path / "out2")


def test_existing_tars(shard_folder: Path, tmp_path: Path) -> None:
    expected = records(shard_folder)
    assert built(shard_folder, tmp_path, per_shard=10) == expected
    shutil.copy(shard_folder / "s-0.tar", tmp_path / "one.tar")
    assert built(tmp_path / "one.tar", tmp_path / "again", name="again") == {k: expected[k] for k in list(expected)[:7]}


def test_real_shards(shared: Path, tmp_path: Path) -> None:
    found = built(shared / "data" / "coco_val2017-000.tar", tmp_path)
    assert len(found) == 240 and all(len(record["captions"]) >= 5 for record in found.values())


def test_guessing_and_misspelling(tmp_path: Path) -> None:
    assert {"folder", "csv", "jsonl", "coco", "tar"} <= set(SOURCES)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UserError, match=r"cannot tell what this holds; say --from .*coco"):
        guess(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no source called cocoo; did you mean coco"):
        build_shards(tmp_path, tmp_path / "out", "cocoo")
    with pytest.raises(UserError, match="no such file or folder"):
        build_shards(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pair"):
        build_shards(tmp_path / "empty", tmp_path / "out")
