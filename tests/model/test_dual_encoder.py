"""The dual encoder: roles, locking, the scale's one-sided clamp, embedding of pictures and texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.errors import UserError
from clipkit.model import dual_encoder
from clipkit.model.dual_encoder import DualEncoder, build
from tests.model.tiny import CAPTIONS, NEGATIVES, batch_of, tiny, tiny_resnet


@pytest.fixture
def model() -> DualEncoder:
    torch.manual_seed(0)
    return build(tiny())


@pytest.fixture
def pictures(tmp_path: Path) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (5, 20, 30, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


def test_forward_encodes_every_role_to_unit_length(model: DualEncoder):
    batch = batch_of(16)
    z = model(batch)
    assert z.image.shape == z.text.shape == (4, 16)
    assert z.negative_text.shape == (4, 2, 16)
    for role in (z.image, z.text, z.negative_text):
        assert role.dtype == torch.float32
        torch.testing.assert_close(role.norm(dim=-1), torch.ones(role.shape[:-1]))
    assert z.valid is batch.valid and z.id is batch.id and z.group is batch.group
    torch.testing.assert_close(z.scale, torch.tensor([1 / 0.07]))
    assert z.bias is None


def test_negatives_stay_with_their_owner(model: DualEncoder):
    z = model.eval()(batch_of(16))
    alone = model.encode_text(model.tokenizer(NEGATIVES)).unflatten(0, (4, 2))
    torch.testing.assert_close(z.negative_text, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(z.text, model.encode_text(model.tokenizer(CAPTIONS)), rtol=0, atol=1e-6)


def test_tables_of_different_length_share_one_call(model: DualEncoder, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(model, "encode_text", lambda tokens: seen.append(tokens.shape) or torch.zeros(len(tokens), 16))
    batch = batch_of(16)
    short = batch.negative_text[..., :6]
    model(replace(batch, negative_text=short))
    model(replace(batch, text=batch.text[:, :5]))
    assert seen == [(12, batch.text.shape[1]), (12, batch.negative_text.shape[2])]


def test_batch_without_negatives(model: DualEncoder):
    z = model(replace(batch_of(16), negative_text=None, valid=None))
    assert z.negative_text is None and z.valid is None


def test_pixels_are_normalised_as_torchvision_does(model: DualEncoder, monkeypatch: pytest.MonkeyPatch):
    from torchvision.transforms.v2 import functional

    image = batch_of(16).image
    monkeypatch.setattr(model.image_tower, "forward", lambda pixels: pixels.flatten(1))
    mean, std = list(model.preprocess.mean), list(model.preprocess.std)
    expected = functional.normalize(image.float() / 255, mean, std).flatten(1)
    torch.testing.assert_close(model.image_features(image), expected, rtol=0, atol=1e-5)


def test_locked_tower_is_unmoved_by_a_training_step_and_its_head_learns():
    torch.manual_seed(0)
    model = build(tiny_resnet(lock_image=True)).train()
    assert not model.image_tower.training and model.text_tower.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    z = model(batch_of(32))
    (z.image * z.text).sum().neg().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("image_tower") for name in changed)
    assert {"image_head.weight", "image_head.bias"} <= changed
    assert all(p.grad is None for p in model.image_tower.parameters())


def test_unlocked_batch_norm_does_move():
    model = build(tiny_resnet()).train()
    before = model.image_tower.trunk.bn1.running_mean.clone()
    model(batch_of(32))
    assert not torch.equal(model.image_tower.trunk.bn1.running_mean, before)


def test_locked_text_has_no_graph():
    model = build(tiny(lock_text=True)).train()
    z = model(batch_of(16))
    assert not z.text.requires_grad and z.image.requires_grad and not model.text_tower.training


def test_cached_features_equal_pictures():
    model = build(tiny_resnet(lock_image=True)).train()
    batch = batch_of(32)
    ready = model.with_image_features(batch)
    assert ready.image_features.shape == (4, 16) and not ready.image_features.requires_grad
    cached = replace(ready, image=None)
    torch.testing.assert_close(model(cached).image, model(batch).image, rtol=0, atol=0)
    half = replace(cached, image_features=cached.image_features.half())
    torch.testing.assert_close(model(half).image, model(batch).image, rtol=0, atol=1e-2)


def test_pictures_in_pieces_equal_pictures_at_once(monkeypatch: pytest.MonkeyPatch):
    model = build(tiny_resnet()).eval()
    image = batch_of(32).image
    with torch.no_grad():
        whole = model.image_features(image)
        monkeypatch.setattr(dual_encoder, "CPU_PIXELS", 3 * 32 * 32)
        torch.testing.assert_close(model.image_features(image), whole, rtol=0, atol=1e-6)
        assert model.image_features(image[:0]).shape == (0, whole.shape[1])


def test_plain_attention_of_learning_texts_equals_the_fused_one(model: DualEncoder):
    tokens = batch_of(16).text
    with torch.no_grad():
        fused = model.encode_text(tokens)
    plain = model.encode_text(tokens)
    assert plain.requires_grad
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)

    def gradients(attention: Callable[..., object]) -> list[torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dual_encoder, "_attention", attention)
            loss = model.encode_text(tokens)[:, 0].square().sum()
        return list(torch.autograd.grad(loss, list(model.text_tower.parameters()), allow_unused=True))

    for mine, theirs in zip(gradients(dual_encoder._attention), gradients(lambda _: nullcontext())):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_locked_attention_pool_that_never_learned_is_refused():
    with pytest.raises(UserError, match="never learned"):
        build(tiny_resnet(pool="attention", lock_image=True))


def test_low_precision_weights_still_give_float32_unit_embeddings(model: DualEncoder):
    z = model.bfloat16()(batch_of(16))
    for role in (z.image, z.text, z.negative_text):
        assert role.dtype == torch.float32
        torch.testing.assert_close(role.norm(dim=-1), torch.ones(role.shape[:-1]))


def test_scale_and_bias_settings():
    model = build(tiny(scale=10.0, bias=-10.0, scale_max=50.0))
    assert model.log_scale.shape == (1,) and model.bias.shape == (1,)
    torch.testing.assert_close(model.scale, torch.tensor([10.0]))
    assert model(batch_of(16)).bias.item() == -10.0


@pytest.mark.parametrize(("direction", "moves"), [(-1.0, False), (1.0, True)])
def test_clamp_stops_only_steps_further_beyond_the_bound(model: DualEncoder, direction: float, moves: bool):
    """A descent step along -gradient: growing the scale (negative gradient) is stopped, shrinking it is not."""
    with torch.no_grad():
        model.log_scale.fill_(math.log(120.0))
    (direction * model.scale).sum().backward()
    torch.testing.assert_close(model.scale, torch.tensor([100.0]))
    assert (model.log_scale.grad.abs().item() > 0) is moves


def test_clamp_is_nothing_below_the_bound(model: DualEncoder):
    (-model.scale).sum().backward()
    torch.testing.assert_close(model.log_scale.grad, -model.scale.detach())


def test_pictures_are_the_same_as_objects_paths_and_arrays(model: DualEncoder, pictures: list, tmp_path: Path):
    paths = [tmp_path / f"{i}.png" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures):
        picture.save(path)
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    expected = model.embed_images(pictures)
    assert expected.dtype == torch.float32 and expected.shape == (5, 16)
    for same in (paths, [str(path) for path in paths], arrays, list(arrays)):
        torch.testing.assert_close(model.embed_images(same, batch_size=2), expected, rtol=0, atol=1e-6)


def test_texts_come_back_in_the_order_given(model: DualEncoder):
    texts = [*CAPTIONS, *NEGATIVES]
    one_by_one = torch.cat([model.embed_texts([text]) for text in texts])
    torch.testing.assert_close(model.embed_texts(texts, batch_size=5), one_by_one, rtol=0, atol=1e-6)


def test_texts_of_one_batch_are_as_long_as_each_other(model: DualEncoder):
    """Letters and tokens are not in step: what counts is the tokens."""
    texts = ["a b c d e f", "extraordinarily unremarkable", "dog", "internationalisation", "cat", "g h i j k l"]
    seen: list[tuple[int, ...]] = []
    model.text_tower.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    model.embed_texts(texts, batch_size=2)
    lengths = sorted(int((model.tokenizer([text]) != 0).sum()) for text in texts)
    assert seen == [(2, longest) for longest in lengths[1::2]]


def test_embedding_restores_the_mode_and_returns_ordinary_tensors(model: DualEncoder):
    model.train()
    texts = model.embed_texts(CAPTIONS)
    assert model.training and not texts.is_inference()
    assert model.embed_texts([]).shape == model.embed_images([]).shape == (0, 16)
    model.eval().embed_texts(CAPTIONS)
    assert not model.training


def test_training_works_after_embedding(model: DualEncoder, pictures: list):
    """What embedding caches under inference mode must not reach a later graph."""
    model.embed_images(pictures)
    model.train()(batch_of(16)).image.sum().backward()
    assert model.image_tower.conv1.weight.grad is not None


def test_unreadable_pictures_are_named(model: DualEncoder, tmp_path: Path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for path in (tmp_path / "broken.jpg", tmp_path / "absent.jpg"):
        with pytest.raises(UserError, match=path.name):
            model.embed_images([path])
    with pytest.raises(UserError, match="uint8 array"):
        model.embed_images([np.zeros((4, 4, 3), dtype=np.float32)])


def test_tower_of_fixed_length_gets_full_tokens():
    model = build(tiny())
    model.tokenizer.trim = False
    assert model.tokenizer(["short"]).shape == (1, 24)
    with pytest.raises(AssertionError, match="all 24 positions"):
        model.encode_text(model.tokenizer(["short"])[:, :5])


def test_texts_in_parts_by_length_equal_padded_texts(model: DualEncoder, monkeypatch: pytest.MonkeyPatch):
    """Value and gradient, with sixteen texts a part, as wide towers have on CPUs; CAPTIONS in pieces of all lengths."""
    monkeypatch.setattr(dual_encoder, "BUCKET_TEXTS", 16)
    words = " ".join(CAPTIONS).split()
    tokens = model.tokenizer([" ".join(words[start : start + 1 + start % 7]) for start in range(16 * 4)])
    lengths = (tokens.argmax(1) + 1).tolist()
    calls: list[list[int]] = []
    hook = model.text_tower.register_forward_pre_hook(lambda _, some: calls.append(list(some[0].shape)))
    model.encode_text(tokens)[:, 0].square().sum().backward()
    hook.remove()
    inside = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    padded = model.text_tower(torch.nn.functional.pad(tokens, (0, 24 - tokens.shape[1])))
    torch.nn.functional.normalize(padded.float(), dim=-1)[:, 0].square().sum().backward()
    assert [n for n, _ in calls] == [16] * 4 and [t for _, t in calls] == sorted(lengths)[15::16]
    assert calls[0][1] < calls[-1][1]
    for name, gradient in inside.items():
        expected = model.get_parameter(name).grad
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
    with torch.no_grad():
        expected = torch.nn.functional.normalize(padded.float(), dim=-1)
        torch.testing.assert_close(model.encode_text(tokens), expected, rtol=0, atol=1e-6)


def test_a_text_that_holds_token_0_keeps_its_end(model: DualEncoder):
    """CLIP's token 0 is a "!" that does not end a word; it is also what texts are padded with."""
    texts = ["a dog !~ b", "a"]
    tokens = model.tokenizer(texts)
    assert 0 in tokens[0, :-1] and tokens[0, -1] == 49407
    with torch.no_grad():
        together, padded = model.encode_text(tokens), model.text_tower(torch.nn.functional.pad(tokens, (0, 4)))
    torch.testing.assert_close(together, torch.nn.functional.normalize(padded.float(), dim=-1), atol=1e-6, rtol=0)
