"""Heads: projections that begin as the identity, a classifier of tags; how they are saved, begun from, left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkit.errors import UserError
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.load import load, save, weights_into
from clipkit.model.spec import check_start
from clipkit.model.teacher import Teacher
from clipkit.settings import ModelConfig, TeacherConfig
from tests.model.tiny import CAPTIONS, batch_of, tiny, tiny_resnet

WORDS = ["cube", "dog", "cat"]


@pytest.fixture
def words(tmp_path: Path) -> str:
    return vocabulary_file(tmp_path / "words.txt", WORDS)


def vocabulary_file(path: Path, words: list[str]) -> str:
    path.write_text("\n".join(words))
    return str(path)


def made(config: ModelConfig) -> DualEncoder:
    torch.manual_seed(0)
    return build(config)


def both(words: str, **tags: Any) -> dict[str, Any]:
    return {"image": True, "text": True, "tags": {"vocabulary": words, **tags}}


def test_projections_begin_as_the_identity(words: str) -> None:
    batch, plain = batch_of(16), made(tiny())
    z, expected = made(tiny(heads=both(words)))(batch), plain(batch)
    for role in ("image", "text", "negative_text"):
        assert torch.equal(getattr(z, role), getattr(expected, role)), role
    assert expected.tag_logits is None and "heads" not in plain.spec and not plain.tag_words


@pytest.mark.parametrize("on", ["features", "embedding"])
@pytest.mark.parametrize("towers", [tiny, tiny_resnet])
def test_tag_logits_are_linear_in_what_they_read(on: str, towers: Any, words: str) -> None:
    config = towers(heads=both(words, on=on))
    model, batch = made(config).eval(), batch_of(config.image.size)
    z = model(batch)
    assert z.tag_logits is not None and z.tag_logits.shape == (4, 3) and model.tag_words == WORDS
    read = z.image if on == "embedding" else model.image_features(batch.image)
    assert torch.equal(z.tag_logits, model.heads["tags"](read))
    assert read.shape[1] == (config.embed_dim if on == "embedding" or towers is tiny else 16)
    pictured = replace(batch, negative_image=batch.image[:, None])  # type: ignore[index]
    torch.testing.assert_close(model(pictured).tag_logits, z.tag_logits, rtol=0, atol=1e-6)
    stored = replace(batch, image=None, image_features=model.image_features(batch.image))
    assert torch.equal(model(stored).tag_logits, z.tag_logits)  # type: ignore[arg-type]


def test_the_root_heads_features(words: str) -> None:
    config = tiny_resnet(heads={"tags": {"vocabulary": words}})
    config = config.model_copy(update={"image": config.image.model_copy(update={"head": "root", "dropout": 0.5})})
    assert made(config).heads["tags"].in_features == 16


def test_heads_learn_on_locked_towers(words: str) -> None:
    model = made(tiny(heads=both(words), lock_image=True, lock_text=True)).train()
    z = model(batch_of(16))
    assert z.tag_logits is not None
    ((z.image * z.text).sum() + z.tag_logits.square().sum() + z.scale.sum()).backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {"log_scale", *(f"heads.{name}" for name, _ in model.heads.named_parameters())}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == learning


def test_embedding_functions_go_through_the_projections(words: str) -> None:
    model = made(tiny(heads=both(words))).eval()
    before = model.embed_texts(CAPTIONS)
    with torch.no_grad():
        model.heads["text"].weight.copy_(-torch.eye(16))
    torch.testing.assert_close(model.embed_texts(CAPTIONS), -before)
    torch.testing.assert_close(model.embed_texts(CAPTIONS), model(batch_of(16)).text, rtol=0, atol=1e-6)


def test_round_trip(words: str, tmp_path: Path) -> None:
    model = made(tiny(heads=both(words, on="embedding"))).eval()
    save(model, tmp_path / "a")
    Path(words).unlink()  # the checkpoint knows the words
    again = load(tmp_path / "a", device="cpu")
    assert again.spec == model.spec and again.tag_words == WORDS
    batch = batch_of(16)
    assert torch.equal(again(batch).tag_logits, model(batch).tag_logits)  # type: ignore[arg-type]
    save(again, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_start_with_other_heads(words: str, tmp_path: Path) -> None:
    """New heads keep their beginning, known ones come along, a tag head may stay behind, a projection may not."""
    save(made(tiny()), tmp_path / "plain")
    save(made(tiny(heads=both(words))), tmp_path / "headed")
    torch.manual_seed(1)
    fresh = build(tiny(heads=both(words), start=str(tmp_path / "plain")))
    headed = load(tmp_path / "headed", device="cpu")
    assert torch.equal(fresh.text_tower.ln_final.weight, headed.text_tower.ln_final.weight)
    assert not torch.equal(fresh.heads["tags"].weight, headed.heads["tags"].weight)
    same = tiny(heads=both(words), start=str(tmp_path / "headed"))
    check_start(same)
    assert torch.equal(build(same).heads["tags"].weight, headed.heads["tags"].weight)
    assert "tags" not in build(tiny(heads={"image": True, "text": True}, start=str(tmp_path / "headed"))).heads
    with pytest.raises(UserError, match=r"tensor heads\.image\.weight: \[16, 16\] there, missing here"):
        build(tiny(start=str(tmp_path / "headed")))


def test_another_vocabulary_is_one_short_message(tmp_path: Path) -> None:
    one, other = ([f"word{number}" for number in range(1000)] + [last] for last in ("cat", "cow"))
    save(build(tiny(heads={"tags": {"vocabulary": vocabulary_file(tmp_path / "one.txt", one)}})), tmp_path / "a")
    heads = {"tags": {"vocabulary": vocabulary_file(tmp_path / "other.txt", other)}}
    for start in (check_start, build):
        with pytest.raises(UserError, match=r'heads\.tags\.words: \["word0".*"cat"\] there, .*"cow"\] here') as caught:
            start(tiny(heads=heads, start=str(tmp_path / "a")))
        assert len(str(caught.value)) < 500


def test_a_teacher_follows_projections_and_has_no_tag_head(words: str) -> None:
    student = made(tiny(heads=both(words), lock_image=True, lock_text=True))
    teacher = Teacher(student, TeacherConfig(kind="ema", half_life=0.5), steps=1)
    with torch.no_grad():
        student.heads["image"].weight.zero_()
    teacher.update(student)
    assert teacher.decay == 0.25
    torch.testing.assert_close(teacher.model.heads["image"].weight, 0.25 * torch.eye(16))
    assert teacher.embed(batch_of(16)).tag_logits is None and student(batch_of(16)).tag_logits is not None
    assert not any("tags" in name for name in teacher.state())


def test_aspects_are_projections_of_the_embeddings() -> None:
    """Unit length, of each tower's own layers; behind each what the one network for temperatures makes of it."""
    model, batch = made(tiny(heads={"aspects": {"count": 3, "width": 5}})), batch_of(16)
    z, heads = model(batch), model.heads["aspects"]
    assert z.image_aspects.shape == z.text_aspects.shape == (4, 3, 2, 5)
    for tower in ("image", "text"):
        found = getattr(z, f"{tower}_aspects")
        for number, layers in enumerate(getattr(heads, tower)):
            seen = torch.nn.functional.normalize(layers(getattr(z, tower)), dim=1)
            torch.testing.assert_close(found[:, number, 0], seen, rtol=0, atol=1e-6)
            torch.testing.assert_close(found[:, number, 1], heads.temperature(seen), rtol=0, atol=1e-6)
    sum(x.square().sum() for x in (z.image_aspects[:, :, 1], z.text_aspects[:, :, 1])).backward()  # type: ignore[union-attr]
    assert all(weight.grad is not None for weight in heads.parameters())


def test_aspects_are_saved_and_left_behind(tmp_path: Path) -> None:
    model, batch = made(tiny(heads={"aspects": {"count": 2}})).eval(), batch_of(16)
    save(model, tmp_path)
    again = load(tmp_path).eval()
    assert torch.equal(again(batch).text_aspects, model(batch).text_aspects)  # type: ignore[arg-type]
    without = build(tiny(start=str(tmp_path)))
    check_start(tiny(start=str(tmp_path)))
    weights_into(without, tmp_path)
    assert torch.equal(without.eval()(batch).image, model(batch).image) and "aspects" not in without.heads
    teacher = Teacher(model, TeacherConfig(kind="ema"), 10)
    assert teacher.embed(batch).image_aspects is None and teacher.embed(batch).image is not None
