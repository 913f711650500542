"""What a model's picture embeddings hold: linear probes, and few-shot classification with Tip-Adapter and TIP-X.

Whatever is tuned is tuned on validation pictures, never on the test set. Axes: n pictures, m training pictures,
c classes, d embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from clipkit.errors import UserError
from clipkit.evaluation.embed import Embedder, Model, encode_pictures, watched
from clipkit.evaluation.labelled import Labelled
from clipkit.evaluation.result import Metric
from clipkit.evaluation.roots import Roots
from clipkit.evaluation.zeroshot import TEMPLATES, mean_per_class, prompts_of, share, weights

Array = np.ndarray

L2 = tuple(10.0**power for power in range(0, -8, -1))
"""Strengths of the penalty tried, from strong to weak."""
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
BETAS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Weight and sharpness of Tip-Adapter's memory tried."""
SCALE = 100.0
"""Of cosines with class texts, as Tip-Adapter has it."""
GAMMAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Weight of TIP-X's third part tried."""
SMOOTH = 0.5
"""Temperature of TIP-X's class distributions."""


@dataclass(frozen=True)
class Set:
    """Embedded pictures."""

    x: Float[Tensor, "n d"]
    y: Int[Tensor, " n"]

    def only(self, chosen: Int[Array, " k"]) -> Set:
        """These pictures of it."""
        places = torch.from_numpy(chosen)
        return Set(self.x[places], self.y[places])

    def __add__(self, other: Set) -> Set:
        return Set(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


@dataclass(frozen=True)
class Probed:
    """What was chosen on the validation pictures, and the test pictures' classes."""

    method: str
    settings: dict[str, float]
    validation: float
    """Top-1 of the settings chosen, on the validation pictures."""
    predicted: Int[Tensor, " n"]


def embed(model: Model, data: Labelled, *, batch_size: int = 64, progress: bool = False) -> Set:
    """Unit embeddings of all pictures. Raises UserError naming a picture that cannot be read."""
    batches = encode_pictures(model, data.items, data.open, batch_size)
    rows = np.concatenate(list(watched(batches, len(data.items), "embedding pictures", progress)))
    return Set(torch.from_numpy(rows), torch.from_numpy(data.labels))


def class_texts(model: Model, classes: Sequence[str], templates: Sequence[str] | None = None) -> Float[Tensor, "c d"]:
    """The zero-shot classifier of class names, underscores as spaces."""
    prompts = [prompts_of([name.replace("_", " ")], templates or TEMPLATES) for name in classes]
    return torch.from_numpy(weights(Embedder(model, Roots()), prompts))


def split(labels: Int[Array, " n"], fraction: float = 0.2, seed: int = 0) -> tuple[Int[Array, " a"], Int[Array, " b"]]:
    """(training, validation) places: of every class that fraction, at least one, goes to validation.

    Raises UserError for a class with one picture.
    """
    rest, held = [], []
    for places in _by_class(labels, seed):
        if len(places) < 2:
            raise UserError("a class has one training picture only: none is left to validate on; give --val")
        count = max(1, round(fraction * len(places)))
        held.append(places[:count])
        rest.append(places[count:])
    return np.sort(np.concatenate(rest)), np.sort(np.concatenate(held))


def few(labels: Int[Array, " n"], shots: int, seed: int = 0) -> Int[Array, " k"]:
    """Places of `shots` pictures of every class. Raises UserError where a class has fewer."""
    chosen = []
    for places in _by_class(labels, seed):
        if len(places) < shots:
            raise UserError(f"--shots {shots}: a class has only {len(places)} training pictures")
        chosen.append(places[:shots])
    return np.sort(np.concatenate(chosen))


def sizes(labels: Int[Array, " n"]) -> list[int]:
    """How many pictures every class has."""
    return np.unique(labels, return_counts=True)[1].tolist()


def _by_class(labels: Int[Array, " n"], seed: int) -> list[Int[Array, " k"]]:
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def fit_linear(
    data: Set, classes: int, l2: float, start: Float[Tensor, "d+1 c"] | None = None, *, steps: int = 300
) -> Float[Tensor, "d+1 c"]:
    """Multinomial logistic regression: mean cross-entropy + l2/2 · |weights without bias|², by L-BFGS in float64."""
    x = torch.cat([data.x.double(), torch.ones(len(data.x), 1, dtype=torch.float64)], 1)
    found = torch.zeros(x.shape[1], classes, dtype=torch.float64) if start is None else start.clone()
    found.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [found], max_iter=steps, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ found, data.y) + l2 / 2 * found[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return found.detach()


def linear_probe(train: Set, validation: Set, test: Set, classes: int, l2s: Sequence[float] = L2) -> Probed:
    """A linear probe as in CLIP (arXiv 2103.00020, appendix A.3): the penalty that is best on the validation pictures,
    of equals the strongest, then fitted on both together.
    """
    best, chosen, fitted = -1.0, l2s[0], None
    for l2 in l2s:
        fitted = fit_linear(train, classes, l2, fitted)
        if (right := _top1(_linear(fitted, validation.x), validation.y)) > best:
            best, chosen = right, l2
    final = fit_linear(train + validation, classes, chosen)
    return Probed("linear probe", {"l2": chosen}, best, _linear(final, test.x).argmax(1))


def tip_adapter(train: Set, validation: Set, test: Set, texts: Float[Tensor, "c d"]) -> Probed:
    """Tip-Adapter without training (arXiv 2111.03930, equations 4 and 5).

    Logits of the class texts plus alpha · exp(beta · (cosines - 1)) with the few training pictures, summed by class.
    alpha and beta are the best on the validation pictures, of equals the smallest; the released code takes them from
    the test set.
    """
    labels = one_hot(train.y, len(texts)).to(train.x.dtype)

    def logits(x: Float[Tensor, "n d"], alpha: float, beta: float) -> Float[Tensor, "n c"]:
        return SCALE * x @ texts.T + alpha * torch.exp(beta * (x @ train.x.T - 1)) @ labels

    tried = {(a, b): _top1(logits(validation.x, a, b), validation.y) for a in ALPHAS for b in BETAS}
    alpha, beta = max(tried, key=lambda pair: tried[pair])
    chosen = {"alpha": alpha, "beta": beta}
    return Probed("Tip-Adapter", chosen, tried[alpha, beta], logits(test.x, alpha, beta).argmax(1))


def tip_x(train: Set, validation: Set, test: Set, texts: Float[Tensor, "c d"], name: str = "TIP-X") -> Probed:
    """TIP-X without training (SuS-X, arXiv 2211.16198, equations 3 to 6).

    Tip-Adapter's logits plus gamma · φ(−KL(p ‖ q)) summed by class, p and q the distributions over classes (softmax of
    cosines with the class texts / 0.5) of a picture and of a remembered one. φ maps linearly to the range of
    Tip-Adapter's affinities; the two ranges are those of the validation pictures, so that what a test picture gets
    does not depend on the others. alpha, beta and gamma are the best on the validation pictures, of equals the
    smallest.
    """
    labels = one_hot(train.y, len(texts)).to(train.x.dtype)
    remembered = torch.log_softmax(train.x @ texts.T / SMOOTH, 1)

    def unlike(x: Float[Tensor, "n d"]) -> Float[Tensor, "n m"]:
        log_p = torch.log_softmax(x @ texts.T / SMOOTH, 1)
        return (log_p.exp() * log_p).sum(1, keepdim=True) - log_p.exp() @ remembered.T  # KL

    far = unlike(validation.x)
    low, width = -far.max(), (far.max() - far.min()).clamp(min=1e-12)

    def parts(x: Float[Tensor, "n d"], beta: float) -> tuple[Tensor, Tensor]:
        """Tip-Adapter's part and TIP-X's, by class."""
        top, bottom = bounds[beta]
        alike = (-unlike(x) - low) / width * (top - bottom) + bottom
        return torch.exp(beta * (x @ train.x.T - 1)) @ labels, alike @ labels

    near = {beta: torch.exp(beta * (validation.x @ train.x.T - 1)) for beta in BETAS}
    bounds = {beta: (affinities.max(), affinities.min()) for beta, affinities in near.items()}
    tried: dict[tuple[float, float, float], float] = {}
    for beta in BETAS:
        tip, further = parts(validation.x, beta)
        base = SCALE * validation.x @ texts.T
        for alpha in ALPHAS:
            for gamma in GAMMAS:
                tried[alpha, beta, gamma] = _top1(base + alpha * tip + gamma * further, validation.y)
    alpha, beta, gamma = min(tried, key=lambda three: (-tried[three], three))
    tip, further = parts(test.x, beta)
    logits = SCALE * test.x @ texts.T + alpha * tip + gamma * further
    chosen = {"alpha": alpha, "beta": beta, "gamma": gamma}
    return Probed(name, chosen, tried[alpha, beta, gamma], logits.argmax(1))


def support(pool: Float[Tensor, "n d"], texts: Float[Tensor, "c d"], shots: int) -> Set:
    """SuS-X's support set by retrieval: of unlabelled pictures the `shots` nearest to each class's text stand for it.

    Raises UserError where there are fewer pictures than that.
    """
    if shots > len(pool):
        raise UserError(f"--shots {shots}: --support holds only {len(pool)} pictures")
    nearest = (texts @ pool.T).topk(shots, dim=1).indices
    return Set(pool[nearest.flatten()], torch.arange(len(texts)).repeat_interleave(shots))


def zero_shot(validation: Set, test: Set, texts: Float[Tensor, "c d"]) -> Probed:
    """The class texts alone, for comparison."""
    return Probed("zero-shot", {}, _top1(validation.x @ texts.T, validation.y), (test.x @ texts.T).argmax(1))


def metrics(probed: Probed, test: Set, classes: int) -> dict[str, Metric]:
    """top1 and mean_per_class on the test pictures, with intervals and chance."""
    right = (probed.predicted == test.y).double().numpy()
    return {"top1": share(right, 1 / classes), "mean_per_class": mean_per_class(right, test.y.numpy(), classes)}


def summary(probed: Probed, test: Set, classes: int) -> dict[str, Any]:
    """For JSON: method, settings, validation, metrics."""
    found = {name: vars(metric) for name, metric in metrics(probed, test, classes).items()}
    return {"method": probed.method, "settings": probed.settings, "validation": probed.validation, "metrics": found}


def _linear(fitted: Float[Tensor, "d+1 c"], x: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
    return x.double() @ fitted[:-1] + fitted[-1]


def _top1(logits: Float[Tensor, "n c"], y: Int[Tensor, " n"]) -> float:
    return float((logits.argmax(1) == y).double().mean())
