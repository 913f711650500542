"""What is in the annotation files beside the benchmarks' own rows, and what needs no model to be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipkit.evaluation.convert import convert
from tests.evaluation.fakes import Constant
from tests.evaluation.test_published import Named, task_of

UNREFINED = {
    "add_att": 1789, "add_obj": 3967, "replace_att": 1703, "replace_obj": 3124, "replace_rel": 3177, "swap_att": 2305,
    "swap_obj": 1413,
}  # fmt: skip


def test_sugarcrepe_before_its_refinement(shared: Path, tmp_path: Path):
    found = convert("sugarcrepe", shared / "annotations/sugar_crepe/data_unrefined", tmp_path)
    assert (found["n"], found["by_category"]) == (17478, UNREFINED)


@pytest.mark.parametrize(("part", "count"), [("dev", 989), ("test", 990), ("hidden", 985)])
def test_parts_of_nlvr(shared: Path, tmp_path: Path, part: str, count: int):
    assert convert("nlvr", shared / "annotations/nlvr", tmp_path, part=part)["n"] == count
    assert convert("nlvr_orders", shared / "annotations/nlvr", tmp_path, part=part)["n"] == 6 * count


@pytest.mark.parametrize(("name", "count"), [("vsr_zeroshot", 340), ("vsr_random", 1097)])
def test_development_parts_of_vsr(shared: Path, tmp_path: Path, name: str, count: int):
    assert convert(name, shared / "annotations/vsr", tmp_path, part="dev")["n"] == count


def test_karpathy_has_25010_captions_of_5000_pictures(shared: Path):
    items = json.loads((shared / "annotations/aro/coco_karpathy_test.json").read_text())
    assert (len(items), sum(len(item["caption"]) for item in items)) == (5000, 25010)


def blind(shared: Path, tmp_path: Path, name: str, source: str) -> dict[str, dict[str, float]]:
    """Baseline -> category -> percent, one place."""
    convert(name, shared / "annotations" / source, tmp_path)
    result = task_of(name, tmp_path).score(Named(Constant()), "strict")  # type: ignore[arg-type]
    return {
        baseline: {
            kind: round(100 * scores["i2t"], 1) for kind, scores in result.baselines[baseline]["by_category"].items()
        }
        for baseline in ("shorter_text", "fewer_words")
    }


def test_fewer_words_on_sugarcrepe(shared: Path, tmp_path: Path):
    assert blind(shared, tmp_path, "sugarcrepe", "sugar_crepe/data")["fewer_words"] == {
        "add_att": 99.1, "add_obj": 98.7, "replace_att": 49.0, "replace_obj": 44.4, "replace_rel": 54.5,
        "swap_att": 48.9, "swap_obj": 52.4,
    }  # fmt: skip


def test_length_alone_on_valse(shared: Path, tmp_path: Path):
    """Known extremes: adversarial counts are longer when right, and existence has more words."""
    found = blind(shared, tmp_path, "valse", "valse")
    shorter, fewer = (sorted(found[kind].items(), key=lambda one: one[1]) for kind in ("shorter_text", "fewer_words"))
    assert (shorter[0], shorter[-1][1]) == (("counting-adversarial", 33.5), 54.3)
    assert (fewer[0], fewer[-1][1]) == (("existence", 41.2), 53.7)
