"""Retrieval against a plain loop; ties count against; equal captions and pictures of one group."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest

from clipkit.errors import UserError
from clipkit.evaluation import benchmark as data
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.retrieval import prepare
from clipkit.evaluation.roots import Roots
from tests.evaluation.fakes import Constant, Oracle, Random, name_of, picture


def write(folder, captions, groups=None):
    """A shard; `captions[n]` are those of picture n."""
    with tarfile.open(folder / "dev-0.tar", "w") as tar:
        for n, several in enumerate(captions):
            png = io.BytesIO()
            picture(n).save(png, "PNG")
            sheet = {"captions": several} | ({"group": groups[n]} if groups else {})
            for suffix, content in (("png", png.getvalue()), ("json", json.dumps(sheet).encode())):
                info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    fields = {"name": "own", "kind": "retrieval", "version": "1", "title": "own", "shards": ["src:dev-*.tar"]}
    (folder / "own.yaml").write_text(json.dumps(fields))
    return folder


def run(folder, model, tie="official"):
    roots = Roots({"src": folder})
    task = prepare(data.load(folder / "own.yaml"), roots)
    return task.score(Embedder(model, roots), tie)


def five_each(n):
    return [[f"picture {i} caption {c}" for c in range(5)] for i in range(n)]


def test_agrees_with_a_plain_loop(tmp_path):
    captions = five_each(40)
    result, model = run(write(tmp_path, captions), Random()), Random()
    unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)  # noqa: E731
    images = unit(np.stack([model.vector(name_of(picture(i))) for i in range(40)]))
    texts = unit(np.stack([model.vector(text) for several in captions for text in several]))
    s = images @ texts.T
    t2i = [1 + sum(s[i, q] > s[q // 5, q] for i in range(40)) for q in range(200)]
    i2t = [
        1 + min(sum(s[i, q] > s[i, own] for q in range(200) if q // 5 != i) for own in range(5 * i, 5 * i + 5))
        for i in range(40)
    ]
    for direction, ranks in (("t2i", t2i), ("i2t", i2t)):
        for k in (1, 5, 10):
            assert result.metrics[f"{direction}/r{k}"].value == pytest.approx(np.mean([r <= k for r in ranks]))
        assert result.metrics[f"{direction}/median_rank"].value == np.median(ranks)
        assert [item["rank"] for item in result.items if item["category"] == direction] == ranks
    assert (result.n, result.headline) == (200, "t2i/r1")
    pairs = [float(((images[q // 5] - texts[q]) ** 2).sum()) for q in range(200)]
    assert result.details["alignment"] == pytest.approx(np.mean(pairs), rel=1e-4)
    assert result.details["modality_gap"] == pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)), rel=1e-4)
    assert result.details["uniformity"].keys() == {"pictures", "captions"}


def test_oracle_constant_random(tmp_path):
    captions = five_each(60)
    oracle = Oracle({text: {name_of(picture(n))} for n, several in enumerate(captions) for text in several})
    folder = write(tmp_path, captions)
    perfect = run(folder, oracle)
    assert {m.value for m in perfect.metrics.values()} == {1.0}
    constant = run(folder, Constant())
    assert {m.value for name, m in constant.metrics.items() if "/r" in name} == {0.0}
    assert constant.metrics["t2i/median_rank"].value == 60 and constant.tie["rate"] == 1.0
    assert run(folder, Constant(), "lenient").metrics["t2i/r1"].value == 1.0
    assert run(folder, Constant(), "half").metrics["t2i/r1"].value == pytest.approx(1 / 60)
    for name, metric in run(folder, Random()).metrics.items():
        slack = 0.3 * (metric.high - metric.low)
        assert metric.low - slack <= metric.chance <= metric.high + slack, name


def test_equal_captions_are_one_text(tmp_path):
    # "a thing" is true of both pictures: neither finding it nor being found by it is a mistake.
    folder = write(tmp_path, [["a thing", "first"], ["a thing", "second"], ["third"]])
    truth = {"a thing": {0, 1}, "first": {0}, "second": {1}, "third": {2}}
    oracle = Oracle({text: {name_of(picture(n)) for n in numbers} for text, numbers in truth.items()})
    result = run(folder, oracle)
    assert {m.value for m in result.metrics.values()} == {1.0}
    assert result.n == 5 and result.details["different_captions"] == 4


def test_pictures_of_one_group_share_their_captions(tmp_path):
    folder = write(tmp_path, [["first"], ["second"], ["third"]], groups=["same", "same", "other"])
    # The second picture's caption leads to the first: right, they show the same.
    truth = {"first": {0}, "second": {0}, "third": {2}}
    oracle = Oracle({text: {name_of(picture(n)) for n in numbers} for text, numbers in truth.items()})
    assert run(folder, oracle).metrics["t2i/r1"].value == 1.0


def test_captions_of_a_picture_are_one_cluster(tmp_path):
    result = run(write(tmp_path, five_each(30)), Random())
    assert len({item["cluster"] for item in result.items if item["category"] == "t2i"}) == 30
    assert len({item["id"] for item in result.items}) == 150 + 30


def test_examples(tmp_path):
    result = run(write(tmp_path, five_each(30)), Random())
    forms = [example["form"] for example in result.examples]
    assert forms.count("t2i") == forms.count("i2t") == 8
    for example in result.examples:
        assert len(example["match"]) == len(example["pictures"]) and len(example["match"][0]) == len(example["texts"])
        assert any(1 in line for line in example["match"])


def test_nothing_to_retrieve(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    fields = {"name": "own", "kind": "retrieval", "version": "1", "title": "own", "shards": ["src:"]}
    (tmp_path / "own.yaml").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="no pictures with captions in src:"):
        prepare(data.load(tmp_path / "own.yaml"), Roots({"src": tmp_path}))


def test_broken_pair_is_named(tmp_path):
    folder = write(tmp_path, [["a"], [""]])
    with pytest.raises(UserError, match=r"001: empty caption"):
        run(folder, Random())
