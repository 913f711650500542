"""A text tower on stored features: where it begins, what it refuses, how it is saved and asked about new texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model.adapter import FeatureAdapter
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.load import load, save
from clipkit.model.teacher import Teacher
from clipkit.settings import ModelConfig, TeacherConfig, TextTower
from tests.model.tiny import CAPTIONS, CONTEXT, batch_of, tiny

WIDTH = 16


def reading(**text: object) -> ModelConfig:
    return tiny(text=TextTower(features=WIDTH, layers=4, context_length=CONTEXT, **text))  # type: ignore[arg-type]


@pytest.fixture
def model() -> DualEncoder:
    torch.manual_seed(0)
    return build(reading())


def stored() -> Batch:
    """The four pairs with features of their captions, negatives and one further caption."""
    g = torch.Generator().manual_seed(1)
    features = {"text": (4,), "negative_text": (4, 2), "positive_text": (4, 1)}
    tables = {f"{role}_features": torch.randn(*n, WIDTH, generator=g) for role, n in features.items()}
    return replace(batch_of(16), **tables)  # type: ignore[arg-type]


def test_it_begins_as_a_linear_map_of_the_normalised_features(model: DualEncoder):
    tower = model.text_tower
    assert isinstance(tower, FeatureAdapter) and len(tower.blocks) == 4
    u = 5 * torch.randn(6, WIDTH)
    unit = F.normalize(u, dim=-1)
    expected = F.normalize(tower.linear(F.layer_norm(unit, [WIDTH])), dim=-1)
    torch.testing.assert_close(model.encode_features(u), expected, rtol=0, atol=1e-6)


def test_blocks_add_up_as_written(model: DualEncoder):
    tower = model.text_tower
    u = torch.randn(3, WIDTH)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = u
    for norm, wide, _, narrow in tower.blocks:
        assert wide.weight.shape == (2 * WIDTH, WIDTH)
        x = x + narrow(F.gelu(wide(norm(x))))
    torch.testing.assert_close(tower(u), tower.linear(tower.norm(x)))


def test_every_role_is_read_from_its_features_and_learns(model: DualEncoder):
    batch = stored()
    z = model.train()(batch)
    assert z.text.shape == (4, 16) and z.negative_text.shape == (4, 2, 16) and z.positive_text.shape == (4, 1, 16)
    torch.testing.assert_close(z.negative_text[1, 0], model.encode_features(batch.negative_text_features[1, :1])[0])
    z.text.sum().backward()
    assert model.text_tower.linear.weight.grad is not None and model.image_tower.conv1.weight.grad is None
    without = model(replace(batch, text=batch.text[:, :3], negative_text_features=None))
    torch.testing.assert_close(without.text, z.text)
    assert without.negative_text is None
    with pytest.raises(UserError, match=r"model\.text\.features: 16, but the stored features are 8 wide"):
        model.encode_features(torch.ones(2, 8))


def test_saved_and_loaded_it_is_the_same(model: DualEncoder, tmp_path: Path):
    save(model, tmp_path)
    batch = stored()
    torch.testing.assert_close(load(tmp_path)(batch).text, model.eval()(batch).text, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"text\.layers: 4 there, 2 here"):
        build(tiny(start=str(tmp_path)))


def test_new_texts_need_the_model_that_made_the_features(model: DualEncoder, tmp_path: Path):
    with pytest.raises(UserError, match=r"reads stored features of texts, not texts.*model\.text\.embedder"):
        model.embed_texts(CAPTIONS)
    language = build(tiny())
    save(language, tmp_path / "language")
    knowing = build(reading(embedder=str(tmp_path / "language")))
    expected = knowing.encode_features(language.embed_texts(CAPTIONS)).detach()
    torch.testing.assert_close(knowing.embed_texts(CAPTIONS), expected, rtol=0, atol=1e-6)
    assert not any("embedder" in name for name in knowing.state_dict())
    save(knowing, tmp_path / "knowing")
    torch.testing.assert_close(load(tmp_path / "knowing").embed_texts(CAPTIONS), expected, rtol=0, atol=1e-6)
    ignorant = build(tiny(text=reading().text, start=str(tmp_path / "knowing")))
    torch.testing.assert_close(ignorant(stored()).text, knowing(stored()).text)


def test_it_stands_beside_a_named_image_tower(monkeypatch: pytest.MonkeyPatch):
    """`model.name` gives the picture's side and the width of the embedding."""
    from clipkit.model import dual_encoder

    named = build(tiny())
    parts = dual_encoder._from_settings(tiny())
    monkeypatch.setattr(dual_encoder, "from_open_clip", lambda name: parts)
    config = reading()
    model = build(ModelConfig(name="ViT-B-32", text=config.text))
    assert model.reads_features and not named.reads_features
    assert model.spec["text"] == {"layers": 4, "context_length": CONTEXT, "features": WIDTH, "embedder": ""}
    assert model.spec["image"] == named.spec["image"] and model(stored()).text.shape == (4, 16)


def test_its_teacher_reads_the_same_features_or_the_tokens(model: DualEncoder, tmp_path: Path):
    """An average of itself, or a frozen model with a transformer of its own."""
    batch = stored()
    ema = Teacher(model, TeacherConfig(kind="ema"), 10).embed(batch)
    assert ema is not None
    torch.testing.assert_close(ema.text, model.eval()(batch).text)
    other = build(tiny(text=TextTower(width=32, heads=2, layers=2)))
    save(other, tmp_path)
    found = Teacher(model, TeacherConfig(kind="frozen", start=str(tmp_path)), 10, roles=("text",)).embed(batch)
    assert found is not None
    torch.testing.assert_close(found.text, other.eval()(batch).text)


def test_it_starts_with_the_image_tower_of_a_model_that_reads_tokens(tmp_path: Path):
    """The other text tower stays behind; the image tower, its head and the scale are taken, and must fit."""
    torch.manual_seed(1)
    start = build(tiny(scale=20.0))
    save(start, tmp_path)
    torch.manual_seed(0)
    model, fresh = build(reading(embedder="x").model_copy(update={"start": str(tmp_path)})), build(reading())
    pixels = batch_of(16).image
    assert torch.equal(model.eval().encode_image(pixels), start.eval().encode_image(pixels))  # type: ignore[arg-type]
    assert model.scale.item() == pytest.approx(20.0) and model.text_tower.features == WIDTH
    assert model.text_tower.state_dict().keys() == fresh.text_tower.state_dict().keys()
    other = reading().model_copy(update={"start": str(tmp_path), "embed_dim": 8})
    with pytest.raises(UserError, match="embed_dim: 16 there, 8 here"):
        build(other)


def test_an_adapter_does_not_start_a_model_that_reads_tokens(model: DualEncoder, tmp_path: Path):
    save(model, tmp_path)
    with pytest.raises(UserError, match="of another architecture"):
        build(tiny(start=str(tmp_path)))
