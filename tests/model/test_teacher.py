"""The teacher: its average by hand, its precision, what it shares, what it saves."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.config import TeacherConfig
from clipkit.errors import UserError
from clipkit.model.dual_encoder import build
from clipkit.model.teacher import Teacher
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
    with pytest.raises(UserError, match="another architecture"):
        teacher.load_state({})
