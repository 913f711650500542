"""Pictures moved against the model within a bound (PGD), so that it learns to withstand it. TeCoA, arXiv 2212.07016.

    x ← clamp( x + step_size · sign ∇_x CE(s v(x)_i · T, i) )      to within eps of the picture, and to 0…255

T are the captions of the global batch, those of the picture's own group left out. A picture moves by its own row alone:
what becomes of it does not depend on the number of ranks, nor on the parts that a batch is encoded in. The first step
starts from the picture itself, the released code from a random point within the bound. Axes: n pairs, N of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from clipkit import distributed
from clipkit.data.batch import Batch
from clipkit.model.dual_encoder import DualEncoder
from clipkit.objective.kernel import contrast_rows, log_mask, similarity
from clipkit.settings import AdversaryConfig


def attacked(model: DualEncoder, batch: Batch, config: AdversaryConfig, parts: int = 1) -> Batch:
    """The batch with its pictures moved (float32, 0…255), worked out in `parts`. Negative pictures stay as they are.

    `model` is the bare one, in eval mode meanwhile: no gradient arrives at a parameter, no engine's hook is called, no
    running statistic moves and no random number is drawn. Every rank asks together.
    """
    mode = model.training
    model.eval()
    try:
        captions = _Captions.of(model, batch)
        pieces = zip(batch.split(parts), captions.split(parts))
        moved = [_moved(model, part.image, theirs, config) for part, theirs in pieces if part.image is not None]
    finally:
        model.train(mode)
    return replace(batch, image=torch.cat(moved))


@dataclass(frozen=True)
class _Captions:
    """All ranks' captions, which of them belong to each picture of this rank and which it is compared with."""

    text: Float[Tensor, "N d"]
    own: Bool[Tensor, "n N"]
    seen: Bool[Tensor, "n N"]
    scale: Float[Tensor, "1"]

    @classmethod
    @torch.no_grad()
    def of(cls, model: DualEncoder, batch: Batch) -> _Captions:
        text, group = (distributed.all_gather(x) for x in (model.encode_text(batch.text), batch.group))
        place = distributed.rank() * len(batch) + torch.arange(len(batch), device=group.device)
        own = place[:, None] == torch.arange(len(group), device=group.device)
        return cls(text, own, own | (batch.group[:, None] != group), model.scale)

    def split(self, parts: int) -> list[_Captions]:
        """As they are for the pictures of each part."""
        return [replace(self, own=own, seen=seen) for own, seen in zip(self.own.chunk(parts), self.seen.chunk(parts))]


def _moved(
    model: DualEncoder, image: UInt8[Tensor, "n c h w"], captions: _Captions, config: AdversaryConfig
) -> Float[Tensor, "n c h w"]:
    still = image.float()
    low, high = (still - config.eps).clamp(min=0), (still + config.eps).clamp(max=255)
    moved = still
    for _ in range(config.steps):
        moved = moved.detach().requires_grad_()
        logits = captions.scale * similarity(model.encode_image(moved), captions.text)
        loss = contrast_rows(logits, captions.own, log_weights=log_mask(captions.seen)).sum()
        (slope,) = torch.autograd.grad(loss, moved)
        moved = (moved + config.step_size * slope.sign()).clamp(low, high)
    return moved.detach()
