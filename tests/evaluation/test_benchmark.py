"""Benchmark files: all that ship load; mistakes are told with file, line and field."""

from __future__ import annotations

import gzip
import hashlib
import json

import pytest

from clipkit.errors import UserError
from clipkit.evaluation import benchmark as data
from clipkit.evaluation.roots import Roots

PACKAGED = data.packaged()


def row(**changes):
    return {"id": "a", "images": [{"path": "x.png"}], "texts": ["one", "two"], "match": [[1, 0]]} | changes


def write(folder, lines, **fields):
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tree = {"name": "own", "kind": "compositional", "version": "1", "title": "own", "rows": ["rows.jsonl"]} | fields
    (folder / "own.yaml").write_text(json.dumps(tree))
    return data.load(folder / "own.yaml")


def test_there_are_benchmarks():
    assert len(PACKAGED) >= 18
    assert {"world", "flickr8k_dev", "cifar10", "flowers5", "sugarcrepe_subset"} <= PACKAGED.keys()


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged(name):
    benchmark = data.load(name)
    assert benchmark.name == name
    assert PACKAGED[name].parent.name == benchmark.kind
    references = [*benchmark.rows, *benchmark.images, *benchmark.shards]
    assert {reference.partition(":")[0] for reference in references} <= benchmark.sources.keys()
    assert all("{}" in template for template in benchmark.templates)
    assert benchmark.licence


@pytest.mark.parametrize("name", ["world", "world_dev", "flickr8k", "abstract_scenes", "real"])
def test_suites(name):
    names = data.suite(name)
    assert names and len(names) == len(set(names))
    assert set(names) <= PACKAGED.keys()


def test_own_suite_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("small: [cifar10]\nboth: [small, flowers5]\n")
    assert data.suite(f"{tmp_path}/mine.yaml:both") == ["cifar10", "flowers5"]
    with pytest.raises(UserError, match="mine.yaml: a suite in a file is written FILE:NAME; valid names: both, small"):
        data.suite(f"{tmp_path}/mine.yaml")


@pytest.mark.parametrize(("name", "hint"), [("wrold", "did you mean world"), ("cifar", "did you mean cifar10")])
def test_misspelt(name, hint):
    with pytest.raises(UserError, match=hint):
        data.load(name)
    with pytest.raises(UserError, match="no suite called wrold; did you mean world"):
        data.suite("wrold")


def test_base_is_at_most_two_deep(tmp_path):
    for name, base in (("a", "cifar10"), ("b", "a"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\nname: {name}\n")
    assert data.load(tmp_path / "b.yaml").templates == data.load("cifar10").templates
    with pytest.raises(UserError, match="two is the limit"):
        data.load(tmp_path / "c.yaml")


def test_every_problem_of_a_file_at_once(tmp_path):
    (tmp_path / "own.yaml").write_text(
        "name: own\nkind: compositional\ntitle: own\nrows: [a.jsonl]\nagregates: {}\n"
        "official: {tie: wrong}\nsources: {coco: {abuot: x}}\n"
    )
    with pytest.raises(UserError) as error:
        data.load(tmp_path / "own.yaml")
    message = str(error.value)
    assert "version: is missing" in message
    assert "agregates: no such field; did you mean aggregates?" in message
    assert "sources.coco.abuot: no such field; did you mean about?" in message
    assert "official.tie" in message and "strict" in message


def test_kind_needs_its_parts(tmp_path):
    (tmp_path / "own.yaml").write_text("name: own\nkind: zeroshot\nversion: '1'\ntitle: own\nimages: ['a:']\n")
    with pytest.raises(UserError, match="a zeroshot benchmark needs classes"):
        data.load(tmp_path / "own.yaml")


def test_class_list_or_mapping(tmp_path):
    common = "name: own\nkind: zeroshot\nversion: '1'\ntitle: own\nimages: ['a:']\ntemplates: ['{}']\n"
    (tmp_path / "own.yaml").write_text(common + "classes: [red_fox, cat]\n")
    assert data.load(tmp_path / "own.yaml").classes == {"red_fox": "red fox", "cat": "cat"}
    (tmp_path / "own.yaml").write_text(common + "classes: {red_fox: [fox, red fox], cat: cat}\n")
    assert data.load(tmp_path / "own.yaml").classes["red_fox"] == ["fox", "red fox"]


def test_rows(tmp_path):
    benchmark = write(tmp_path, [row(), row(id="b", images=[{"src": "coco", "path": "y.jpg"}])], prefix="see: ")
    first, second = data.read_rows(benchmark, Roots())
    assert first.pictures == [data.Picture("./own", "x.png")]
    assert second.pictures == [data.Picture("coco", "y.jpg")]
    assert first.texts == ["see: one", "see: two"]
    assert (first.cluster, second.cluster) == ("./own:x.png", "coco:y.jpg")


def test_fields_are_named_for_breakdowns(tmp_path):
    benchmark = write(tmp_path, [row(category="swap", group="g", meta={"seed": 3})])
    (only,) = data.read_rows(benchmark, Roots())
    assert [only.field(name) for name in ("category", "group", "meta.seed", "meta.none")] == ["swap", "g", "3", ""]


def test_several_files_keep_ids_apart(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(row()) + "\n")
    benchmark = write(tmp_path, [], rows=["src:one/rows.jsonl", "src:two/rows.jsonl"])
    rows = data.read_rows(benchmark, Roots({"src": tmp_path}))
    assert [r.id for r in rows] == ["one/a", "two/a"]
    assert [r.images[0].path for r in rows] == ["one/x.png", "two/x.png"]


def test_compressed_rows_and_hash(tmp_path):
    packed = gzip.compress((json.dumps(row()) + "\n").encode(), mtime=0)
    (tmp_path / "rows.jsonl.gz").write_bytes(packed)
    right = {"rows.jsonl.gz": hashlib.sha256(packed).hexdigest()}
    assert len(data.read_rows(write(tmp_path, [], rows=list(right), sha256=right), Roots())) == 1
    with pytest.raises(UserError, match="SHA-256 differs"):
        data.read_rows(write(tmp_path, [], rows=list(right), sha256={"rows.jsonl.gz": "0" * 64}), Roots())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(match=[[1]]), r"line 2: match should be 1 × 2"),
        (row(match=[[1, 1]]), r"line 2: match should give every picture a right and a wrong text"),
        (row(match=[[1, 2]]), r"line 2: match.0.1"),
        (row(txts=[]), r"line 2: txts: no such field; did you mean texts\?"),
        (row(images=[{"pth": "x"}]), r"line 2: images.0.path: is missing"),
        (row(texts=[]), r"line 2: texts"),
        (row(id="first"), r"1 row ids come more than once, the first is first"),
    ],
)
def test_broken_row(tmp_path, bad, message):
    benchmark = write(tmp_path, [row(id="first"), bad])
    with pytest.raises(UserError, match=message):
        data.read_rows(benchmark, Roots())
