"""The teacher: its average by hand, warm-up, precision, what it shares, leaves out and saves; other teachers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.errors import UserError
from clipkit.model.dual_encoder import build
from clipkit.model.load import save
from clipkit.model.teacher import Teacher
from clipkit.settings import TeacherConfig, TextTower
from tests.model.tiny import batch_of, tiny, tiny_resnet

EMA = TeacherConfig(kind="ema")


def test_decay_leaves_half_after_the_half_life():
    teacher = Teacher(build(tiny()), TeacherConfig(kind="ema", half_life=0.25), steps=40)
    assert teacher.decay**10 == pytest.approx(0.5)
    assert Teacher(build(tiny()), EMA, steps=8090).decay == pytest.approx(0.9996, abs=1e-6)


def test_average_equals_the_loop_by_hand():
    student = build(tiny())
    teacher = Teacher(student, TeacherConfig(kind="ema", half_life=0.5), steps=4)
    by_hand = student.text_tower.ln_final.weight.detach().double().clone()
    for step in range(3):
        with torch.no_grad():
            student.text_tower.ln_final.weight.add_(step + 1.0)
        teacher.update(student)
        by_hand = teacher.decay * by_hand + (1 - teacher.decay) * student.text_tower.ln_final.weight.detach()
    torch.testing.assert_close(teacher.model.text_tower.ln_final.weight.double(), by_hand, rtol=1e-6, atol=0)


def test_frozen_stays():
    student = build(tiny())
    teacher = Teacher(student, TeacherConfig(kind="frozen"), steps=4)
    before = teacher.state()["log_scale"].clone()
    with torch.no_grad():
        student.log_scale.add_(1.0)
    teacher.update(student)
    assert torch.equal(teacher.state()["log_scale"], before)


def test_fresh_teacher_sees_what_the_student_sees_without_graph_or_dropout():
    student = build(tiny(text={"width": 32, "heads": 2, "layers": 1, "context_length": 24, "dropout": 0.5})).train()
    teacher = Teacher(student, EMA, steps=10)
    z = teacher.embed(batch_of(16))
    expected = student.eval()(batch_of(16))
    for role in ("image", "text", "negative_text"):
        assert not getattr(z, role).requires_grad
        torch.testing.assert_close(getattr(z, role), getattr(expected, role), rtol=0, atol=1e-6)
    assert student.log_scale.requires_grad and not teacher.model.log_scale.requires_grad


def test_float32_under_a_bf16_student_moves_by_steps_bf16_cannot_hold():
    student = build(tiny()).bfloat16()
    teacher = Teacher(student, EMA, steps=8090)
    weight = student.text_tower.ln_final.weight
    with torch.no_grad():
        weight.fill_(2.0)
    for _ in range(100):
        teacher.update(student)
    assert weight.dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in teacher.state().values())
    expected = torch.full((32,), 2 - teacher.decay**100)
    torch.testing.assert_close(teacher.model.text_tower.ln_final.weight, expected, rtol=1e-5, atol=0)


def test_batch_norm_statistics_move_along():
    student = build(tiny_resnet()).train()
    teacher = Teacher(student, EMA, steps=2)
    student(batch_of(32))
    teacher.update(student)
    mine, theirs = teacher.model.image_tower.trunk.bn1, student.image_tower.trunk.bn1
    torch.testing.assert_close(mine.running_mean, (1 - teacher.decay) * theirs.running_mean)
    assert mine.num_batches_tracked == theirs.num_batches_tracked == 1


def test_locked_tower_is_shared_runs_once_and_is_not_saved():
    student = build(tiny_resnet(lock_image=True)).train()
    teacher = Teacher(student, EMA, steps=10)
    assert teacher.model.image_tower is student.image_tower
    assert teacher.model.image_head is not student.image_head
    assert not any(name.startswith("image_tower") for name in teacher.state())
    passes = []
    handle = student.image_tower.register_forward_hook(lambda *_: passes.append(1))
    batch = student.with_image_features(batch_of(32))
    torch.testing.assert_close(teacher.embed(batch).image, student(batch).image.detach(), rtol=0, atol=1e-6)
    handle.remove()
    assert len(passes) == 1


def test_shared_tower_keeps_the_type_of_a_bf16_student():
    student = build(tiny_resnet(lock_image=True)).bfloat16()
    teacher = Teacher(student, EMA, steps=10)
    assert next(student.image_tower.parameters()).dtype == torch.bfloat16
    assert teacher.model.image_head.weight.dtype == torch.float32
    assert teacher.embed(batch_of(32)).image.dtype == torch.float32


def test_state_round_trip(tmp_path):
    student = build(tiny())
    teacher = Teacher(student, EMA, steps=3)
    with torch.no_grad():
        student.log_scale.add_(1.0)
    teacher.update(student)
    save_file(teacher.state(), tmp_path / "teacher.safetensors")
    other = Teacher(build(tiny()), EMA, steps=3)
    other.load_state(load_file(tmp_path / "teacher.safetensors"))
    for name, value in teacher.state().items():
        assert torch.equal(other.state()[name], value)


def test_state_of_another_architecture_is_refused():
    wide = Teacher(build(tiny(embed_dim=8)), EMA, steps=3).state()
    teacher = Teacher(build(tiny()), EMA, steps=3)
    with pytest.raises(UserError, match=r"another architecture, e\.g\. image_tower\.proj"):
        teacher.load_state(wide)
    with pytest.raises(UserError, match="the checkpoint holds none"):
        teacher.load_state({})


# half-life, warm-up


def test_half_life_in_samples_does_not_depend_on_the_run():
    config = TeacherConfig(kind="ema", half_life_samples=640)
    for steps in (40, 4000):
        assert Teacher(build(tiny()), config, steps, batch_size=64).decay ** 10 == pytest.approx(0.5)


def test_during_the_warm_up_the_half_life_grows_with_the_steps():
    """From following at once to the full length, and never beyond it."""
    config = TeacherConfig(kind="ema", half_life_samples=640, warmup=256)
    teacher = Teacher(build(tiny()), config, 40, batch_size=32)
    half_lives = [-1 / math.log2(teacher.decay_at(step)) for step in range(1, 12)]
    assert half_lives == pytest.approx([20 * min(step, 8) / 8 for step in range(1, 12)])
    plain = Teacher(build(tiny()), TeacherConfig(kind="ema", half_life_samples=640), 40, batch_size=32)
    assert plain.decay_at(1) == plain.decay_at(30) == teacher.decay_at(8) == teacher.decay == plain.decay


def test_warm_up_follows_the_student_more_closely():
    student = build(tiny())
    slow, warm = (
        Teacher(student, TeacherConfig(kind="ema", half_life=0.5, warmup=steps), steps=100) for steps in (0, 50)
    )
    weight = student.text_tower.ln_final.weight
    for step in range(1, 11):
        with torch.no_grad():
            weight.add_(1.0)
        for teacher in (slow, warm):
            teacher.update(student, step)
    behind = [(weight - teacher.model.text_tower.ln_final.weight).mean().item() for teacher in (slow, warm)]
    assert 0 < behind[1] < 0.7 * behind[0]
    by_hand, value = 1.0, 1.0
    for step in range(1, 11):
        value += 1.0
        by_hand += (1 - 0.5 ** (1 / (50 * step / 50))) * (value - by_hand)
    assert warm.model.text_tower.ln_final.weight.mean().item() == pytest.approx(by_hand, rel=1e-5)


# roles and towers


@pytest.mark.parametrize(
    ("roles", "kept"),
    [(("text",), "text_tower"), (("text", "negative_text"), "text_tower"), (("image",), "image_tower"), ((), "both")],
)
def test_what_no_term_looks_at_is_neither_encoded_nor_kept(roles: tuple[str, ...], kept: str):
    torch.manual_seed(0)
    student = build(tiny())
    whole, some = Teacher(student, EMA, 10), Teacher(student, EMA, 10, roles=roles)
    batch = batch_of(16)
    expected, found = whole.embed(batch), some.embed(batch)
    assert expected is not None and (found is None) == (not roles)
    for role in ("image", "text", "negative_text"):
        if found is not None and role in roles:
            assert torch.equal(getattr(found, role), getattr(expected, role))
        elif found is not None:
            assert getattr(found, role) is None and len(found) == 4
    towers = {name.partition(".")[0] for name in some.state()} & {"text_tower", "image_tower"}
    assert towers == ({"text_tower", "image_tower"} if kept == "both" else {kept})
    assert all(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    for teacher in (whole, some):
        teacher.update(student)
    for name, value in some.state().items():
        assert torch.equal(value, whole.state()[name])


# another model, stored embeddings


def test_another_model_as_teacher(tmp_path):
    """Of another width, with its own pixel statistics; the student's stored features are not for it."""
    torch.manual_seed(0)
    guide = build(tiny(embed_dim=24, text=TextTower(width=16, heads=2, layers=1)))
    guide.preprocess = replace(guide.preprocess, mean=(0.4, 0.4, 0.4))
    save(guide, tmp_path)
    student = build(tiny(lock_image=True))
    teacher = Teacher(student, TeacherConfig(kind="frozen", start=str(tmp_path)), 10)
    batch = student.with_image_features(batch_of(16))
    found, expected = teacher.embed(batch, 2), guide.eval()(batch_of(16))
    assert found is not None and found.width == 24
    for role in ("image", "text", "negative_text"):
        torch.testing.assert_close(getattr(found, role), getattr(expected, role).detach(), rtol=0, atol=1e-6)
    teacher.update(student)
    assert torch.equal(teacher.state()["log_scale"], guide.log_scale)
    wide = Teacher(student, TeacherConfig(kind="frozen", start=str(tmp_path)), 10, as_wide=True)
    with pytest.raises(UserError, match="its embeddings have 24 dimensions, the student's 16"):
        wide.embed(batch)


@pytest.mark.parametrize(
    ("other", "roles", "reason"),
    [
        (tiny_resnet(), ("image", "text"), "pictures with size 32, the student 16"),
        (
            tiny(text=TextTower(width=32, heads=2, context_length=8)),
            ("text",),
            "texts of 8 tokens, the student up to 24",
        ),
        (tiny(text=TextTower(features=4)), ("text",), "reads stored features of texts, the student tokens"),
    ],
)
def test_a_model_that_cannot_read_the_batches_is_refused(tmp_path, other, roles: tuple[str, ...], reason: str):
    save(build(other), tmp_path)
    with pytest.raises(UserError, match=f"{reason}; write its embeddings into the shards instead"):
        Teacher(build(tiny()), TeacherConfig(kind="frozen", start=str(tmp_path)), 10, roles=roles)


def test_a_tower_that_nothing_looks_at_need_not_fit(tmp_path):
    save(build(tiny_resnet()), tmp_path)
    teacher = Teacher(build(tiny()), TeacherConfig(kind="frozen", start=str(tmp_path)), 10, roles=("text",))
    found = teacher.embed(batch_of(16))
    assert found is not None and found.image is None and not any("image" in name for name in teacher.state())


def test_precomputed_embeddings_come_from_the_batch():
    generator = torch.Generator().manual_seed(0)
    stored = {f"teacher_{role}": torch.randn(*shape, 6, generator=generator) for role, shape in STORED.items()}
    batch = replace(batch_of(16), **stored)
    teacher = Teacher(build(tiny()), TeacherConfig(kind="precomputed"), 10, roles=("image", "text", "negative_text"))
    found, parts = teacher.embed(batch), teacher.embed(batch, 2)
    assert found is not None and parts is not None and teacher.state() == {}
    for role in STORED:
        expected = torch.nn.functional.normalize(stored[f"teacher_{role}"], dim=-1)
        assert torch.equal(getattr(found, role), expected) and torch.equal(getattr(parts, role), expected)
    teacher.update(build(tiny()))
    teacher.load_state({})


STORED = {"image": (4,), "text": (4,), "negative_text": (4, 2)}
