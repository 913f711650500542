"""Embeddings kept on disk: by model and content, interrupted and gone on with; models of one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clipkit
from clipkit.errors import UserError
from clipkit.evaluation import store as disk
from clipkit.evaluation.benchmark import Picture
from clipkit.evaluation.embed import Embedder
from clipkit.evaluation.own import Encoders, open_model
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.run import evaluate
from clipkit.evaluation.store import Store, fingerprint, key_of
from clipkit.model.dual_encoder import build
from clipkit.model.load import save
from tests.evaluation.fakes import Random, picture, write_benchmark
from tests.model.tiny import tiny
from tests.typed import well, wrong


class Named(Random):
    """Random embeddings of a model with a name."""

    def __init__(self, seed: int = 0, name: str = "one") -> None:
        super().__init__(seed)
        self.fingerprint = name


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "own", per_form=3)[0]


def test_a_second_evaluation_embeds_nothing(own: Path, tmp_path: Path):
    first, second, other = Named(), Named(), Named(seed=1, name="two")
    (plain,) = evaluate(Named(), benchmarks=[own], show=False)
    results = [evaluate(m, benchmarks=[own], show=False, cache=tmp_path / "c")[0] for m in (first, second, other)]
    assert first.seen and not second.seen and sorted(other.seen) == sorted(first.seen)
    assert results[0].to_json() == results[1].to_json() == plain.to_json() != results[2].to_json()
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_content_counts_and_not_its_name(own: Path, tmp_path: Path):
    evaluate(Named(), benchmarks=[own], show=False, cache=tmp_path / "c")
    pictures = sorted((own.parent / "pictures").iterdir())
    picture(999).save(pictures[0])
    pictures[1].rename(tmp_path / "x.png")
    pictures[2].rename(pictures[1])
    (tmp_path / "x.png").rename(pictures[2])
    model = Named()
    evaluate(model, benchmarks=[own], show=False, cache=tmp_path / "c")
    assert len(model.seen) == 1


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The model fails in the fifth batch: what it gave before is kept."""
    monkeypatch.setattr(disk, "PIECE", 8)
    for n in range(40):
        picture(n).save(tmp_path / f"{n}.png")
    roots, wanted = Roots({"p": tmp_path}), [Picture("p", f"{n}.png") for n in range(40)]

    class Failing(Named):
        def embed_images(self, images: list[Image.Image]) -> np.ndarray:
            if len(self.batches) == 4:
                raise KeyboardInterrupt
            return super().embed_images(images)

    def embedder(model: Any) -> Embedder:
        return Embedder(model, roots, batch_size=6, store=Store(model, tmp_path / "c"))

    with pytest.raises(KeyboardInterrupt):
        embedder(Failing()).pictures(wanted)
    model = Named()
    rows = embedder(model).pictures(wanted)
    assert len(model.seen) == 16
    assert np.array_equal(rows, Embedder(Named(), roots).pictures(wanted))


def test_crops_and_texts_have_keys_of_their_own(tmp_path: Path):
    picture(0).save(tmp_path / "0.png")
    wanted = [Picture("p", "0.png"), Picture("p", "0.png", (0, 0, 4, 4)), Picture("p", "0.png", (0, 0, 5, 4))]
    for again in (False, True):
        model = Named()
        embedder = Embedder(model, Roots({"p": tmp_path}), store=Store(model, tmp_path / "c"))
        assert len(np.unique(embedder.pictures(wanted), axis=0)) == 3
        embedder.texts(["a", "b", "é"])
        assert len(model.seen) == (0 if again else 6)
    assert key_of(b"a", b"bc") != key_of(b"ab", b"c")


def test_a_change_has_a_key_of_its_own(tmp_path: Path):
    """Corruptions are drawn from the picture's name: the same bytes under another name are another picture."""
    for name in ("0.png", "1.png"):
        picture(0).save(tmp_path / name)
    changes = ("", "framed", "fog:1", "fog:2")
    wanted = [Picture("p", name, None, change) for change in changes for name in ("0.png", "1.png")]
    for again in (False, True):
        model = Named()
        embedder = Embedder(model, Roots({"p": tmp_path}), store=Store(model, tmp_path / "c"))
        rows = embedder.pictures(wanted)
        assert len(model.seen) == (0 if again else 7)  # without a change the bytes are what counts
        assert len(np.unique(rows, axis=0)) == 6  # framing draws nothing


def test_a_model_is_its_weights_and_description():
    torch.manual_seed(0)
    model = build(tiny())
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        next(model.text_tower.parameters()).view(-1)[0] += 1e-6
    assert fingerprint(model) != before
    torch.manual_seed(0)
    quick = build(tiny())
    assert fingerprint(quick) == before
    quick.spec = quick.spec | {"activation": "quickgelu"}
    assert fingerprint(quick) != before
    with pytest.raises(UserError, match="has no `fingerprint`"):
        fingerprint(Random())


def test_broken_files_are_named(tmp_path: Path):
    store = Store(Named(), tmp_path)
    store.add([key_of(b"x")], np.zeros((1, 4), np.float32))
    store.flush()
    (file,) = store.folder.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=f"{file.name}: not a file of embeddings .*; delete it"):
        Store(Named(), tmp_path)


def test_the_command_keeps_them(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path / "cache"))
    save(build(tiny()).eval(), tmp_path / "model")
    words = ("eval", tmp_path / "model", "--benchmark", own, "--json", "-", "--cache")
    assert json.loads(well(*words)) == json.loads(well(*words))
    files = list((tmp_path / "cache" / "embeddings").glob("*/*.npz"))
    assert len(files) == 2  # pictures, texts; the second call wrote none


OWN = """
import numpy as np

class Mine:
    def embed_images(self, images):
        return np.stack([np.asarray(image.resize((4, 4))).ravel() - 127.0 for image in images])
    def embed_texts(self, texts):
        return np.stack([np.random.default_rng(len(text)).normal(size=48) for text in texts])

def mine():
    return Mine()

def bad():
    return 3
"""


def test_models_in_a_file_of_python(own: Path, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    (result,) = json.loads(well("eval", f"{tmp_path}/own.py:mine", "--benchmark", own, "--json", "-"))
    assert result["n"] == 30
    assert "has no function mime; did you mean mine" in wrong("eval", f"{tmp_path}/own.py:mime", "--benchmark", own)
    assert "it returned int" in wrong("eval", f"{tmp_path}/own.py:bad", "--benchmark", own)
    assert "no.py: no such file" in wrong("eval", f"{tmp_path}/no.py:mine", "--benchmark", own)


def test_encoders_give_what_the_model_gives():
    class Towers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = torch.nn.Linear(12, 5), torch.nn.Embedding(9, 5)

        def encode_image(self, x: torch.Tensor) -> torch.Tensor:
            return self.image(x.flatten(1))

        def encode_text(self, x: torch.Tensor) -> torch.Tensor:
            return self.text(x).mean(1)

    def pixels(image: Image.Image) -> torch.Tensor:
        return torch.tensor(np.asarray(image.resize((2, 2))) / 255, dtype=torch.float32).permute(2, 0, 1)

    towers = Towers()
    model = Encoders(towers, pixels, lambda texts: torch.tensor([[len(text) % 9] for text in texts]), scale=30.0)
    images = [picture(n) for n in range(3)]
    expected = towers.encode_image(torch.stack([pixels(image) for image in images]))
    assert torch.equal(model.embed_images(images), expected) and not model.embed_images(images).requires_grad
    found = clipkit.zeroshot(model, images, ["a", "bb", "ccc"])  # type: ignore[arg-type]
    assert [len(one["classes"]) for one in found] == [3, 3, 3]


def test_transformers_folders_of_other_kinds(tmp_path: Path):
    """SigLIP: the features transformers gives, through the folder's own processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipImageProcessor,
        SiglipModel,
        SiglipProcessor,
        SiglipTextConfig,
        SiglipVisionConfig,
    )

    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = SiglipTextConfig(vocab_size=12, max_position_embeddings=8, **small)
    vision = SiglipVisionConfig(image_size=16, patch_size=8, **small)
    torch.manual_seed(0)
    config = SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    siglip = SiglipModel(config).eval()
    siglip.save_pretrained(tmp_path / "siglip")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "red": 3, "dog": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=8
    )
    processor = SiglipProcessor(SiglipImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    processor.save_pretrained(tmp_path / "siglip")
    model = open_model(str(tmp_path / "siglip"))
    texts, images = ["a red dog", "a dog"], [picture(0, 20), picture(1, 30)]
    ids = torch.tensor([[2, 3, 4, 0, 0, 0, 0, 0], [2, 4, 0, 0, 0, 0, 0, 0]])
    with torch.inference_mode():
        pooled = siglip.text_model(input_ids=ids).pooler_output
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        seen = siglip.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(torch.as_tensor(model.embed_texts(texts)).cpu(), pooled)
    torch.testing.assert_close(torch.as_tensor(model.embed_images(images)).cpu(), seen)
    assert float(model.scale) == pytest.approx(siglip.logit_scale.exp().item())  # type: ignore[attr-defined]
    assert len(fingerprint(model)) == 32
    os.remove(tmp_path / "siglip" / "model.safetensors")
    with pytest.raises(UserError, match="transformers cannot read it"):
        open_model(str(tmp_path / "siglip"))
