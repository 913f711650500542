"""Patches and words of every kind of tower, and the dual encoder that compares them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipkit.data.batch import Batch
from clipkit.errors import UserError
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.embeddings import Embeddings
from clipkit.model.local import local_logits
from clipkit.model.spec import custom_spec
from clipkit.model.tokens import check_tokens, spoken, with_patches, with_words
from clipkit.model.towers import TimmTower, build_towers
from clipkit.objective import objective
from clipkit.settings import ImageTower
from clipkit.training.accumulate import EmbeddingCache
from tests.model.tiny import CAPTIONS, RESNET, VISION, batch_of, tiny, tiny_resnet

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
PICTURES: dict[str, tuple[dict[str, Any], int]] = {
    "open_clip": ({"cfg": VISION, "size": 16}, 4),
    "open_clip avg": ({"cfg": VISION | {"pool_type": "avg"}, "size": 16}, 4),
    "open_clip norm behind": ({"cfg": VISION | {"final_ln_after_pool": True}, "size": 16}, 4),
    "conv": ({"conv": [[8, 2], [16, 2]], "size": 16}, 16),
    "conv attention": ({"conv": [[8, 2], [16, 2]], "size": 16, "pool": "attention"}, 16),
    "timm map": ({"timm": "resnet18", "cfg": RESNET, "size": 32}, 4),
    "timm map, root": ({"timm": "resnet18", "cfg": RESNET, "size": 32, "head": "root", "dropout": 0.5}, 4),
    "timm map, attention": ({"timm": "resnet18", "cfg": RESNET, "size": 32, "pool": "attention"}, 4),
    "timm tokens": ({"timm": "vit_tiny_patch16_224", "cfg": VIT, "size": 32}, 16),
}


def model_of(kind: str) -> DualEncoder:
    torch.manual_seed(0)
    return build(tiny(image=ImageTower(**PICTURES[kind][0])))


@pytest.mark.parametrize("kind", PICTURES)
def test_features_stay_and_every_patch_is_there(kind: str):
    model, patches = model_of(kind).eval(), PICTURES[kind][1]
    size = model.preprocess.size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as the dual encoder hands them on
    check_tokens(model.image_tower, model.text_tower)
    with torch.no_grad():
        below, features = with_patches(model.image_tower, pixels), model.image_tower(pixels)
    assert below.shape == (2, 1 + patches, features.shape[1])
    # Attention pooling computes what it gives in another order than what it would give at every place.
    torch.testing.assert_close(below[:, 0], features, rtol=0, atol=1e-5 if "attention" in kind else 0)
    if "avg" in kind or kind in ("conv", "timm map", "timm map, root"):  # linear behind the pooling, or nothing
        torch.testing.assert_close(below[:, 1:].mean(1), features, rtol=0, atol=1e-5)


def test_patches_of_a_vit_are_normed_and_projected():
    tower: Any = model_of("open_clip").eval().image_tower
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        last = tower.transformer(tower._embeds(pixels))
        expected = tower.ln_post(last) @ tower.proj
        torch.testing.assert_close(with_patches(tower, pixels), expected, rtol=0, atol=1e-6)


def test_cells_of_a_map_go_through_what_follows_the_pooling():
    """MobileNetV3 has a convolution there, and the average of what it makes is not what it makes of the average."""
    tower = TimmTower("mobilenetv3_small_050", {}, pool="avg", size=64).eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        below = with_patches(tower, pixels)
        cell = tower.trunk.forward_features(pixels)[:, :, 1:, 1:]
        assert below.shape == (2, 5, tower.features) and torch.equal(below[:, 0], tower(pixels))
        torch.testing.assert_close(below[:, 4], tower.trunk.forward_head(cell), rtol=0, atol=1e-6)


def test_tokens_of_a_timm_vit_are_normed_as_their_average():
    tower: Any = model_of("timm tokens").eval().image_tower
    with torch.no_grad():
        tower.trunk.fc_norm.weight.uniform_(0.5, 2.0)
        pixels = torch.rand(2, 3, 32, 32)
        expected = tower.trunk.fc_norm(tower.trunk.forward_features(pixels)[:, 1:])
        torch.testing.assert_close(with_patches(tower, pixels)[:, 1:], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "text", [{}, {"proj_bias": True}, {"proj_type": "none"}, {"pool_type": "eos", "eos_id": 49407}]
)
def test_words_are_normed_and_projected(text: dict[str, Any]):
    spec = custom_spec(tiny(embed_dim=32))
    tower: Any = build_towers({**spec, "text": {**spec["text"], **text}}).text.eval()
    tokens = batch_of(16).text
    with torch.no_grad():
        below = with_words(tower, tokens)
        assert torch.equal(below[:, 0], tower(tokens))
    end = tokens.argmax(1)
    torch.testing.assert_close(below[torch.arange(4), 1 + end], below[:, 0], rtol=0, atol=1e-6)
    said = spoken(tower, tokens)
    assert said.sum(1).tolist() == end.tolist() and not said[:, 0].any() and said[torch.arange(4), end].all()
    assert not spoken(tower, torch.zeros(2, 3, 5, dtype=torch.long)).any()


def test_a_token_that_looks_like_padding_is_spoken():
    model = build(tiny())
    tokens = model.tokenizer(["a dog !~ b", "a"])
    assert (tokens[0] == 0).any() and spoken(model.text_tower, tokens).sum(1).tolist() == [tokens.shape[1] - 1, 2]


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ({"cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 2}, "size": 16}, {}, "VisionTransformer"),
        ({"timm": "swin_tiny_patch4_window7_224", "cfg": {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 8,
          "img_size": 56}, "size": 56}, {}, "SwinTransformer"),
        ({"cfg": VISION, "size": 16}, {"pool_type": "last"}, r"text tower \(TextTransformer\) gives no words"),
        ({"cfg": VISION, "size": 16}, {"embed_cls": True}, r"text tower \(TextTransformer\) gives no words"),
    ],
)  # fmt: skip
def test_towers_without_patches_or_words_are_refused(image: dict[str, Any], text: dict[str, Any], message: str):
    spec = custom_spec(tiny(image=ImageTower(**image)))
    towers = build_towers({**spec, "text": {**spec["text"], **text}})
    with pytest.raises(UserError, match=message):
        check_tokens(towers.image, towers.text)


# the dual encoder


def compared(model: DualEncoder, batch: Batch) -> Embeddings:
    model.compare_locally()
    return model(batch)


@pytest.mark.parametrize("kind", PICTURES)
def test_comparing_changes_no_embedding(kind: str):
    model = model_of(kind).eval()
    plain = replace(batch_of(model.preprocess.size), view_image=None)
    other = torch.randint(0, 256, (4, 2, *plain.image.shape[1:]), dtype=torch.uint8)  # type: ignore[union-attr]
    batch = replace(plain, view_image=other, negative_image=other.flip(0))
    with torch.no_grad():
        before, z = model(batch), compared(model, batch)
    assert before.local_logit is None and before.negative_local_logit is None
    for name in ("image", "text", "negative_text", "view_image", "negative_image"):
        torch.testing.assert_close(getattr(z, name), getattr(before, name), rtol=0, atol=1e-6, msg=name)
    assert z.local_logit is not None and z.local_logit.shape == (4,)
    assert z.negative_local_logit is not None and z.negative_local_logit.shape == (4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(batch)
    for name in ("image", "local_logit", "negative_local_logit"):
        assert getattr(low, name).dtype == torch.float32
        torch.testing.assert_close(getattr(low, name), getattr(z, name), rtol=0.1, atol=0.1, msg=name)


def test_scores_are_those_of_patches_and_words():
    model, batch = model_of("open_clip").eval(), batch_of(16)
    z = compared(model, batch)
    assert batch.image is not None and batch.negative_text is not None
    with torch.no_grad():
        patches = model._features(batch.image, lambda pixels: with_patches(model.image_tower, pixels))[:, 1:]
        for row in range(4):
            tokens = batch.negative_text[row, 1:, : int(batch.negative_text[row, 1].argmax()) + 1]
            words = with_words(model.text_tower, tokens)[:, 2:]  # neither the pooled one nor the start
            expected = local_logits(patches[row : row + 1], words, torch.ones(words.shape[:2]).bool(), model.scale)
            torch.testing.assert_close(z.negative_local_logit[row, 1:], expected, rtol=0, atol=1e-5)  # type: ignore


TERMS = {"infonce": {}, "fsc_global": {"weight": 0.5}, "fsc_local": {"weight": 0.2}}


def slopes(model: DualEncoder, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("kind", ["open_clip", "timm tokens"])
def test_parts_of_the_batch_have_the_slopes_of_the_whole(kind: str):
    """Each cut to its own longest text, as ranks would, or encoded twice, as accumulation does."""
    model = model_of(kind)
    model.compare_locally()
    batch = batch_of(model.preprocess.size)
    whole, _ = objective(model(batch), TERMS)
    expected = slopes(model, whole)
    assert expected["log_scale"].abs() > 1e-3

    parts = [cut(part) for part in batch.split(2)]
    assert parts[0].text.shape != parts[1].text.shape
    several, _ = objective(Embeddings.join([model(part) for part in parts]), TERMS)
    torch.testing.assert_close(several, whole)
    close(slopes(model, several), expected)

    cache = EmbeddingCache(model, parts)
    loss, _ = objective(cache.embeddings, TERMS)
    loss.backward()
    for number in range(2):
        cache.surrogate(number).backward()
    close({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, expected)


def cut(batch: Batch) -> Batch:
    assert batch.negative_text is not None
    longest = [int(table.argmax(-1).max()) + 1 for table in (batch.text, batch.negative_text)]
    return replace(batch, text=batch.text[:, : longest[0]], negative_text=batch.negative_text[..., : longest[1]])


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        atol = 1e-5 * max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=atol, msg=name)


def test_locked_towers_are_compared_too():
    torch.manual_seed(0)
    model = build(tiny_resnet(lock_image=True)).train()
    batch = model.with_image_features(batch_of(32))
    z = compared(model, batch)
    loss, _ = objective(z, {"fsc_local": {}})
    found = slopes(model, loss)
    assert {"image_head.weight", "log_scale"} <= found.keys() and not any("image_tower" in name for name in found)


def test_many_texts_in_parts_by_length(monkeypatch: pytest.MonkeyPatch):
    from clipkit.model import dual_encoder

    model = model_of("open_clip").eval()
    monkeypatch.setattr(dual_encoder, "BUCKETS", 1)
    tokens = model.tokenizer(CAPTIONS * 130)
    with torch.no_grad():
        whole = model._with_words(tokens)
        monkeypatch.setattr(dual_encoder, "BUCKETS", 4)
        parts = model._with_words(tokens)
    said = nn.functional.pad(spoken(model.text_tower, tokens), (1, 0), value=True)
    torch.testing.assert_close(parts[said], whole[said], rtol=0, atol=1e-5)
