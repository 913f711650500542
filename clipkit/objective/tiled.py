"""The contrast of `kernel.py` without its matrix of logits: exact, from tables of embeddings, tile by tile.

Tiles are made, used and thrown away, once forward and once more backward; one serves the rows and, with `both`, the
columns: four matrix products in all. With logits L = s A Cᵀ, x = log p, targets π and candidate weights w, a row is

    forward     top = max (L + log w),  mass = Σ e^{L + log w - top},  x = L - top - log mass
    backward    dL = g (π f'(x) - G e^{L + log w - top} / mass),   f(x) = -(1 - e^x)^gamma x,   G = Σ π f'(x)
                dA += s dL C,   dC += s dLᵀ A,   ds = Σ A · dA / s

With gamma, tiles that hold a positive are made a second time forward, when x is known; so every form is exact.

Where all ranks hold the same tables (`Embeddings.world()`), a rank makes only the tiles of its share of the anchors,
and the sums are joined once, forward. Its gradient is that of its tiles times the number of ranks: summed over ranks as
`distributed.all_gather` does, and averaged by the engine, it is what it would be had each rank made all tiles.
Axes: a anchors, c candidates, e extra terms, d; r rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clipkit import distributed
from clipkit.errors import UserError
from clipkit.objective.kernel import Mode

# A tile and what is made of it stay in a core's caches (perf/loss.py); a GPU wants fewer and larger launches.
TILES = {"cpu": (512, 1024), "gpu": (4096, 8192)}

Relation = Callable[[slice, slice], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Form:
    """Which contrast: the settings of `contrast_rows`, and whether the first table's rows are anchors too."""

    both: bool = False
    log_alpha: float = 0.0
    gamma: float = 0.0
    mode: Mode = "mean_log"


def tiled_rows(
    anchors: Float[Tensor, "a d"],
    tables: Sequence[Float[Tensor, "_ d"]],
    relations: Sequence[Relation],
    scale: Tensor | float,
    extra: Float[Tensor, "a e"] | None,
    form: Form,
    *,
    replicated: bool = False,
) -> tuple[Float[Tensor, " _"], ...]:
    """One loss an anchor and, with `form.both`, one for each candidate of the first table; see `contrast_tables`."""
    parts = distributed.world_size() if replicated else 1
    count, part = len(anchors), distributed.rank() if replicated else 0
    sweep = _Sweep(form, tuple(relations), range(count * part // parts, count * (part + 1) // parts), parts)
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float64)
    return _Tiled.apply(sweep, scale.to(anchors.device), extra, anchors, *tables)  # type: ignore[return-value]


@dataclass
class _Tile:
    """One tile: where it lies, its scaled anchors and its candidates, and what the relation says of them."""

    rows: slice
    columns: slice
    table: int
    anchors: Float[Tensor, "r d"]
    candidates: Float[Tensor, "c d"]
    targets: Tensor | None
    seen: Tensor | None
    spaces: tuple[Tensor, Tensor]

    def space(self, i: int) -> Float[Tensor, "r c"]:
        """Memory for one number a logit, shared by all tiles."""
        shape = len(self.anchors), len(self.candidates)
        return self.spaces[i][: shape[0] * shape[1]].view(shape)

    def logits(self) -> Float[Tensor, "r c"]:
        return torch.mm(self.anchors, self.candidates.T, out=self.space(0))

    def terms(self, logits: Float[Tensor, "r c"], log_alpha: float) -> Float[Tensor, "r c"]:
        """With weights and log_alpha. Written over `logits` unless there are positives, which ask for those again."""
        terms = logits if self.targets is None else logits.clone()
        if self.seen is not None and self.seen.dtype == torch.bool:
            terms.masked_fill_(~self.seen, -torch.inf)
        elif self.seen is not None:
            terms += self.seen
        if log_alpha and self.targets is not None:
            terms = torch.where(self.targets > 0, terms + log_alpha, terms)
        return terms


@dataclass(frozen=True)
class _Sweep:
    """What is asked for beside tensors: the form, the tables' relations, this rank's anchors, the number of ranks."""

    form: Form
    relations: tuple[Relation, ...]
    anchors: range
    ranks: int

    def tiles(self, scale: Tensor, anchors: Tensor, tables: Sequence[Tensor]) -> Iterator[_Tile]:
        """All tiles of this rank, in the type of `scale`."""
        height, width = _shape(anchors)
        size = min(height, len(self.anchors)) * min(width, max(map(len, tables), default=0))
        spaces = scale.new_empty(size), scale.new_empty(size)
        for rows in _pieces(self.anchors, height):
            scaled = anchors[rows].to(scale.dtype) * scale
            for i, (table, relation) in enumerate(zip(tables, self.relations)):
                for columns in _pieces(range(len(table)), width):
                    targets, seen = relation(rows, columns)
                    yield _Tile(rows, columns, i, scaled, table[columns].to(scale.dtype), targets, seen, spaces)


def _shape(x: Tensor) -> tuple[int, int]:
    return TILES["cpu" if x.device.type == "cpu" else "gpu"]


def _pieces(whole: range, size: int) -> Iterator[slice]:
    for start in range(whole.start, whole.stop, size):
        yield slice(start, min(start + size, whole.stop))


class _LogSum:
    """Running log-sum-exp of each of `count` rows, as its largest term and the sum relative to that."""

    def __init__(self, count: int, like: Tensor):
        # Finite, so that a row of nothing but -inf keeps mass 0 instead of turning to NaN.
        self.top = like.new_full((count,), torch.finfo(like.dtype).min)
        self.mass = like.new_zeros(count)

    def add(self, terms: Tensor, axis: int, at: slice, space: Tensor) -> None:
        """More terms of the rows `at`, summed over `axis`; `space` is written over."""
        top = torch.maximum(self.top[at], terms.amax(axis))
        mass = torch.sub(terms, top.unsqueeze(axis), out=space).exp_().sum(axis)
        self.mass[at] = self.mass[at] * (self.top[at] - top).exp() + mass
        self.top[at] = top

    def join(self) -> None:
        """The terms of all ranks."""
        tops, masses = distributed.all_gather(torch.stack([self.top, self.mass])[None]).unbind(1)
        self.top = tops.amax(0)
        self.mass = (masses * (tops - self.top).exp()).sum(0)


class _Softmax:
    """The softmaxes of one direction, over each row of the logits (axis 1) or each column (0), and their mean_log."""

    def __init__(self, count: int, axis: int, form: Form, like: Tensor):
        self.axis, self.form, self.terms = axis, form, _LogSum(count, like)
        self.value, self.weight = like.new_zeros(count), like.new_zeros(count)  # Σ π L, Σ π

    def at(self, tile: _Tile) -> slice:
        return tile.rows if self.axis == 1 else tile.columns

    def wide(self, x: Tensor, tile: _Tile) -> Tensor:
        """A tile's part of one number a row, to be broadcast over the tile."""
        return x[self.at(tile)].unsqueeze(self.axis)

    def add(self, tile: _Tile, logits: Tensor, terms: Tensor) -> None:
        """Take up one tile."""
        self.terms.add(terms, self.axis, self.at(tile), tile.space(1))
        if tile.targets is not None:
            self.add_positives(tile, tile.targets, logits)

    def add_positives(self, tile: _Tile, targets: Tensor, logits: Tensor) -> None:
        self.value[self.at(tile)] += (targets * logits).sum(self.axis)
        self.weight[self.at(tile)] += targets.sum(self.axis)

    def join(self) -> None:
        """The sums of all ranks."""
        self.terms.join()
        self.join_positives()

    def join_positives(self) -> None:
        self.value, self.weight = distributed.all_gather(torch.stack([self.value, self.weight])[None]).sum(0)

    def settle(self) -> None:
        """All terms are known: which rows have nothing to contrast (a NaN is not nothing)."""
        self.empty = (self.found() == 0) | (self.terms.mass == 0)

    def found(self) -> Tensor:
        """Not 0 where a row has a positive."""
        return self.weight

    def losses(self) -> Tensor:
        """One a row. Large numbers are subtracted first."""
        rows = self.weight * self.terms.top - self.value + self.weight * self.terms.mass.log()
        return rows.masked_fill(self.empty, 0.0)

    def push(self, grad: Tensor) -> Tensor:
        """A row's factor of e^{term - top} in the gradient of its terms: g G / mass, but for the sign."""
        return (grad * self.total() / self.terms.mass).masked_fill(self.empty, 0.0)

    def total(self) -> Tensor:
        return self.weight

    def pull(self, tile: _Tile, targets: Tensor, logits: Tensor, grad: Tensor) -> Tensor:
        """The positives' own part of the gradient of one tile."""
        return self.slope(tile, targets, logits) * self.wide(grad.masked_fill(self.empty, 0.0), tile)

    def slope(self, tile: _Tile, targets: Tensor, logits: Tensor) -> Tensor:
        return -targets.to(logits.dtype)


class _FocalSoftmax(_Softmax):
    """mean_log with gamma: value and weight become Σ π f and -Σ π f' when x is known, in a second pass."""

    def settle(self) -> None:
        super().settle()
        self.log_sum = (self.terms.top + self.terms.mass.log()).masked_fill(self.empty, 0.0)
        self.value, self.weight = torch.zeros_like(self.value), torch.zeros_like(self.weight)

    def add_focal(self, tile: _Tile, targets: Tensor, logits: Tensor) -> None:
        """Take up the positives of one tile."""
        value, slope = self.focal(tile, logits)
        self.value[self.at(tile)] += (targets * value).sum(self.axis)
        self.weight[self.at(tile)] -= (targets * slope).sum(self.axis)

    def focal(self, tile: _Tile, logits: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and f'(x). Outside the denominator x may exceed 0; there the factor stands still (`contrast_rows`)."""
        x, gamma = logits - self.wide(self.log_sum, tile), self.form.gamma
        below = x.clamp(max=-torch.finfo(x.dtype).tiny)
        rest = -below.expm1()
        bend = torch.where(x == below, gamma * rest ** (gamma - 1) * below.exp(), 0.0)
        return -(rest**gamma) * x, bend * x - rest**gamma

    def losses(self) -> Tensor:
        return self.value.masked_fill(self.empty, 0.0)

    def slope(self, tile: _Tile, targets: Tensor, logits: Tensor) -> Tensor:
        return targets * self.focal(tile, logits)[1]


class _SumSoftmax(_Softmax):
    """log_sum: a second log-sum-exp, over the positives."""

    def __init__(self, count: int, axis: int, form: Form, like: Tensor):
        super().__init__(count, axis, form, like)
        self.positives = _LogSum(count, like)

    def add_positives(self, tile: _Tile, targets: Tensor, logits: Tensor) -> None:
        kept = logits.masked_fill(targets <= 0, -torch.inf)
        self.positives.add(kept, self.axis, self.at(tile), tile.space(1))

    def join_positives(self) -> None:
        self.positives.join()

    def found(self) -> Tensor:
        return self.positives.mass

    def losses(self) -> Tensor:
        rows = self.terms.top - self.positives.top + (self.terms.mass.log() - self.positives.mass.log())
        return rows.masked_fill(self.empty, 0.0)

    def total(self) -> Tensor:
        return torch.ones_like(self.weight)

    def slope(self, tile: _Tile, targets: Tensor, logits: Tensor) -> Tensor:
        mass = self.positives.mass.masked_fill(self.empty, 1.0)
        share = (logits - self.wide(self.positives.top, tile)).exp_() / self.wide(mass, tile)
        return -share.masked_fill(targets <= 0, 0.0)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sweep: _Sweep, scale: Tensor, extra: Tensor | None, anchors: Tensor, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sweep = sweep
        ctx.save_for_backward(scale, extra, anchors, *tables)
        with torch.autocast(anchors.device.type, enabled=False):
            ctx.softmaxes = _forward(sweep, _working(scale, anchors, tables), extra, anchors, tables)
            return tuple(softmax.losses() for softmax in ctx.softmaxes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would keep silent where only the inputs want a second one
            raise UserError(
                "the tiled contrast has no second derivative (create_graph=True); for the matrix, which has one, "
                "set clipkit.objective.tables.TILED_FROM above the number of logits"
            )
        scale, extra, *inputs = ctx.saved_tensors
        _, for_scale, for_extra, *wanted = ctx.needs_input_grad
        working = _working(scale, inputs[0], inputs[1:])
        scale_grad = extra_grad = None
        with torch.autocast(inputs[0].device.type, enabled=False):
            needed = [wanted[0] or for_scale, *wanted[1:]]
            sums = _backward(ctx.sweep, ctx.softmaxes, grads, working, inputs[0], inputs[1:], needed)
            if for_scale:
                scale_grad = _scale_gradient(ctx.sweep, inputs[0], sums[0]).to(scale).reshape(scale.shape)
            if for_extra:
                extra_grad = _extra_gradient(ctx.softmaxes[0], grads[0], extra)
            if wanted[0]:
                sums[0] *= working
        gradients = (x.to(y.dtype) if want else None for x, y, want in zip(sums, inputs, wanted))
        return None, scale_grad, extra_grad, *gradients


def _working(scale: Tensor, anchors: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The scale as a single number of the type that everything is computed in: fp64 if any table is, else fp32."""
    double = any(x.dtype == torch.float64 for x in (anchors, *tables))
    return scale.reshape(()).to(torch.float64 if double else torch.float32)


def _forward(
    sweep: _Sweep, scale: Tensor, extra: Tensor | None, anchors: Tensor, tables: Sequence[Tensor]
) -> list[_Softmax]:
    form = sweep.form
    kind = _SumSoftmax if form.mode == "log_sum" else _FocalSoftmax if form.gamma else _Softmax
    softmaxes = [kind(len(anchors), 1, form, scale)]
    if form.both:
        softmaxes.append(kind(len(tables[0]), 0, form, scale))
    for tile in sweep.tiles(scale, anchors, tables):
        logits = tile.logits()
        terms = tile.terms(logits, form.log_alpha)
        for softmax in _concerned(softmaxes, tile):
            softmax.add(tile, logits, terms)
    if sweep.ranks > 1:
        for softmax in softmaxes:
            softmax.join()
    if extra is not None and extra.shape[1]:
        softmaxes[0].terms.add(extra.to(scale.dtype), 1, slice(0, len(anchors)), scale.new_empty(extra.shape))
    for softmax in softmaxes:
        softmax.settle()
    focal = [softmax for softmax in softmaxes if isinstance(softmax, _FocalSoftmax)]
    if focal:
        _second_pass(sweep, scale, anchors, tables, focal)
    return softmaxes


def _second_pass(
    sweep: _Sweep, scale: Tensor, anchors: Tensor, tables: Sequence[Tensor], softmaxes: list[_FocalSoftmax]
) -> None:
    for tile in sweep.tiles(scale, anchors, tables):
        if tile.targets is not None:
            logits = tile.logits()
            for softmax in _concerned(softmaxes, tile):
                softmax.add_focal(tile, tile.targets, logits)
    if sweep.ranks > 1:
        for softmax in softmaxes:
            softmax.join_positives()


def _backward(
    sweep: _Sweep,
    softmaxes: list[_Softmax],
    grads: Sequence[Tensor],
    scale: Tensor,
    anchors: Tensor,
    tables: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Any]:
    """The gradients of anchors (but for the factor `scale`) and tables; None for those that are not wanted."""
    sums = [scale.new_zeros(x.shape) if want else None for x, want in zip((anchors, *tables), wanted)]
    grads = [grad * sweep.ranks for grad in grads]
    pushes = [softmax.push(grad) for softmax, grad in zip(softmaxes, grads)]
    for tile in sweep.tiles(scale, anchors, tables):
        slope = _slope(tile, sweep.form, _concerned(softmaxes, tile), grads, pushes)
        for_anchors, for_table = sums[0], sums[1 + tile.table]
        if for_anchors is not None:
            for_anchors[tile.rows].addmm_(slope, tile.candidates)
        if for_table is not None:
            for_table[tile.columns].addmm_(slope.T, tile.anchors)
    return sums


def _slope(
    tile: _Tile, form: Form, softmaxes: Sequence[_Softmax], grads: Sequence[Tensor], pushes: Sequence[Tensor]
) -> Float[Tensor, "r c"]:
    """The gradient of one tile's logits."""
    logits = tile.logits()
    pulls = []
    if tile.targets is not None:
        pulls = [softmax.pull(tile, tile.targets, logits, grad) for softmax, grad in zip(softmaxes, grads)]
    terms, total = tile.terms(logits, form.log_alpha), tile.space(1)
    torch.sub(terms, softmaxes[0].wide(softmaxes[0].terms.top, tile), out=total)
    total.exp_().mul_(softmaxes[0].wide(pushes[0], tile))
    for softmax, push in list(zip(softmaxes, pushes))[1:]:
        total.addcmul_(terms.sub_(softmax.wide(softmax.terms.top, tile)).exp_(), softmax.wide(push, tile))
    for pull in pulls:
        total += pull
    return total


def _scale_gradient(sweep: _Sweep, anchors: Tensor, sums: Tensor) -> Tensor:
    """From the gradient of the anchors before it is scaled, piece by piece."""
    total = sums.new_zeros(())
    for rows in _pieces(sweep.anchors, _shape(anchors)[0]):
        total += (anchors[rows].to(sums.dtype) * sums[rows]).sum()
    return total


def _extra_gradient(rows: _Softmax, grad: Tensor, extra: Tensor) -> Tensor:
    """Made in full by every rank."""
    return ((extra - rows.terms.top[:, None]).exp() * rows.push(grad)[:, None]).to(extra.dtype)


def _concerned(softmaxes: list[Any], tile: _Tile) -> list[Any]:
    """Columns are contrasted in the first table alone."""
    return softmaxes if tile.table == 0 else softmaxes[:1]
