"""Towers: every way of building one, the exact cut of texts, dropout that no split changes, local weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers.attention_pool2d import AttentionPool2d
from torch import nn

from clipkit.errors import UserError
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.spec import custom_spec
from clipkit.model.towers import AttentionPool, TimmTower, build_towers, keep_mask, load_timm_weights, trims_exactly
from clipkit.settings import ImageTower, ModelConfig
from tests.model.tiny import CAPTIONS, CONTEXT, RESNET, TEXT, VISION, batch_of, tiny, tiny_resnet


def towers_with(**text: object) -> nn.Module:
    spec = custom_spec(tiny())
    return build_towers({**spec, "text": {**spec["text"], **text}}).text.eval()


def test_open_clip_tower_projects_itself_and_timm_tower_has_a_head():
    torch.manual_seed(0)
    ours, theirs = build(tiny()), build(tiny_resnet())
    assert isinstance(ours.image_head, nn.Identity)
    assert ours.image_features(batch_of(16).image).shape == (4, 16)
    assert isinstance(theirs.image_head, nn.Linear)
    assert theirs.image_features(batch_of(32).image).shape == (4, RESNET["channels"][-1])
    assert theirs.encode_image(batch_of(32).image).shape == (4, 16)


@pytest.mark.parametrize(
    ("name", "cfg", "size", "pool"),
    [
        ("resnet18", RESNET, 48, "attention"),
        ("resnet18", RESNET | {"output_stride": 8}, 96, "attention"),
        (
            "vit_tiny_patch16_224",
            {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 1, "num_heads": 2},
            64,
            "avg",
        ),
        ("mobilenetv2_050", {}, 64, "attention"),
    ],
)
def test_timm_towers_work_at_small_sizes(name: str, cfg: dict, size: int, pool: str):
    tower = TimmTower(name, cfg, pool=pool, size=size).eval()
    assert tower(torch.rand(2, 3, size, size)).shape == (2, tower.features)


def test_attention_pool_is_timms():
    """In value, and in the gradient of map and weights; but the keys' bias, which adds the same to every score."""
    pool = TimmTower("resnet18", RESNET, pool="attention", size=96).pool.double()
    assert isinstance(pool, AttentionPool)
    torch.manual_seed(0)
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    below = torch.randn(5, pool.in_features, *pool.feat_size, dtype=torch.float64, requires_grad=True)
    wanted = [below, *pool.parameters()]
    exact, fast = AttentionPool2d.forward(pool, below), pool(below)
    torch.testing.assert_close(fast, exact, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(exact)
    grads = (torch.autograd.grad(pooled, wanted, upstream) for pooled in (fast, exact))
    for got, expected in zip(*grads):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(pool(below, pre_logits=True), AttentionPool2d.forward(pool, below, pre_logits=True))


def test_attention_pool_sees_where_things_are():
    torch.manual_seed(0)
    pool = TimmTower("resnet18", RESNET, pool="attention", size=32).pool
    left, right = torch.zeros(2, 1, 16, 2, 2)
    left[..., 0], right[..., 1] = 1.0, 1.0
    assert torch.equal(left.mean((2, 3)), right.mean((2, 3)))
    assert not torch.allclose(pool(left), pool(right), atol=1e-3)


def test_cut_text_equals_padded_text():
    torch.manual_seed(0)
    model = build(tiny()).eval()
    cut = model.tokenizer(CAPTIONS)
    full = torch.nn.functional.pad(cut, (0, CONTEXT - cut.shape[1]))
    assert cut.shape[1] < CONTEXT
    with torch.no_grad():
        assert (model.encode_text(cut) - model.encode_text(full)).abs().max() <= 1e-6


def test_which_text_towers_may_be_cut():
    assert trims_exactly(towers_with())
    assert trims_exactly(towers_with(pool_type="eos", eos_id=49407))
    assert not trims_exactly(towers_with(no_causal_mask=True))
    assert not trims_exactly(towers_with(pool_type="last"))
    assert not trims_exactly(towers_with(embed_cls=True))
    assert not trims_exactly(nn.Linear(2, 2))


def test_dropout_depends_on_the_text_and_the_draw_but_not_on_the_split():
    torch.manual_seed(0)
    model = build(tiny(text=TEXT | {"dropout": 0.3}))
    tokens = model.tokenizer(CAPTIONS)

    def encode(*parts: torch.Tensor) -> torch.Tensor:
        encoded = []
        for part in parts:
            torch.manual_seed(7)
            encoded.append(model.encode_text(part))
        return torch.cat(encoded)

    whole = encode(tokens)
    short = tokens[2:, : tokens[2:].argmax(1).max() + 1]
    assert short.shape[1] < tokens.shape[1]
    torch.testing.assert_close(encode(tokens[:2], short), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(model.encode_text(tokens), whole)
    model.eval()
    assert torch.equal(model.encode_text(tokens), model.encode_text(tokens))


def test_dropout_mask_is_fair_and_independent():
    tokens = torch.randint(1, 49406, (64, 16), generator=torch.Generator().manual_seed(0))
    kept = keep_mask(tokens, 128, 0.25, salt=3).float()
    assert abs(kept.mean().item() - 0.75) < 0.005
    for axis in range(3):
        rates = kept.mean(dim=[a for a in range(3) if a != axis])
        assert (rates - 0.75).abs().max() < 0.05
    again = keep_mask(tokens, 128, 0.25, salt=4).float()
    assert abs(torch.corrcoef(torch.stack([kept.flatten(), again.flatten()]))[0, 1]) < 0.01
    neighbours = torch.stack([kept[..., :-1].flatten(), kept[..., 1:].flatten()])
    assert abs(torch.corrcoef(neighbours)[0, 1]) < 0.01


def root_model(rate: float) -> DualEncoder:
    torch.manual_seed(0)
    return build(tiny(image=ImageTower(timm="resnet18", cfg=RESNET, size=32, head="root", dropout=rate)))


def test_root_head_is_root_norm_linear():
    model = root_model(0.0)
    x = torch.tensor([[4.0, -9.0, 0.0, 1.0] * 4])
    rooted = torch.tensor([[2.0, -3.0, 0.0, 1.0] * 4])
    head = model.image_head
    expected = head.linear(torch.nn.functional.layer_norm(rooted, (16,)))
    torch.testing.assert_close(head(x), expected)
    learning = torch.zeros(1, 16, requires_grad=True)
    head(learning).sum().backward()
    assert learning.grad is not None and learning.grad.isfinite().all()


def test_dropout_of_the_root_head_depends_on_id_and_draw_but_not_on_the_split():
    head = root_model(0.5).image_head.train()
    x, id = torch.rand(8, 16), torch.arange(8)

    def encode(*parts: slice) -> torch.Tensor:
        out = []
        for part in parts:
            torch.manual_seed(7)
            out.append(head(x[part], id[part]))
        return torch.cat(out)

    whole = encode(slice(0, 8))
    torch.testing.assert_close(encode(slice(0, 3), slice(3, 8)), whole, rtol=0, atol=1e-6)
    assert not torch.allclose(head(x, id), whole) and not torch.allclose(head(x), whole)
    assert torch.equal(head.eval()(x, id), head(x))


def test_head_settings_that_would_be_ignored_are_refused():
    for image in (ImageTower(cfg=VISION, size=16, head="root"), ImageTower(timm="resnet18", cfg=RESNET, dropout=0.1)):
        with pytest.raises(UserError, match="head and dropout"):
            custom_spec(tiny(image=image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"timm": "resnet81"}, "no architecture called resnet81; did you mean resnet18"),
        ({"timm": "resnet18", "cfg": {"chanels": [1]}}, "timm cannot build resnet18 with"),
        ({"timm": "vit_tiny_patch16_224", "pool": "attention"}, "attention needs a feature map"),
        ({"cfg": VISION | {"widht": 3}}, "model.image.cfg.widht: no such setting; did you mean width"),
        (
            {"cfg": VISION | {"image_size": 32}, "size": 16},
            "model.image.cfg.image_size: 32, but model.image.size is 16",
        ),
        ({"cfg": VISION | {"head_width": 64}, "size": 16}, "open_clip cannot build image"),
    ],
)
def test_settings_that_cannot_be_built_are_explained(image: dict, message: str):
    with pytest.raises(UserError, match=message):
        build(tiny(image=ImageTower(**image)))


def test_local_timm_weights_round_trip_without_their_classifier(tmp_path: Path):
    import timm

    full = timm.create_model("resnet18", num_classes=7, **RESNET)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in full.state_dict().items()}, tmp_path / "w.safetensors"
    )
    config = tiny_resnet()
    config.image.weights = str(tmp_path / "w.safetensors")
    tower = build(config).image_tower.trunk
    for name, value in tower.state_dict().items():
        torch.testing.assert_close(value, full.state_dict()[name], rtol=0, atol=1e-3)


def test_local_timm_weights_of_another_network_are_refused(tmp_path: Path):
    tower = TimmTower("resnet18", RESNET, pool="avg", size=32)
    state = tower.trunk.state_dict()
    file = tmp_path / "w.safetensors"
    config = ImageTower(timm="resnet18", cfg=RESNET, size=32, weights=str(file))
    with pytest.raises(UserError, match="no such file"):
        load_timm_weights(tower, config)
    cases = {
        "the network does not know extra": state | {"extra": torch.zeros(1)},
        "the file misses conv1.weight": {k: v for k, v in state.items() if k != "conv1.weight"},
        "another shape of bn1.bias": state | {"bn1.bias": torch.zeros(3)},
    }
    for message, wrong in cases.items():
        save_file(wrong, file)
        with pytest.raises(UserError, match=message):
            load_timm_weights(tower, config)


def test_shared_mobilenet_is_complete_and_classifies(shared: Path):
    """Real weights and real pictures: flowers are named by the classifier that the file still carries."""
    file = shared / "data" / "mobilenetv2_100_same_fp16.safetensors"
    image = ImageTower(
        timm="mobilenetv2_100", cfg={"pad_type": "same"}, weights=str(file), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    model = build(ModelConfig(embed_dim=16, image=image, text=tiny().text, lock_image=True))
    weights = load_file(file)
    own = model.image_tower.trunk.state_dict()
    assert {k for k in own if not k.endswith("num_batches_tracked")} == {k for k in weights if "classifier" not in k}
    names = (shared / "data" / "mobilenetv2_imagenet_labels.txt").read_text().splitlines()
    logits = (
        pixels(model, daisies(shared)) @ weights["classifier.weight"].float().T + weights["classifier.bias"].float()
    )
    top = [names[i] for i in logits.argmax(1)]
    assert sum("daisy" in name for name in top) >= 6, top


def daisies(shared: Path) -> list[Image.Image]:
    import io
    import tarfile

    with tarfile.open(shared / "data" / "flowers5.tar") as tar:
        members = [m for m in tar if "daisy" in m.name and m.name.endswith(".jpg")][:8]
        return [Image.open(io.BytesIO(tar.extractfile(m).read())) for m in members]  # type: ignore[union-attr]


def pixels(model, pictures: list[Image.Image]) -> torch.Tensor:
    from clipkit.model.dual_encoder import load_pixels

    return model.image_features(torch.stack([load_pixels(picture, model.preprocess) for picture in pictures]))
