"""How well a text's words find themselves in a picture's patches. Axes: n pictures, k texts, p patches, t places, d."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def local_logits(
    patches: Float[Tensor, "n p d"],
    words: Float[Tensor, "n *k t d"],
    spoken: Bool[Tensor, "n *k t"],
    scale: Tensor | float,
) -> Float[Tensor, " n *k"]:
    """A picture's local likeness to each of its own texts. FSC-CLIP, arXiv 2410.05210.

        log Σ_w e^{s cos(v_w, e_w)}      v_w = Σ_p a_wp x_p      a_w = (e_w·x - min_p e_w·x_p), in shares of its sum

    x are the patches and e the words, neither of unit length. The attention a sends no gradient; where all patches are
    equally near to a word it is even. Longer texts have larger values, by up to the log of their number of words. A
    text without words gives 0. Computed in float32 (float64 stays) whatever the surroundings.
    """
    with torch.autocast(patches.device.type, enabled=False):
        patches, words = (x if x.dtype == torch.float64 else x.float() for x in (patches, words))
        near = torch.einsum("n...td,npd->n...tp", words, patches).detach()
        spread = near - near.amin(-1, keepdim=True)
        total = spread.sum(-1, keepdim=True)
        attention = torch.where(total > 0, spread / total, 1 / patches.shape[1])
        seen = torch.einsum("n...tp,npd->n...td", attention, patches)
        logits = scale * (_unit(seen) * _unit(words)).sum(-1)
        silent = ~spoken.any(-1, keepdim=True)
        return logits.masked_fill(~(spoken | silent), -torch.inf).logsumexp(-1).masked_fill(silent[..., 0], 0.0)


def _unit(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """At unit length; zeros stay zeros, and have no slope of 1e12 as under torch's own."""
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length == 0, 1.0)
