"""The contrast with the whole data set, from small batches: moving averages of every sample (SogCLR and its kin).

For an anchor x_i (an image or a caption), its pair's other side y_i and its n_i rivals j in the batch:

    h_ij = x_i·y_j - x_i·y_i      g_i = mean_j e^{h_ij / tau}      u_i ← (1 - gamma) u_i + gamma g_i

What is wanted is the least tau log E_j e^{h_ij / tau} over all the data. A batch's log g_i falls short of it, the more
the smaller the batch; its slope is therefore taken as ∇g_i / u_i, where u_i remembers other batches. A sample that is
met for the first time has u_i = g_i, one without rivals in the batch is left as it is. u is kept as its logarithm,
which needs no running maximum. Both sides of a pair have a u of their own, kept in the checkpoint by the sample's id.
A sample that is in a batch twice enters twice, with the same past; what is kept is the mean of both.

All are made of `contrast_tables`: large batches are computed in tiles. Axes: n pairs, d.
"""

from __future__ import annotations

from math import pi
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError
from clipkit.model.embeddings import Embeddings
from clipkit.objective.kernel import full, mean_rows
from clipkit.objective.samples import SampleTable
from clipkit.objective.tables import Block, contrast_tables, pairs
from clipkit.registry import term
from clipkit.settings import Count

SIDES = ("image", "text")
AboveZero = Annotated[float, Field(gt=0.0)]
Portion = Annotated[float, Field(gt=0.0, le=1.0)]
Rows = Float[Tensor, " n"]


class Comparison:
    """A batch as both sides see it, what is known of its samples, and what will be (`news`)."""

    def __init__(self, z: Embeddings, samples: SampleTable, mask_same_group: bool):
        assert z.replicated or not distributed.active(), "terms take global tables: z.world()"
        image, text = full(z.image), full(z.text)
        self.tables = {"image": (image, text), "text": (text, image)}
        self.replicated = z.replicated
        self.relation = pairs(len(z), image.device, z.group if mask_same_group else None)
        self.rivals = _rivals(z, mask_same_group)
        self.alone: Bool[Tensor, " n"] = self.rivals == 0
        self.known = samples.read(z.id, image)
        self.news: dict[str, Rows] = {}
        self.scale = torch.as_tensor(z.scale, dtype=image.dtype, device=image.device).reshape(())

    def past(self, column: str, first: float) -> Rows:
        """A column, `first` where a sample was never met."""
        return self.known[column].nan_to_num(nan=first)

    def remember(self, column: str, values: Rows) -> None:
        """What to write; samples without rivals stay as they are."""
        self.news[column] = torch.where(self.alone, self.known[column], values.detach())

    def log_g(self, side: str, warmth: Tensor) -> Rows:
        """log g_i with gradient, also to `warmth`, the 1/tau of all or of each; 0 without rivals."""
        anchors, others = self.tables[side]
        return self._log_sums(anchors, others, warmth) - self.rivals.clamp(min=1).to(anchors.dtype).log()

    def mean_h(self, side: str, warmth: Tensor) -> Rows:
        """Σ_j w_ij h_ij with w_i = softmax_j(h_ij / tau), a constant: the slope of log g_i in its 1/tau."""
        anchors, others = self.tables[side]
        with torch.enable_grad(), torch.autocast(anchors.device.type, enabled=False):
            each = warmth.detach().expand(len(anchors)).clone().requires_grad_()
            rows = self._log_sums(anchors.detach(), others.detach(), each)
            (slopes,) = torch.autograd.grad(rows.sum(), each)
        # Ranks that divide the tiles have the slopes of their own anchors, times the number of ranks.
        return distributed.all_gather(slopes[None]).mean(0) if self.replicated else slopes

    def log_u(self, side: str, log_g: Rows, gamma: Tensor | float) -> Rows:
        """The moving average with this batch in it, remembered too."""
        old, new = self.known[f"log_u_{side}"], log_g.detach()
        gamma = torch.as_tensor(gamma, dtype=new.dtype, device=new.device)
        mixed = torch.logaddexp(old + (-gamma).log1p(), new + gamma.log())
        log_u = torch.where(old.isnan(), new, mixed)
        self.remember(f"log_u_{side}", log_u)
        return log_u

    def mean(self, rows: Rows) -> Float[Tensor, ""]:
        """Over all pairs; those without rivals add nothing."""
        return mean_rows(rows.masked_fill(self.alone, 0.0))

    def _log_sums(self, anchors: Float[Tensor, "n d"], others: Float[Tensor, "n d"], warmth: Tensor) -> Rows:
        anchors = anchors * warmth.expand(len(anchors))[:, None]
        block = Block(others, self.relation)
        return contrast_tables(anchors, [block], log_alpha=-torch.inf, replicated=self.replicated)[0]


def _rivals(z: Embeddings, mask_same_group: bool) -> Tensor:
    """How many each pair has."""
    if not mask_same_group:
        return torch.full_like(z.id, len(z) - 1)
    _, place, count = z.group.unique(return_inverse=True, return_counts=True)
    return len(z) - count[place]


class _Remembering:
    """The face of a term that remembers something of every sample, in columns for each side and others."""

    def __init__(self, *of_sides: str, others: tuple[str, ...] = ()):
        self.samples = SampleTable(*(f"{name}_{side}" for name in of_sides for side in SIDES), *others)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by sample: at the main rank."""
        return self.samples.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.samples.load_state(state)

    def undo(self) -> None:
        """Forget the last batch."""
        self.samples.undo()


@term(name="sogclr")
class SogCLR(_Remembering):
    """Contrast with the whole data set at a fixed temperature. SogCLR, arXiv 2202.12387.

        Σ_(both ways) mean_i mean_j sg( e^{h_ij / tau} / u_i ) h_ij      tau = 1/s

    The slope is that of tau log E_j e^{h_ij / tau}, the value is not; with gamma 1 it is the batch's, of 2 tau `dcl`.
    s is the model's scale; it gets no gradient, so that `model.scale` says the temperature. h, u and gamma are as at
    the head of the module. The released code leaves the pair itself in the sum over j.
    """

    def __init__(self, *, gamma: Portion = 0.1, mask_same_group: bool = True):
        super().__init__("log_u")
        self.gamma, self.mask_same_group = gamma, mask_same_group

    def __call__(self, z: Embeddings) -> Float[Tensor, ""]:
        batch = Comparison(z, self.samples, self.mask_same_group)
        warmth = batch.scale.detach()
        sides = [_surrogate(batch, side, warmth, self.gamma)[0] for side in SIDES]
        self.samples.write(z.id, batch.news)
        return sides[0] + sides[1]


@term(name="isogclr")
class ISogCLR(_Remembering):
    """Contrast with the whole data set, with a temperature for each sample and side. iSogCLR, arXiv 2305.11965.

        Σ_(both ways) mean_i mean_j sg( e^{h_ij / tau_i} / u_i ) h_ij
        m_i ← (1 - beta) m_i + beta clamp( log u_i + rho - mean_j e^{h_ij / tau_i} / u_i · h_ij / tau_i, ±5 )
        tau_i ← clamp( tau_i - eta m_i, 0.005, 1 )      for the next time, at first `tau`

    The slope is that of mean_i tau_i (log E_j e^{h_ij / tau_i} + rho), the value is not. The model's scale is not used.
    """

    def __init__(
        self,
        *,
        gamma: Portion = 0.8,
        tau: Annotated[float, Field(ge=0.005, le=1.0)] = 0.01,
        rho: float = 6.0,
        eta: AboveZero = 0.03,
        beta: Portion = 0.9,
        mask_same_group: bool = True,
    ):
        super().__init__("log_u", "tau", "moment")
        self.gamma, self.tau, self.rho, self.eta, self.beta = gamma, tau, rho, eta, beta
        self.mask_same_group = mask_same_group

    def __call__(self, z: Embeddings) -> Float[Tensor, ""]:
        batch = Comparison(z, self.samples, self.mask_same_group)
        total = torch.zeros_like(batch.scale)
        for side in SIDES:
            tau = batch.past(f"tau_{side}", self.tau)
            value, log_u, weighed_h = _surrogate(batch, side, 1 / tau, self.gamma)
            total = total + value
            slope = (log_u + self.rho - weighed_h / tau).clamp(-5.0, 5.0)
            moment = (1 - self.beta) * batch.past(f"moment_{side}", 0.0) + self.beta * slope
            batch.remember(f"moment_{side}", moment)
            batch.remember(f"tau_{side}", (tau - self.eta * moment).clamp(0.005, 1.0))
        self.samples.write(z.id, batch.news)
        return total


def _surrogate(batch: Comparison, side: str, warmth: Tensor, gamma: float) -> tuple[Tensor, Rows, Rows]:
    """One side's mean_i mean_j sg(e^{h/tau} / u) h; log u, and the mean over j for each i."""
    log_g = batch.log_g(side, warmth)
    log_u = batch.log_u(side, log_g, gamma)
    share = (log_g.detach() - log_u).exp()  # g / u
    weighed_h = share * batch.mean_h(side, warmth)
    rows = weighed_h + share / warmth * (log_g - log_g.detach())
    return batch.mean(rows), log_u, weighed_h


Version = Literal["v0", "v1", "v2", "v3"]


@term(name="fastclip")
class FastCLIP(_Remembering):
    """Contrast with the whole data set under four rules for the temperature. FastCLIP, arXiv 2407.01445.

        v0   ½ Σ_(both ways) mean_i log u_i                        tau = 1/s learned with the model's scale
        v1   ½ Σ_(both ways) mean_i tau log u_i                    tau = 1/s, not learned: `model.scale` says it
        v2   ½ Σ_(both ways) mean_i tau_i (log u_i + rho)          a tau_i for each sample and side, at first `tau`
        v3   ½ Σ_(both ways) mean_i tau (log u_i + rho)            tau = 1/s learned with the model's scale

    The slope of log u_i is ∇g_i / u_i, in the embeddings as in tau; so v3's in tau is the mean of
    log u_i + rho - mean_j e^{h_ij / tau} / u_i · h_ij / tau.
    v2 takes Adam's steps of `eta` (betas 0.9 and 0.999, slopes clamped to ±5) on tau_i, which stays in [0.01, 1].

    gamma is 1 when a sample comes up first and falls in a cosine to `gamma` over its next `visits` (0: at once). These
    are counted for each sample, as terms know no epochs: one an epoch, of which the paper takes half of the run's.
    `rho` (default 6.5, in v2 7) is for v2 and v3, `tau` (0.03) and `eta` (0.0133) for v2 alone.

    The released code reports g / u, takes half the gradient when distributed, learns tau at a rate of its own, and its
    v3 has another slope in tau than the one it states.
    """

    def __init__(
        self,
        *,
        version: Version = "v3",
        gamma: Portion = 0.2,
        visits: Count = 16,
        rho: float | None = None,
        tau: Annotated[float, Field(ge=0.01, le=1.0)] | None = None,
        eta: AboveZero | None = None,
        mask_same_group: bool = True,
    ):
        used = {"v0": (), "v1": (), "v2": ("rho", "tau", "eta"), "v3": ("rho",)}[version]
        for name, value in {"rho": rho, "tau": tau, "eta": eta}.items():
            if value is not None and name not in used:
                raise UserError(f"fastclip: {name} is nothing to {version}; leave it out, or choose another version")
        super().__init__("log_u", *(("tau", "moment", "square") if version == "v2" else ()), others=("visits",))
        self.version, self.gamma, self.visits, self.mask_same_group = version, gamma, visits, mask_same_group
        standard = {"v2": 7.0, "v3": 6.5}.get(version, 0.0)
        self.rho = standard if rho is None else rho
        self.tau = 0.03 if tau is None else tau
        self.eta = 0.0133 if eta is None else eta

    def __call__(self, z: Embeddings) -> Float[Tensor, ""]:
        batch = Comparison(z, self.samples, self.mask_same_group)
        visits = batch.past("visits", 0.0)
        batch.remember("visits", visits + 1)
        sides = [self._side(batch, side, visits) for side in SIDES]
        self.samples.write(z.id, batch.news)
        return (sides[0] + sides[1]) / 2

    def _side(self, batch: Comparison, side: str, visits: Rows) -> Float[Tensor, ""]:
        tau = batch.past(f"tau_{side}", self.tau) if self.version == "v2" else 1 / batch.scale
        if self.version == "v1":
            tau = tau.detach()
        log_g = batch.log_g(side, 1 / tau)
        log_u = batch.log_u(side, log_g, falling(visits, self.gamma, self.visits))
        share = (log_g.detach() - log_u).exp()  # g / u
        rows = log_u + share * (log_g - log_g.detach())
        if self.version == "v2":
            slope = log_u + self.rho - share * batch.mean_h(side, 1 / tau) / tau
            self._warm(batch, side, tau, slope.clamp(-5.0, 5.0), visits + 1)
        return batch.mean(rows if self.version == "v0" else tau * (rows + self.rho))

    def _warm(self, batch: Comparison, side: str, tau: Rows, slope: Rows, count: Rows) -> None:
        """Adam's step on each sample's temperature, its `count`-th."""
        moment = 0.9 * batch.past(f"moment_{side}", 0.0) + 0.1 * slope
        square = 0.999 * batch.past(f"square_{side}", 0.0) + 0.001 * slope**2
        step = moment / (1 - 0.9**count) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        batch.remember(f"moment_{side}", moment)
        batch.remember(f"square_{side}", square)
        batch.remember(f"tau_{side}", (tau - self.eta * step).clamp(0.01, 1.0))


def falling(visits: Rows, least: float, over: int) -> Rows:
    """1 at the first visit, then down in a cosine to `least` at the visit after `over` others."""
    way = (visits / over).clamp(max=1.0) if over else (visits > 0).to(visits.dtype)
    return (least + (1 - least) / 2 * (1 + (pi * way).cos())).clamp(max=1.0)
