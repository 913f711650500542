"""The preprocessing of a config's image tower is known without the tower."""

from __future__ import annotations

import pytest

from clipkit.data.decode import Preprocess
from clipkit.model.dual_encoder import build
from clipkit.model.preprocess import preprocess_of
from clipkit.settings import ModelConfig

TINY = {"embed_dim": 16, "text": {"width": 64, "heads": 2, "layers": 1}}


@pytest.mark.parametrize(
    "config",
    [
        {"image": {"conv": [[8, 2]], "size": 48, "resize": "squash", "mean": [0.5, 0.5, 0.5]}, **TINY},
        {"name": "ViT-S-32-alt"},
    ],
)
def test_it_is_the_built_models(config: dict) -> None:
    checked = ModelConfig.model_validate(config)
    assert preprocess_of(checked) == build(checked).preprocess


def test_a_tag_brings_its_own() -> None:
    found = preprocess_of(ModelConfig(name="ViT-B-16-SigLIP-256:webli"))
    assert found == Preprocess(256, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "squash", "bicubic")
    assert preprocess_of(ModelConfig(name="ViT-B-32-quickgelu:openai")) == Preprocess()
