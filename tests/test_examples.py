from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

import clipkit

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_search_returns_the_nearest_pictures_first(tmp_path: Path) -> None:
    from clipkit import config
    from clipkit.model.load import build, save

    save(build(config.load("debug").model), tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    found = example("search").search(str(tmp_path / "model"), str(tmp_path), "a red boat", top=3)

    model = clipkit.load(tmp_path / "model")
    paths = sorted(tmp_path.glob("*.png"))
    similarity = model.embed_images(paths) @ model.embed_texts(["a red boat"])[0]
    values, best = similarity.topk(3)
    assert [path for _, path in found] == [paths[i] for i in best.tolist()]
    assert torch.allclose(torch.tensor([cosine for cosine, _ in found]), values, atol=1e-6)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    """The example's model gives what open_clip's gives."""
    import open_clip

    torch.manual_seed(0)
    own = example("own_model").model()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    tokens = open_clip.get_tokenizer("ViT-S-32-alt")(["a red boat"])
    with torch.inference_mode():
        assert torch.equal(own.embed_texts(["a red boat"]), own.model.encode_text(tokens))
    assert own.embed_images([image]).shape == own.embed_texts(["a red boat"]).shape
    assert 10 < own.scale < 20
