"""Contrasts straight from tables of embeddings: as a matrix of logits while that is small, else tile by tile.

Axes: a anchors, c candidates, e extra terms, d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from clipkit.objective.kernel import Mode, contrast_rows, log_mask, similarity
from clipkit.objective.tiled import Form, Relation, tiled_rows

# Fewer logits than this are held as a matrix, which is a little faster there (perf/loss.py).
TILED_FROM = 2**19


@dataclass(frozen=True)
class Block:
    """Candidates, and how the anchors stand to them.

    `relation(rows, columns)` says it for one tile [r c], from ids: the targets (bool, or weights ≥ 0; None where the
    tile holds no positive), and what is seen (bool, or log-weights, of a shape that broadcasts; None for everything).
    Both are constants: no gradient flows into them.
    """

    candidates: Float[Tensor, "c d"]
    relation: Relation


def pairs(count: int, device: torch.device, group: Int64[Tensor, " n"] | None = None) -> Relation:
    """Anchor i belongs to candidate i and sees no other of its `group`; without groups it sees everything."""
    if group is not None and len(group.unique()) == count:
        group = None
    row = torch.arange(count, device=device)

    def relation(rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        target = None
        if rows.start < columns.stop and columns.start < rows.stop:
            target = row[rows, None] == row[columns]
        if group is None:
            return target, None
        seen = group[rows, None] != group[columns]
        return target, seen if target is None else seen | target

    return relation


def rivals(seen: Bool[Tensor, " c"] | Float[Tensor, " c"]) -> Relation:
    """No candidate is an anchor's own; all anchors see those that are marked, or each by its log-weight."""
    # Added ten times as fast as filled in by a mask.
    weights = log_mask(seen[None]) if seen.dtype == torch.bool else seen[None]
    return lambda rows, columns: (None, weights[:, columns])


def contrast_tables(
    anchors: Float[Tensor, "a d"],
    blocks: Sequence[Block],
    *,
    scale: Tensor | float = 1.0,
    both: bool = False,
    replicated: bool = False,
    log_alpha: float = 0.0,
    extra: Float[Tensor, "a e"] | None = None,
    gamma: float = 0.0,
    mode: Mode = "mean_log",
) -> tuple[Float[Tensor, " _"], ...]:
    """`contrast_rows` over the logits scale · anchors · candidates of all blocks: one loss an anchor.

    With `both` also one for each candidate of the first block, contrasted with the anchors by the same logits and
    relation (`extra` is for the anchors). `replicated` says that every rank holds these tables and calls this too: then
    tiles are divided among ranks, and the tables' gradients are right only when summed over them, as a gather does.

    Gradients flow to tables, scale and `extra`. From `TILED_FROM` logits on, there are no second derivatives.
    """
    form = Form(both, log_alpha, gamma, mode)
    tables, relations = [b.candidates for b in blocks], [b.relation for b in blocks]
    if len(anchors) * sum(map(len, tables)) >= TILED_FROM:
        return tiled_rows(anchors, tables, relations, scale, extra, form, replicated=replicated)
    return _matrix_rows(anchors, tables, relations, scale, extra, form)


def _matrix_rows(
    anchors: Tensor,
    tables: list[Tensor],
    relations: list[Relation],
    scale: Tensor | float,
    extra: Tensor | None,
    form: Form,
) -> tuple[Tensor, ...]:
    logits = scale * torch.cat([similarity(anchors, x) for x in tables], 1)
    target, weight = (
        torch.cat(x, 1) for x in zip(*(_whole(r, len(anchors), len(x), logits) for r, x in zip(relations, tables)))
    )
    how = {"log_alpha": form.log_alpha, "gamma": form.gamma, "mode": form.mode}
    rows = contrast_rows(logits, target, log_weights=weight, extra=extra, **how)
    if not form.both:
        return (rows,)
    c = len(tables[0])
    return rows, contrast_rows(logits[:, :c].T, target[:, :c].T, log_weights=weight[:, :c].T, **how)


def _whole(relation: Relation, a: int, c: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and log-weights of all anchors and candidates."""
    target, seen = relation(slice(0, a), slice(0, c))
    if target is None:
        target = torch.zeros(a, c, dtype=torch.bool, device=like.device)
    if seen is None:
        seen = like.new_zeros(1, 1)
    return target, (log_mask(seen) if seen.dtype == torch.bool else seen).expand(a, c)
