"""Tiny towers that step in milliseconds, and a batch with ragged negatives for them."""

from __future__ import annotations

from typing import Any

import torch

from clipkit.data.batch import Batch
from clipkit.data.tokenize import Tokenizer
from clipkit.settings import ImageTower, ModelConfig, TextTower

CONTEXT = 24
VISION = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": CONTEXT}
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 16}
CAPTIONS = ["a red cube", "two small green balls left of a blue cone", "a dog", "the cat sleeps!"]
NEGATIVES = [
    "a green cube",
    "a red ball",
    "one small green ball",
    "two",
    "a cat",
    "no dog",
    "the dog sleeps",
    "cat the",
]


def tiny(**settings: Any) -> ModelConfig:
    """Two transformers at 16 pixels."""
    defaults = {"embed_dim": 16, "image": ImageTower(cfg=VISION, size=16), "text": TextTower(**TEXT)}
    return ModelConfig(**defaults | settings)


def tiny_resnet(pool: Any = "avg", **settings: Any) -> ModelConfig:
    """A ResNet with batch norm at 32 pixels."""
    return tiny(image=ImageTower(timm="resnet18", cfg=RESNET, size=32, pool=pool), **settings)


def batch_of(size: int) -> Batch:
    """Four pairs with two negatives each, three of which are missing."""
    tokenizer = Tokenizer("clip", CONTEXT)
    n, generator = len(CAPTIONS), torch.Generator().manual_seed(0)
    return Batch(
        text=tokenizer(CAPTIONS),
        id=torch.arange(n),
        group=torch.arange(n),
        image=torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator),
        negative_text=tokenizer(NEGATIVES).unflatten(0, (n, 2)),
        valid=torch.tensor([[True, True], [True, False], [False, False], [True, True]]),
    )
