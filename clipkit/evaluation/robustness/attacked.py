"""How many pictures are still known when they are moved against the model (as TeCoA measures it, arXiv 2212.07016).

    x ← clamp( x + step_size · sign ∇_x CE(s v(x) · T, class) )      to within eps of the picture, and to 0…255

T is the zero-shot classifier, s the model's scale. The pixels are those the tower reads, after resizing. A picture
counts as known if it is so at the beginning and after every step: what the attack has once found stands, so that more
steps never make a model look better. The first step starts from the picture itself.
Axes: n pictures, c classes, s side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipkit.errors import UserError
from clipkit.evaluation.benchmark import Attack, Benchmark, Picture
from clipkit.evaluation.embed import Embedder, watched
from clipkit.evaluation.result import Metric, Result, begin, headline, policy
from clipkit.evaluation.robustness.classes import Classes, cosines, known, read, shown
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.scores import Tie
from clipkit.evaluation.zeroshot import mean_per_class, share

Array = np.ndarray


@dataclass
class Attacked:
    """Ready to be scored."""

    benchmark: Benchmark
    classes: Classes
    attack: Attack

    @property
    def pictures(self) -> list[Picture]:
        """All of them."""
        return self.classes.pictures

    @property
    def texts(self) -> list[str]:
        """All prompts."""
        return self.classes.texts

    def score(self, embedder: Embedder, tie: str) -> Result:
        """Accuracy before and under attack. Raises UserError for a model without gradient to its pixels."""
        rule, classifier = policy(self.benchmark, tie), self.classes.classifier(embedder)
        s = cosines(embedder.pictures(self.pictures), classifier)
        clean, tied = known(s, self.classes.labels, rule)
        withstood = clean * self._withstood(embedder, classifier, rule)
        count = len(self.classes.names)
        metrics: dict[str, Metric] = {}
        for name, credit in (("clean", clean), ("adversarial", withstood)):
            metrics[f"{name}/top1"] = share(credit, 1 / count)
            metrics[f"{name}/mean_per_class"] = mean_per_class(credit, self.classes.labels, count)
        by_class = {
            name: {"adversarial": share(withstood[self.classes.labels == label], 1 / count)}
            for label, name in enumerate(self.classes.names)
            if (self.classes.labels == label).any()
        }
        return begin(
            self.benchmark,
            n=len(s),
            headline=headline(self.benchmark, metrics, "adversarial/top1"),
            metrics=metrics,
            by_category=by_class,
            tie={"policy": tie, "rule": rule, "rate": float(tied.mean()), "by_score": {}},
            coverage=self.classes.coverage,
            details={"attack": self.attack.model_dump()},
            items=[
                {
                    "id": name,
                    "category": self.classes.names[self.classes.labels[n]],
                    "cluster": name,
                    "correct": float(withstood[n]),
                    "decisions": {"clean": float(clean[n]), "adversarial": float(withstood[n])},
                }
                for n, name in enumerate(self.classes.ids)
            ],
            examples=[
                self.classes.example(
                    embedder,
                    n,
                    self.pictures[n],
                    s[n],
                    float(clean[n]),
                    name,
                    self.classes.names[self.classes.labels[n]],
                )
                for n in shown(clean.tolist())
                for name in [self.classes.ids[n]]
            ],
            protocol=self.classes.protocol,
        )

    def _withstood(self, embedder: Embedder, classifier: Float[Array, "c d"], tie: Tie) -> Float[Array, " n"]:
        """The credit left after every step; every rank attacks its share."""
        from clipkit.distributed import gather_objects, rank, world_size
        from clipkit.model.dual_encoder import load_pixels

        model = _with_gradient(embedder.model)
        device = model.log_scale.device
        weights, labels = torch.from_numpy(classifier).to(device), torch.from_numpy(self.classes.labels).to(device)
        mine = list(range(len(labels)))[rank() :: world_size()]

        def parts() -> Iterator[Array]:
            for at in range(0, len(mine), embedder.batch_size):
                some = mine[at : at + embedder.batch_size]
                pixels = torch.stack([load_pixels(embedder.open(self.pictures[n]), model.preprocess) for n in some])
                yield withstood(model, pixels.to(device), labels[some], weights, self.attack, tie)

        found = list(watched(parts(), len(mine), "attacking pictures", embedder.progress))
        out = np.empty(len(labels))
        for number, share_of_rank in enumerate(gather_objects(np.concatenate(found) if found else np.empty(0))):
            out[number :: world_size()] = share_of_rank
        return out


def prepare(benchmark: Benchmark, roots: Roots, allow_missing: bool = False) -> Attacked:
    """Raises UserError as zero-shot benchmarks do."""
    assert benchmark.attack is not None
    return Attacked(benchmark, read(benchmark, roots, allow_missing), benchmark.attack)


def withstood(
    model: Any,
    pixels: Float[Tensor, "n 3 s s"],
    labels: Int[Tensor, " n"],
    classifier: Float[Tensor, "c d"],
    attack: Attack,
    tie: Tie,
) -> Float[Array, " n"]:
    """The least credit over all steps. No weight, statistic or random number is touched."""
    still, locked, mode = pixels.float(), model.image_locked, model.training
    low, high = (still - attack.eps).clamp(min=0), (still + attack.eps).clamp(max=255)
    moved, least = still, np.ones(len(pixels))
    model.eval()
    model.image_locked = False  # a locked tower cuts its gradient off
    try:
        for step in range(attack.steps + 1):
            moved = moved.detach().requires_grad_()
            embedded = model.encode_image(moved)
            s = cosines(embedded.detach().cpu().numpy(), classifier.cpu().numpy())
            least = np.minimum(least, known(s, labels.cpu().numpy(), tie)[0])
            if step == attack.steps:
                break
            loss = cross_entropy(model.scale.detach() * embedded @ classifier.T, labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, moved)
            moved = (moved + attack.step_size * slope.sign()).clamp(low, high)
    finally:
        model.image_locked = locked
        model.train(mode)
    return least


def _with_gradient(model: Any) -> Any:
    from clipkit.model.dual_encoder import DualEncoder

    if not isinstance(model, DualEncoder):
        raise UserError(
            f"attack: needs the gradient of a model's pixels, which {type(model).__name__} does not give; it takes a "
            "model that clipkit.load returns"
        )
    return model
