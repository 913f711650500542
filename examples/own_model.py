"""Evaluate a model that clipkit does not know: anything with encode_image and encode_text.

clipkit eval examples/own_model.py:model --benchmark cifar10 --root cifar10=data/cifar10_test.tar
"""

from __future__ import annotations

import open_clip

from clipkit.evaluation.own import Encoders


def model(name: str = "ViT-S-32-alt", pretrained: str | None = None) -> Encoders:
    """Here a model of open_clip's with random weights; put your own in its place."""
    encoders, _, preprocess = open_clip.create_model_and_transforms(name, pretrained)
    tokenize = open_clip.get_tokenizer(name)
    return Encoders(encoders.eval(), preprocess, tokenize, scale=encoders.logit_scale.detach().exp().item())
