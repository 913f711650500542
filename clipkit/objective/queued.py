"""Rivals from the batches before: a queue of the teacher's embeddings, and harder ones mixed from it.

Axes: n pairs, c keys, m mixtures a pair, d.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clipkit.model.embeddings import Embeddings
from clipkit.objective.contrast import both_ways, diagonal, visible
from clipkit.objective.kernel import contrast_rows, full, log_mask, similarity
from clipkit.registry import term
from clipkit.settings import Count, Positive

AT_ONCE = 2**20
"""Numbers held at a time for the products of pairs of keys."""


@term(name="mochi", needs="teacher")
class Mochi:
    """Contrast with a queue of keys and with hard negatives mixed from it. MoCHi, arXiv 2010.01028 (MoCo 1911.05722).

        ½ Σ_(both ways) mean_i CE(s q_i · [k_i; K; h_i], i)      q the student's, k the teacher's of the other side
        h_i:  `mixed` times    a x + (1 - a) y     a ~ U(0, 1)      x, y among the `hardest` keys of K for q_i
              `pulled` times   b q_i + (1 - b) x   b ~ U(0, ½)      each brought to unit length

    K are the keys of the other pairs and of those in earlier batches, the latest `queue` of them; at first there are
    none. Gradients flow into q alone (and the scale): keys and mixtures are constants. Without mixtures it is MoCo's
    InfoNCE, the batch's own keys being rivals at once. Keys of the anchor's own picture are none unless
    `mask_same_group` is off. What is drawn is a function of the ids in the batch. Holds all logits as a matrix.
    """

    def __init__(
        self,
        *,
        queue: Count = 16_384,
        hardest: Positive = 1024,
        mixed: Count = 1024,
        pulled: Count = 128,
        mask_same_group: bool = True,
    ):
        self.capacity, self.hardest, self.mixed, self.pulled = queue, hardest, mixed, pulled
        self.mask_same_group = mask_same_group
        self.queue: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def __call__(self, z: Embeddings) -> Float[Tensor, ""]:
        teacher = z.frozen_teacher()
        keys = {"image": full(teacher.image), "text": full(teacher.text), "group": z.group}
        if self.queue:
            keys = {name: torch.cat([new, self.queue[name].to(new)]) for name, new in keys.items()}
        others = z.group[:, None] != keys["group"][None, len(z) :]
        earlier = others if self.mask_same_group else torch.ones_like(others)
        seen = torch.cat([visible(z, self.mask_same_group), earlier], 1)
        chances = draws(z.id, 2 * (3 * self.mixed + 2 * self.pulled)).chunk(2, 1)
        images = self._rows(z.scale, full(z.image), keys["text"], seen, chances[0])
        texts = self._rows(z.scale, full(z.text), keys["image"], seen, chances[1])
        self._before = self.queue
        self.queue = {name: table[: self.capacity] for name, table in keys.items()}
        return both_ways([images, texts])

    def _rows(
        self,
        scale: Tensor | float,
        query: Float[Tensor, "n d"],
        keys: Float[Tensor, "c d"],
        seen: Bool[Tensor, "n c"],
        chance: Float[Tensor, "n _"],
    ) -> Float[Tensor, " n"]:
        cosines, pair = similarity(query, keys), diagonal(seen)
        rivals = seen & ~pair
        made = torch.cat(self._mixtures(query, keys, cosines, rivals, chance), 1)
        exist = rivals.any(1, keepdim=True).expand(made.shape)
        logits, keep = scale * torch.cat([cosines, made], 1), torch.cat([seen, exist], 1)
        return contrast_rows(logits, diagonal(logits), log_weights=log_mask(keep))

    def _mixtures(
        self,
        query: Float[Tensor, "n d"],
        keys: Float[Tensor, "c d"],
        cosines: Float[Tensor, "n c"],
        rivals: Bool[Tensor, "n c"],
        chance: Float[Tensor, "n _"],
    ) -> tuple[Float[Tensor, "n _"], Float[Tensor, "n _"]]:
        """The queries' cosines with their mixtures, of keys and of a key and the query itself.

        Made from the cosines with the parts, so that the mixtures themselves are never held.
        """
        x, y, a, x_pulled, b = chance.split([self.mixed] * 3 + [self.pulled] * 2, 1)
        known = cosines.detach()
        hardest = known.masked_fill(~rivals, -torch.inf).topk(min(self.hardest, len(keys)), dim=1).indices
        count = rivals.sum(1, keepdim=True).clamp(max=self.hardest)
        x, y, x_pulled = (hardest.gather(1, (share * count).long()) for share in (x, y, x_pulled))
        fixed, sizes = query.detach(), keys.square().sum(1)

        a, b = a.to(known), b.to(known) / 2
        length = _length(a, sizes[x], sizes[y], products(keys, x, y))
        mixed = (a * cosines.gather(1, x) + (1 - a) * cosines.gather(1, y)) / length
        length = _length(b, fixed.square().sum(1, keepdim=True), sizes[x_pulled], known.gather(1, x_pulled))
        pulled = (b * (query * fixed).sum(1, keepdim=True) + (1 - b) * cosines.gather(1, x_pulled)) / length
        return mixed, pulled

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return self.queue

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.queue = dict(state)

    def undo(self) -> None:
        """Forget the last batch."""
        self.queue = self._before


def _length(
    share: Float[Tensor, "n m"], first: Float[Tensor, "n _"], second: Float[Tensor, "n m"], both: Float[Tensor, "n m"]
) -> Float[Tensor, "n m"]:
    """|share · p + (1 - share) · q| from |p|², |q|² and p·q; of opposites that cancel, a little."""
    square = share**2 * first + (1 - share) ** 2 * second + 2 * share * (1 - share) * both
    return square.clamp(min=1e-6).sqrt()


def products(keys: Float[Tensor, "c d"], x: Int64[Tensor, "n m"], y: Int64[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """keys[x] · keys[y], a few rows at a time."""
    rows = max(1, AT_ONCE // max(1, x.shape[1] * keys.shape[1]))
    return torch.cat([(keys[a] * keys[b]).sum(-1) for a, b in zip(x.split(rows), y.split(rows))])


def draws(ids: Int64[Tensor, " n"], count: int) -> Float[Tensor, "n count"]:
    """Uniform numbers in [0, 1), `count` for each id: a function of the set of ids, the same on every rank.

    Their order does not matter, and a resumed run draws what it would have drawn.
    """
    generator = torch.Generator().manual_seed(int(ids.sum()))
    table = torch.rand(len(ids), count, generator=generator, dtype=torch.float64)
    return table.to(ids.device)[ids.argsort(stable=True).argsort()]
