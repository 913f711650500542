"""Models in other programs' forms embed as they do here, by those programs' own hands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from clipkit.errors import UserError
from clipkit.model import export as exporting
from clipkit.model.dual_encoder import DualEncoder, build
from clipkit.model.export import export
from clipkit.model.load import load, save
from clipkit.settings import HeadsConfig, ImageTower
from tests.model.tiny import CAPTIONS, TEXT, VISION, tiny, tiny_resnet


def model_of(config: Any) -> DualEncoder:
    torch.manual_seed(3)
    return build(config).eval()


def pictures(side: int, count: int = 3) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(torch.nn.functional.normalize(found, dim=-1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"scale": 20.0}, {"bias": -3.0}])
def test_open_clip_itself_reads_its_form(settings: dict[str, Any], tmp_path: Path):
    model = model_of(tiny(**settings))
    export(model, tmp_path / "out", "open_clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        pixels = torch.stack([preprocess(picture) for picture in pictures(16)])
        assert_close(theirs.eval().encode_image(pixels), model.embed_images(pictures(16)))
        assert_close(theirs.encode_text(tokenizer(CAPTIONS)), model.embed_texts(CAPTIONS))
        torch.testing.assert_close(theirs.logit_scale.exp(), model.scale[0])
    if model.bias is not None:
        assert theirs.logit_bias.item() == model.bias.item()
    again = load(tmp_path / "out", "cpu")
    assert again.activation == model.activation and again.preprocess == model.preprocess


@pytest.mark.parametrize("name", ["ViT-S-32", "quickgelu"])
def test_transformers_itself_reads_its_form(name: str, tmp_path: Path):
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model = model_of(tiny(image=ImageTower(cfg=VISION, size=16, resize="squash")))
    if name == "quickgelu":
        quick = model.spec | {"activation": "quickgelu"}
        save(model, tmp_path / "gelu")
        about = json.loads((tmp_path / "gelu/model.json").read_text())
        (tmp_path / "gelu/model.json").write_text(json.dumps(about | {"spec": quick}))
        model = load(tmp_path / "gelu", "cpu")
    export(model, tmp_path / "out", "transformers")
    folder = tmp_path / "out"
    theirs = CLIPModel.from_pretrained(folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(folder)(pictures(16), return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = theirs(**pixels, **tokens)
    assert_close(out.image_embeds, model.embed_images(pictures(16)))
    assert_close(out.text_embeds, model.embed_texts(CAPTIONS))
    torch.testing.assert_close(theirs.logit_scale.exp(), model.scale[0])
    again = load(folder, "cpu")  # and back
    assert again.activation == model.activation and again.preprocess == model.preprocess
    assert_close(again.embed_images(pictures(16)), model.embed_images(pictures(16)))
    assert_close(again.embed_texts(CAPTIONS), model.embed_texts(CAPTIONS))


@pytest.mark.parametrize(
    "config", [tiny(heads=HeadsConfig(text=True, image=True)), tiny_resnet("attention", bias=-3.0)], ids=["vit", "timm"]
)
def test_onnx_graphs_take_any_number(config: Any, tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_of(config)
    export(model, tmp_path / "out", "onnx")
    assert exporting._is_export(tmp_path / "out", ())
    about = json.loads((tmp_path / "out/about.json").read_text())
    assert about["scale"] == pytest.approx(model.scale.item()) and about["bias"] == (-3.0 if model.bias else None)
    side = about["preprocess"]["size"]
    pixels = np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures(side, 5)])
    image = onnxruntime.InferenceSession(tmp_path / "out/image.onnx").run(None, {"pixels": pixels})[0]
    assert_close(torch.from_numpy(image), model.embed_images(pictures(side, 5)))
    tokens = open_clip.SimpleTokenizer(context_length=about["tokenizer"]["context_length"])(CAPTIONS).numpy()
    text = onnxruntime.InferenceSession(tmp_path / "out/text.onnx").run(None, {"tokens": tokens})[0]
    assert_close(torch.from_numpy(text), model.embed_texts(CAPTIONS))


def test_clipkits_own_form_is_the_model_alone(tmp_path: Path):
    model = model_of(tiny_resnet())
    export(model, tmp_path / "out", "clipkit")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["model.json", "model.safetensors"]
    again = load(tmp_path / "out", "cpu").state_dict()
    assert all(torch.equal(again[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("config", "to", "message"),
    [
        (tiny_resnet(), "open_clip", r"image towers of this kind \(timm\); use --to onnx"),
        (tiny_resnet(), "transformers", r"image towers of this kind \(timm\); use --to open_clip or --to onnx"),
        (tiny(bias=-1.0), "transformers", "no place for a learned bias; --to open_clip keeps it"),
        (tiny(heads=HeadsConfig(text=True)), "open_clip", "projection behind the text tower; use --to onnx"),
        (
            tiny(image=ImageTower(cfg=VISION | {"pool_type": "avg"}, size=16)),
            "transformers",
            "no place for pool_type: avg of the image tower",
        ),
        (tiny(text={**TEXT, "features": 8}), "open_clip", "no text tower that reads stored features"),
    ],
)
def test_what_a_form_has_no_place_for_is_said(config: Any, to: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        export(model_of(config), tmp_path / "out", to)
    assert not list(tmp_path.iterdir())  # nothing half


def test_a_folder_in_use_is_kept(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="is there already"):
        export(model_of(tiny()), tmp_path, "clipkit")
    assert (tmp_path / "mine.txt").read_text() == "kept"
    export(model_of(tiny()), tmp_path / "out", "clipkit")
    export(model_of(tiny(scale=7.0)), tmp_path / "out", "open_clip", overwrite=True)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]


def test_only_an_earlier_export_is_replaced(tmp_path: Path):
    """Not a run, its checkpoint, its best or a merged model, nor an export that somebody has put something into."""
    model, run = model_of(tiny()), tmp_path / "run"
    checkpoint = run / "checkpoints/step_00000001"
    save(model, checkpoint)
    (checkpoint / "state.json").write_text("{}")
    save(model, run / "best", evaluation={})
    noted = export(model, run / "noted", "open_clip")
    (noted / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path, run, run / "checkpoints", checkpoint, run / "best", noted):
        with pytest.raises(UserError, match=f"{out}: holds other things than one export, which --overwrite does not"):
            export(model, out, "clipkit", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    for to in ("clipkit", "open_clip", "transformers", "open_clip"):
        assert export(model, run / "alone", to, overwrite=True, source=run) == run / "alone"
        assert {path.name for path in (run / "alone").iterdir()} >= exporting.PARTS[to][0]


def test_what_the_model_was_loaded_from_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, own = model_of(tiny()), tmp_path / "own"
    export(model, own, "open_clip")
    (tmp_path / "link").symlink_to(own)
    monkeypatch.chdir(tmp_path)
    file = own / "open_clip_model.safetensors"
    for source in (own, "own", "link", "local-dir:own", f"ViT-B-32:{file}"):
        with pytest.raises(UserError, match="own: is where the model lies, which --overwrite does not remove"):
            export(model, "link", "clipkit", overwrite=True, source=source)
    assert file.is_file()
    export(model, "own", "clipkit", overwrite=True, source="ViT-B-32:own")  # a tag


def test_where_no_folder_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out, message in (
        ("../file", "file: is a file; choose a folder"),
        ("../file/y", "file/y: cannot be written: .*Not a directory"),
        (".", "empty: is the folder you are in; name a new one"),
    ):
        with pytest.raises(UserError, match=message):
            export(model_of(tiny()), out, "clipkit", overwrite=True)
    assert Path.cwd().is_dir() and (tmp_path / "file").read_text() == "kept"


def test_what_embeds_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = exporting._embedded(model_of(tiny(scale=3.0)))
    monkeypatch.setitem(exporting.FORMS, "clipkit", lambda *_: exporting.Embedded(other.image, -other.text))
    with pytest.raises(RuntimeError, match="embeds otherwise than the model"):
        export(model_of(tiny()), tmp_path / "out", "clipkit")
    assert not list(tmp_path.iterdir())
