"""Encoded in parts, a batch has the loss and the gradient of the whole, dropout included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipkit import config as configuration
from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model import dual_encoder
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.teacher import Teacher
from clipkit.objective import objective
from clipkit.training.accumulate import EmbeddingCache
from clipkit.training.engine import Engine
from clipkit.training.optim import build_optimizer
from tests.training.runs import first_batch


@pytest.fixture
def setting(tiny_tree: dict, tiny_tags: str) -> tuple[configuration.Config, DualEncoder, Teacher, Batch]:
    """A batch of 16 with ragged negatives; the text tower drops; a head for tags that not all pictures have."""
    tree = tiny_tree
    tree["model"] |= {"bias": -5.0}
    tree["model"]["text"] |= {"dropout": 0.3}
    tree["objective"] |= {"siglip": {}}
    tree["data"] |= {"positives": 1}
    tree["data"] |= {"tags": tiny_tags, "labels": True}
    tree["model"] |= {"heads": {"image": True, "tags": {"vocabulary": tiny_tags}}}
    tree["objective"] |= {"stc": {}, "class_similarity": {}}
    config, model, batch = first_batch(tree)
    return config, model, Teacher(model, config.teacher, 100), batch


def gradients(model: DualEncoder) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {name: grad.clone() for name, grad in found.items()}


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_parts_have_the_gradient_of_the_whole(
    setting: tuple[configuration.Config, DualEncoder, Teacher, Batch], parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole batch's texts fall into parts by length, which a part of the batch has too few for."""
    monkeypatch.setattr(dual_encoder, "BUCKET_TEXTS", 16)
    config, model, teacher, batch = setting
    begin = torch.get_rng_state()
    z = model(batch)
    z.teacher = teacher.embed(batch)
    whole, _ = objective(z, config.objective)
    whole.backward()
    expected, after = gradients(model), torch.get_rng_state()

    torch.set_rng_state(begin)
    cache = EmbeddingCache(model, batch.split(parts))
    z = cache.embeddings
    z.teacher = teacher.embed(batch, parts)
    loss, _ = objective(z, config.objective)
    loss.backward()
    for number in range(parts):
        cache.surrogate(number).backward()
    found = gradients(model)
    torch.testing.assert_close(loss, whole, atol=1e-6, rtol=1e-6)
    assert found.keys() == expected.keys() and {"log_scale", "bias", "heads.tags.weight"} <= found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(
            found[name], grad, atol=1e-6 * max(1.0, float(grad.abs().max())), rtol=1e-6, msg=name
        )
    assert torch.equal(torch.get_rng_state(), after), "the next step would draw other numbers"


def test_dropout_is_really_on(setting: tuple[configuration.Config, DualEncoder, Teacher, Batch]) -> None:
    _, model, _, batch = setting
    assert not torch.equal(model(batch).text, model(batch).text)


def test_a_batch_falls_into_equal_parts_in_order(
    setting: tuple[configuration.Config, DualEncoder, Teacher, Batch],
) -> None:
    batch = setting[3]
    batch.skipped = [("x.tar/1", "empty caption")]
    parts = batch.split(4)
    assert [len(part) for part in parts] == [4] * 4 and [len(part.skipped) for part in parts] == [1, 0, 0, 0]
    assert torch.equal(torch.cat([part.id for part in parts]), batch.id)
    assert batch.negative_text is not None and parts[3].negative_text is not None
    assert torch.equal(parts[3].negative_text, batch.negative_text[12:])


def test_what_cannot_be_cut_is_refused(tiny_tree: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"16 pairs cannot be split evenly over 1 ranks in 3 parts each"):
        Engine(configuration.validate(tiny_tree | {"engine": {"accumulate": 3}}))
    tree = tiny_tree | {"engine": {"accumulate": 2}}
    tree["model"] = tree["model"] | {"image": {"conv": [[8, 2], [16, 2]], "size": 16, "pool": "avg"}}
    config = configuration.validate(tree)
    model = build(config.model)
    with pytest.raises(UserError, match=r"engine.accumulate: 2 batch norms in a learning tower"):
        Engine(config).prepare(model, build_optimizer(model, config.optim))
