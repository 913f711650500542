"""Saving, starting from and loading: every kind of reference, and the activation that no tensor shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from clipkit.errors import UserError
from clipkit.model.dual_encoder import build
from clipkit.model.load import load, load_checkpoint, save, weights_into
from clipkit.model.names import resolve
from clipkit.model.spec import check_start, find_checkpoint
from tests.model.tiny import CAPTIONS, TEXT, VISION, batch_of, tiny, tiny_resnet

TINY = {"embed_dim": 16, "vision_cfg": VISION | {"image_size": 16}, "text_cfg": TEXT | {"vocab_size": 49408}}


@pytest.fixture(autouse=True)
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip knows `tiny`, `tiny-quickgelu` and a tag `tuned`, trained with QuickGELU, as ViT-B-32 has `openai`."""
    names = {"tiny": TINY, "tiny-quickgelu": TINY | {"quick_gelu": True}}
    known, tags = open_clip.factory._MODEL_CONFIGS, open_clip.pretrained._PRETRAINED
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known | names)
    tag = {"tuned": tags["ViT-B-32"]["openai"]}
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", tags | dict.fromkeys(names, tag))


def open_clip_file(path: Path, *, quick_gelu: bool) -> tuple[Any, Path]:
    """A random open_clip model and its weights, as open_clip's trainer leaves them: no word about the activation."""
    torch.manual_seed(1)
    kind = open_clip.CustomTextCLIP(16, TINY["vision_cfg"], TINY["text_cfg"], quick_gelu=quick_gelu)
    nn.init.constant_(kind.logit_scale, 3.0)
    save_file(kind.state_dict(), path)
    return kind.eval(), path


def assert_same_embeddings(model: Any, original: Any) -> None:
    batch = batch_of(16)
    with torch.no_grad():
        z = model.eval()(batch)
        full = nn.functional.pad(batch.text, (0, 24 - batch.text.shape[1]))
        text = nn.functional.normalize(original.text(full), dim=-1)
    torch.testing.assert_close(z.text, text, rtol=0, atol=1e-6)
    torch.testing.assert_close(z.scale, torch.tensor([3.0]).exp())


@pytest.mark.parametrize("config", [tiny(scale_max=50.0), tiny_resnet(bias=-3.0), tiny_resnet("attention")])
def test_round_trip_is_bit_equal_and_needs_nothing_else(config: Any, tmp_path: Path):
    torch.manual_seed(0)
    model = build(config).eval()
    save(model, tmp_path / "a", step=7)
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["model.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in (tmp_path / "a").iterdir()}) == 1  # who reads one may read all
    assert json.loads((tmp_path / "a" / "model.json").read_text())["step"] == 7
    again = load(tmp_path / "a", device="cpu")
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert (again.spec, again.activation, again.preprocess) == (model.spec, model.activation, model.preprocess)
    assert again.scale_max == model.scale_max
    batch = batch_of(config.image.size)
    assert torch.equal(again(batch).image, model(batch).image)
    assert torch.equal(again.embed_texts(CAPTIONS), model.embed_texts(CAPTIONS))
    save(again, tmp_path / "b", step=7)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_run_means_its_newest_whole_checkpoint(tmp_path: Path):
    steps = tmp_path / "checkpoints"
    for step, scale in ((2, 2.0), (10, 10.0)):
        save(build(tiny(scale=scale)), steps / f"step_{step:08d}")
    (steps / "step_00000030").mkdir()
    assert find_checkpoint(tmp_path) == steps / "step_00000010"
    torch.testing.assert_close(load(str(tmp_path)).scale.cpu(), torch.tensor([10.0]))
    assert find_checkpoint(steps / "step_00000002" / "model.safetensors") == steps / "step_00000002"


def test_start_takes_weights_and_the_config_has_the_last_word(tmp_path: Path):
    first = build(tiny(scale=20.0))
    save(first, tmp_path)
    as_loaded = build(tiny(start=str(tmp_path), bias=-10.0))
    assert torch.equal(as_loaded.text_tower.ln_final.weight, first.text_tower.ln_final.weight)
    torch.testing.assert_close(as_loaded.scale, torch.tensor([20.0]))
    assert as_loaded.bias.item() == -10.0
    torch.testing.assert_close(build(tiny(start=str(tmp_path), scale=5.0)).scale, torch.tensor([5.0]))
    dropping = build(tiny(start=str(tmp_path), text=TEXT | {"dropout": 0.1}))
    assert torch.equal(dropping.text_tower.token_embedding.weight, first.text_tower.token_embedding.weight)


def test_weights_keep_the_type_of_the_model_they_enter(tmp_path: Path):
    save(build(tiny()), tmp_path)
    model = build(tiny()).bfloat16()
    weights_into(model, tmp_path)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (tiny(embed_dim=8), "embed_dim: 16 there, 8 here"),
        (tiny(text=TEXT | {"heads": 4}), r"text\.heads: 2 there, 4 here"),
        (tiny_resnet(), 'image.kind: "open_clip" there, "timm" here'),
    ],
)
def test_a_checkpoint_of_another_architecture_is_one_clear_error(other: Any, message: str, tmp_path: Path):
    save(build(tiny()), tmp_path)
    for start in (
        check_start,
        build,
    ):  # the first before anything is built, the second whatever the settings leave open
        with pytest.raises(UserError, match="of another architecture") as caught:
            start(other.model_copy(update={"start": str(tmp_path)}))
        assert caught.match(message)
        assert len(str(caught.value).splitlines()) <= 4


def test_a_start_of_the_same_architecture_passes(tmp_path: Path):
    save(build(tiny(text=TEXT | {"dropout": 0.1})), tmp_path)
    check_start(tiny(start=str(tmp_path)))
    check_start(tiny())


def test_a_learned_bias_is_not_dropped(tmp_path: Path):
    save(build(tiny(bias=-10.0)), tmp_path)
    with pytest.raises(UserError, match=r"tensor bias: \[1\] there, missing here"):
        build(tiny(start=str(tmp_path)))


def test_start_without_a_checkpoint(tmp_path: Path):
    for start in (check_start, build):
        with pytest.raises(UserError, match=r"holds no checkpoint: neither model\.json nor"):
            start(tiny(start=str(tmp_path)))


# The activation. OpenAI's weights computed with GELU give quietly wrong numbers.


def test_checkpoint_of_one_activation_does_not_start_the_other(tmp_path: Path):
    save(build(tiny(name="tiny-quickgelu")), tmp_path)
    with pytest.raises(UserError, match=r'activation: "quickgelu" there, "gelu" here; .* quietly wrong'):
        build(tiny(name="tiny", start=str(tmp_path)))
    assert build(tiny(name="tiny-quickgelu", start=str(tmp_path))).activation == "quickgelu"


def test_openai_tags_bring_their_activation():
    assert resolve("ViT-B-32:openai") == ("ViT-B-32", "openai", True)
    assert resolve("ViT-B-32-quickgelu:openai").quick_gelu
    assert resolve("ViT-B/32:laion2b_s34b_b79k") == ("ViT-B-32", "laion2b_s34b_b79k", False)
    assert not resolve("ViT-B-32").quick_gelu


@pytest.mark.parametrize("name", ["tiny:tuned", "tiny-quickgelu:tuned"])
def test_tagged_weights_compute_with_their_activation(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original, file = open_clip_file(tmp_path / "w.safetensors", quick_gelu=True)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    model = load(name, device="cpu")
    assert model.activation == "quickgelu"
    assert_same_embeddings(model, original)
    save(model, tmp_path / "saved")
    assert load_checkpoint(tmp_path / "saved").activation == "quickgelu"
    assert_same_embeddings(load_checkpoint(tmp_path / "saved"), original)


def test_openai_weights_on_gelu_are_refused():
    with pytest.raises(UserError, match=r"openai was trained with quickgelu; .* Use ViT-B-32:openai"):
        resolve("ViT-B-32-gelu:openai")


def test_a_bare_file_must_be_told_its_activation(tmp_path: Path):
    original, file = open_clip_file(tmp_path / "w.safetensors", quick_gelu=True)
    with pytest.raises(UserError, match="does not say which activation"):
        load(f"tiny:{file}")
    assert_same_embeddings(load(f"tiny-quickgelu:{file}", device="cpu"), original)
    assert load(f"tiny-gelu:{file}").activation == "gelu"


def test_a_file_that_states_its_activation_is_believed(tmp_path: Path):
    _, file = open_clip_file(tmp_path / "w.safetensors", quick_gelu=True)
    save_file(load_file(file), file, metadata={"activation": "quickgelu"})
    with pytest.raises(UserError, match="was trained with quickgelu, tiny builds gelu; use tiny-quickgelu:"):
        load(f"tiny:{file}")
    with pytest.raises(UserError, match="was trained with quickgelu, tiny builds gelu"):
        load(f"tiny-gelu:{file}")
    assert load(f"tiny-quickgelu:{file}").activation == "quickgelu"


def test_a_checkpoint_of_ours_under_an_open_clip_name(tmp_path: Path):
    save(build(tiny(name="tiny-quickgelu")), tmp_path)
    with pytest.raises(UserError, match="was trained with quickgelu, tiny builds gelu"):
        load(f"tiny:{tmp_path}/model.safetensors")
    with pytest.raises(UserError, match="is a checkpoint of clipkit's own"):
        load(f"tiny-quickgelu:{tmp_path}/model.safetensors")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("ViT-B-23", "open_clip has no model called ViT-B-23; did you mean ViT-B-32"),
        ("ViT-B-32:opnai", "neither a file nor a tag; did you mean openai"),
        ("ViT-B-32-quickgelu:laion2b_s34b_b79k", "neither a file nor a tag"),
        ("runs/absent", "runs/absent: no such file or folder"),
        ("ViT-B/32:absent.pt", "absent.pt is neither a file nor a tag"),
        ("local-dir:/nowhere", "local-dir:/nowhere: its config could not be read"),
    ],
)
def test_references_that_mean_nothing(ref: str, message: str):
    with pytest.raises(UserError, match=message):
        load(ref)


def test_a_tokenizer_that_cannot_be_fetched(tmp_path: Path):
    text = TINY["text_cfg"] | {"hf_tokenizer_name": str(tmp_path / "absent")}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY | {"text_cfg": text}}))
    with pytest.raises(UserError, match="its tokenizer could not be loaded"):
        load(tmp_path)


def test_folders_and_files_that_hold_no_model(tmp_path: Path):
    with pytest.raises(UserError, match="holds no model"):
        load(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(UserError, match="weights alone do not name their architecture"):
        load(tmp_path / "weights.pt")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="not written by clipkit"):
        load(tmp_path)


def test_folder_in_open_clips_hub_layout(tmp_path: Path):
    original, _ = open_clip_file(tmp_path / "open_clip_model.safetensors", quick_gelu=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    about = {"model_cfg": TINY | {"quick_gelu": True}, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    for ref in (str(tmp_path), f"local-dir:{tmp_path}"):
        model = load(ref, device="cpu")
        assert_same_embeddings(model, original)
        found = model.preprocess
        assert (found.size, found.mean, found.resize, found.interpolation) == (16, (0.5,) * 3, "squash", "bilinear")


def test_learned_bias_and_unexpected_lengths_of_open_clip_models_are_kept(tmp_path: Path):
    """A SigLIP-like tower: bidirectional, pooled at the last position, so its texts are never cut."""
    text = TINY["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"}
    about = {"model_cfg": TINY | {"text_cfg": text, "init_logit_bias": -10.0}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    model = load(tmp_path, device="cpu")
    assert model.bias.item() == -10.0
    assert not model.tokenizer.trim and model.tokenizer(["short"]).shape == (1, 24)
    assert model.embed_texts(CAPTIONS).shape == (4, 16)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIPModel with CLIP's own vocabulary, as save_pretrained leaves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("transformers")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "intermediate_size": 80, "layer_norm_eps": 1e-4}
    text = sizes | {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 20, "hidden_act": "gelu"}
    vision = sizes | {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 8,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24, logit_scale_init_value=3.0)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16, image_mean=[0.4] * 3).save_pretrained(folder)
    own = open_clip.SimpleTokenizer()
    vocabulary = {token: number for token, number in own.encoder.items() if number < 49406}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    CLIPTokenizer(vocab=vocabulary, merges=list(own.bpe_ranks)).save_pretrained(folder)
    return folder


def test_transformers_folder_embeds_as_transformers_does(transformers_folder: Path, tmp_path: Path):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    theirs = CLIPModel.from_pretrained(transformers_folder).eval()
    model = load(transformers_folder, device="cpu")
    assert model.activation == "gelu" and model.preprocess.mean == (0.4, 0.4, 0.4)
    noise = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in noise]
    pixels = CLIPImageProcessor.from_pretrained(transformers_folder)(pictures, return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(transformers_folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = theirs(**pixels, **tokens)
    for found in (model, _saved_and_loaded(model, tmp_path)):
        torch.testing.assert_close(found.embed_images(pictures), out.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.embed_texts(CAPTIONS), out.text_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.scale, torch.tensor([3.0]).exp())


def _saved_and_loaded(model: Any, folder: Path) -> Any:
    save(model, folder)
    return load_checkpoint(folder)


def test_transformers_models_of_other_kinds_are_refused(transformers_folder: Path, tmp_path: Path):
    config = json.loads((transformers_folder / "config.json").read_text())
    cases = {
        "of type bert; only clip": {"model_type": "bert"},
        "activations relu are not one of quick_gelu, gelu": {
            kind: config[kind] | {"hidden_act": "relu"} for kind in ("text_config", "vision_config")
        },
        "has no model.safetensors": {},
    }
    for message, change in cases.items():
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load(tmp_path)


def test_transformers_vocabulary_must_be_clips_own(transformers_folder: Path, tmp_path: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((transformers_folder / name).read_bytes())
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(UserError, match="its vocabulary of 49408 tokens is not CLIP's own"):
        load(tmp_path)
