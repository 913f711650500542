"""Runs with teachers: taken up in the middle of a warm-up, stored beforehand, of another width, of one tower."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkit.config import Config
from clipkit.errors import UserError
from clipkit.model.dual_encoder import build
from clipkit.model.load import load, load_teacher, save
from clipkit.model.store import embed_shards
from clipkit.model.teacher import Teacher
from clipkit.settings import ModelConfig
from clipkit.training.loop import train
from tests.training.test_state import losses

SHORT = {"samples": 64, "log_samples": False}


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("step_*"))[-1] / f"{name}.safetensors")


def run(tree: dict, name: str, *, resume: bool = False, **more: object) -> Path:
    return train(Config.model_validate(tree | SHORT | {"name": name, **more}), resume=resume)


def test_a_warm_up_goes_on_where_it_was(tiny_tree: dict):
    """Cut off in the middle of it: the same bits at the end as a run left in peace."""
    teacher = {"kind": "ema", "half_life_samples": 64, "warmup": 56}
    peace = run(tiny_tree, "peace", teacher=teacher, save_every=32)
    folder = run(tiny_tree, "cut", teacher=teacher, save_every=32)
    first, last = sorted((folder / "checkpoints").glob("step_*"))
    assert (first.name, last.name) == ("step_00000002", "step_00000004")
    shutil.rmtree(last)
    run(tiny_tree, "cut", resume=True, teacher=teacher, save_every=32)
    for name in ("model", "teacher", "optimizer"):
        expected, got = tensors(peace, name), tensors(folder, name)
        assert expected.keys() == got.keys() and all(torch.equal(value, got[key]) for key, value in expected.items())
    assert losses(folder) == losses(peace)


def test_leaving_out_what_no_term_looks_at_changes_no_loss(tiny_tree: dict, monkeypatch: pytest.MonkeyPatch):
    tree = tiny_tree | {"objective": {"infonce": {}, "tgc": {}}}
    lean = run(tree, "lean")
    assert not any(name.startswith("image") for name in tensors(lean, "teacher"))
    monkeypatch.setattr(
        Teacher, "of", classmethod(lambda cls, student, config: cls(student, config.teacher, config.steps))
    )
    whole = run(tree, "whole")
    assert losses(lean) == losses(whole)
    assert all(torch.equal(value, tensors(whole, "teacher")[name]) for name, value in tensors(lean, "teacher").items())


def test_a_runs_average_is_a_model_of_its_own(tiny_tree: dict):
    folder = run(tiny_tree, "average", teacher={"kind": "ema"})
    kept, teacher = tensors(folder, "teacher"), load_teacher(folder)
    assert not teacher.training
    assert all(torch.equal(x, kept[name]) for name, x in teacher.state_dict().items())
    assert not torch.equal(teacher.embed_texts(["a cube"]), load(folder, "cpu").embed_texts(["a cube"]))


def test_an_average_that_is_not_whole_is_no_model(tiny_tree: dict):
    half = run(tiny_tree | {"objective": {"infonce": {}, "tgc": {}}}, "half", teacher={"kind": "ema"})
    with pytest.raises(UserError, match="has no image_(tower|head), which no term of its run asked a teacher for"):
        load_teacher(half)
    none = run(tiny_tree | {"objective": {"infonce": {}}}, "none", teacher={"kind": "none"})
    with pytest.raises(UserError, match="holds no teacher with weights of its own"):
        load_teacher(none)


def guide_of(tree: dict, folder: Path, **settings: object) -> str:
    torch.manual_seed(3)
    save(build(ModelConfig.model_validate(tree["model"] | settings)), folder)
    return str(folder)


def test_stored_embeddings_teach_as_their_model_does(tiny_tree: dict, tmp_path: Path):
    """Within fp16's rounding; nothing of the teacher is in the checkpoint then."""
    tree = tiny_tree | {"objective": {"infonce": {}, "distill": {}, "structure": {}, "tgc": {}}}
    tree["data"] = tree["data"] | {"augment": "none", "positives": 1}
    start = guide_of(tree, tmp_path / "guide")
    live = run(tree, "live", teacher={"kind": "frozen", "start": start})
    guide = build(ModelConfig.model_validate(tree["model"] | {"start": start}))
    embed_shards(
        guide, tree["data"]["train"], tmp_path / "stored", name="guide", parts=["text", "negatives", "image"],
        progress=False,
    )  # fmt: skip
    tree["data"] = tree["data"] | {"train": [str(tmp_path / "stored")], "teacher_features": "guide"}
    stored = run(tree, "stored", teacher={"kind": "precomputed"})
    assert losses(stored) == pytest.approx(losses(live), rel=2e-3)
    files = {path.name for path in sorted((stored / "checkpoints").glob("step_*"))[-1].iterdir()}
    assert "teacher.safetensors" not in files and "model.safetensors" in files


def test_a_guide_of_another_width(tiny_tree: dict, tmp_path: Path):
    """Where no term compares it with the student; it is in the checkpoint like any other."""
    teacher = {"kind": "frozen", "start": guide_of(tiny_tree, tmp_path / "guide", embed_dim=24)}
    tree = tiny_tree | {"objective": {"gist": {}, "structure": {"weight": 1e-3}}, "teacher": teacher}
    folder = run(tree, "wide", save_every=32)
    assert tensors(folder, "teacher")["text_tower.text_projection"].shape == (32, 24)
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    before = losses(folder)
    shutil.rmtree(last)
    run(tree, "wide", resume=True, save_every=32)
    assert losses(folder) == before


def test_texts_alone_on_stored_features(tiny_tree: dict, stored_shards: str):
    """ProCLIP's first stage in small: the distance to the stored space falls, and pictures stay out of it."""
    tree = tiny_tree | {
        "objective": {"distill": {"reference_batch": 1}, "structure": {"reference_batch": 2}},
        "teacher": {"kind": "precomputed", "towers": "text"},
        "optim": {"lr": 1e-2},
    }
    tree["data"] = tree["data"] | {
        "train": [stored_shards], "text_features": "llm", "teacher_features": "clip", "negatives": 0, "augment": "none",
    }  # fmt: skip
    tree["model"] = tree["model"] | {"lock_image": True, "text": {"features": 16, "layers": 4}}
    folder = train(Config.model_validate(tree | {"name": "texts", "samples": 320}))
    found = losses(folder)
    assert len(found) == 20 and sum(found[-5:]) < 0.9 * sum(found[:5])
    model = tensors(folder, "model")
    assert model["text_tower.blocks.0.3.weight"].any() and not any("token" in name for name in model)
