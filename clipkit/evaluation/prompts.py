"""Prompt learning: a few vectors before each class name, learned from few pictures; the model itself stays as it is.

    text of class c = [start] v_1 … v_M [name of c] . [end]
    loss = CE(scale · cosines with the texts, class) + keep · mean over c of (1 − cosine with c's hand-made text)

CoOp (arXiv 2109.01134) has M = 16 vectors drawn at random and keep 0; KgCoOp (arXiv 2303.13283) has M = 4 vectors that
begin as "a photo of a" and keep 8. Both by SGD with a cosine schedule, the first epoch at 1e-5. Pictures are embedded
once: the random crops and flips of the released code are left out. Axes: n pictures, c classes, t tokens, w width of a
token, d embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipkit.errors import UserError
from clipkit.evaluation.probe import Probed, Set
from clipkit.model.dual_encoder import DualEncoder
from clipkit.model.towers import trims_exactly

START = "a photo of a"
"""What KgCoOp's vectors begin as."""
HELD = 1
"""The token that keeps a vector's place: neither padding nor the end of the text."""
WARM_UP_LR = 1e-5


def coop(
    model: Any, train: Set, validation: Set, test: Set, classes: Sequence[str], *, vectors: int = 16, **fit: Any
) -> Probed:
    """CoOp: `vectors` drawn from N(0, 0.02²). Raises UserError for a text tower that it cannot be learned through."""
    prompts = Prompts(model, classes, vectors)
    g = torch.Generator().manual_seed(fit.get("seed", 0))
    start = 0.02 * torch.randn(vectors, prompts.width, generator=g)
    texts = prompts.texts(prompts.fit(train, start, **fit))
    return _probed("CoOp", {"vectors": vectors}, texts, validation, test)


def kgcoop(
    model: Any,
    train: Set,
    validation: Set,
    test: Set,
    classes: Sequence[str],
    hand_made: Float[Tensor, "c d"],
    *,
    keep: float = 8.0,
    **fit: Any,
) -> Probed:
    """KgCoOp: as CoOp from "a photo of a", and held near the classes' hand-made texts with weight `keep`."""
    words = _start_words(model)
    prompts = Prompts(model, classes, len(words))
    texts = prompts.texts(prompts.fit(train, words, hand_made=hand_made, keep=keep, **fit))
    return _probed("KgCoOp", {"vectors": len(words), "keep": keep}, texts, validation, test)


class Prompts:
    """The texts of some classes as a function of the vectors before their names."""

    def __init__(self, model: Any, classes: Sequence[str], vectors: int):
        _check(model)
        self.model: DualEncoder = model
        self.vectors, self.device = vectors, model.log_scale.device
        self.width = model.text_tower.token_embedding.embedding_dim
        self.tokens = _with_places(model, classes, vectors).to(self.device)

    def texts(self, vectors: Float[Tensor, "m w"]) -> Float[Tensor, "c d"]:
        """The classifier these vectors make, on the CPU."""
        with torch.no_grad():
            return self._encode(vectors.to(self.device)).cpu()

    def fit(
        self,
        train: Set,
        start: Float[Tensor, "m w"],
        *,
        hand_made: Float[Tensor, "c d"] | None = None,
        keep: float = 0.0,
        epochs: int = 50,
        lr: float = 2e-3,
        batch_size: int = 32,
        seed: int = 0,
        watch: Callable[[int, float], None] | None = None,
    ) -> Float[Tensor, "m w"]:
        """The vectors learned from `train`. `watch(epoch, mean loss)` is told how it goes."""
        learned = start.clone().to(self.device).requires_grad_()
        optimizer = torch.optim.SGD([learned], lr=lr, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        x, y = train.x.to(self.device), train.y.to(self.device)
        near = None if hand_made is None else hand_made.to(self.device)
        g, scale = torch.Generator().manual_seed(seed), self.model.scale.detach()
        with _still(self.model):
            for epoch in range(epochs):
                optimizer.param_groups[0]["lr"] = WARM_UP_LR if epoch == 0 else schedule.get_last_lr()[0]
                losses = []
                for some in torch.randperm(len(x), generator=g).split(batch_size):
                    texts, chosen = self._encode(learned), some.to(self.device)
                    loss = cross_entropy(scale * x[chosen] @ texts.T, y[chosen])
                    if near is not None:
                        loss = loss + keep * (1 - (texts * near).sum(-1)).mean()
                    (learned.grad,) = torch.autograd.grad(loss, learned)
                    optimizer.step()
                    losses.append(float(loss.detach()))
                schedule.step()
                if watch:
                    watch(epoch, sum(losses) / len(losses))
        return learned.detach().cpu()

    def _encode(self, vectors: Float[Tensor, "m w"]) -> Float[Tensor, "c d"]:
        def put(_module: Any, _inputs: Any, words: Float[Tensor, "c t w"]) -> Float[Tensor, "c t w"]:
            own = vectors.to(words.dtype).expand(len(words), -1, -1)
            return torch.cat([words[:, :1], own, words[:, 1 + self.vectors :]], 1)

        handle = self.model.text_tower.token_embedding.register_forward_hook(put)
        try:
            return self.model.encode_text(self.tokens)
        finally:
            handle.remove()


def _check(model: Any) -> None:
    if not isinstance(model, DualEncoder) or model.reads_features or not trims_exactly(model.text_tower):
        tower = getattr(model, "text_tower", model)
        raise UserError(
            f"prompts are learned through the text tower, and {type(tower).__name__} has no place for them; "
            "coop and kgcoop need a causal text transformer that pools at the end of the text, as CLIP's does"
        )


def _with_places(model: DualEncoder, classes: Sequence[str], vectors: int) -> Int64[Tensor, "c t"]:
    """The tokens of the class names with `vectors` places behind the start. Raises UserError where they do not fit."""
    full = model.tokenizer.context_length
    rows = model.tokenizer([f"{name.replace('_', ' ')}." for name in classes])
    if rows.shape[1] + vectors > full:
        longest = int((rows != 0).sum(1).argmax())
        raise UserError(
            f"{vectors} learned vectors and the class name {classes[longest]!r} do not fit into the model's {full} "
            "tokens; give fewer --vectors or shorter names"
        )
    places = torch.full((len(rows), vectors), HELD)
    return torch.cat([rows[:, :1], places, rows[:, 1:]], 1)


def _start_words(model: Any) -> Float[Tensor, "m w"]:
    _check(model)
    words = model.tokenizer([START])[0, 1:-1].to(model.log_scale.device)
    return model.text_tower.token_embedding.weight[words].detach().float().cpu()


@contextmanager
def _still(model: DualEncoder) -> Iterator[None]:
    """In eval mode, no weight asks for a gradient, and gradients pass through a text tower that is locked."""
    asked = [(p, p.requires_grad) for p in model.parameters()]
    mode, locked, model.text_locked = model.training, model.text_locked, False
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.text_locked = locked
        for parameter, before in asked:
            parameter.requires_grad_(before)
        model.train(mode)


def _probed(name: str, settings: dict[str, float], texts: Float[Tensor, "c d"], validation: Set, test: Set) -> Probed:
    right = ((validation.x @ texts.T).argmax(1) == validation.y).double().mean()
    return Probed(name, settings, float(right), (test.x @ texts.T).argmax(1))
