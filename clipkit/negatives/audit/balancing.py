"""Leave out, or weigh less, the negatives that the text tells best, round by round, until held-out AUC is low.

A round scores every negative with classifiers that saw none of its picture, drops those that stand furthest above their
own captions, and begins again with other folds: what is left is told by other cues. Adversarial filtering, as in AFLite
(arXiv 2002.04108), by pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.members import read_sheet
from clipkit.data.shards import expand
from clipkit.errors import UserError
from clipkit.negatives.audit import ALL, Told, blind, read_blindly
from clipkit.negatives.audit.stored import Stored, each_negative
from clipkit.negatives.make import check_free, check_places, rewrite

FEWEST = 100
"""A kind is not judged by fewer negatives; one that comes down to so few is left out whole."""
AIM = 0.005
"""Rounds go so far below the target: measured anew, with other folds, AUC moves by as much."""
LEAST_SHARE, MOST_SHARE = 0.04, 0.4
"""Of a kind's negatives, what one round drops: as far as AUC is above the target, within these."""
HEAVIEST = 20.0
"""Most that a weight is above or below the mean of its group, in one step of weighing."""
_STRIDE, _LEAD = 0.5, 2.0
"""Of a negative's logit above its caption's, what its log-weight loses in a round; leads count up to the second."""
_BELOW, _SHORTEST = 0.03, 1 / 64
"""A round that lands further below the target is taken back and made anew with half the stride, down to the second: far
below, and under 0.5, the text would tell again, the other way round."""
_STILL, _WAIT = 0.002, 8
"""A round that lowers AUC by less has not helped; so many of them in a row, and a kind is given up."""
_FRESH = 1000
"""Seeds of the last measurement begin here; rounds use those below."""


@dataclass(frozen=True)
class Balanced:
    """One kind (or all) before and after, with how many negatives stayed; `after` is None where none did.

    `note` says what became of the target, where the kind was not simply brought to it.
    """

    before: Told
    after: Told | None
    count: int
    left: int
    note: str = ""

    def row(self, name: str) -> tuple[Any, ...]:
        """(kind, negatives, left, AUC before, after, interval, told from their caption before, after, note)."""
        after = self.after
        return (
            name, self.count, self.left, f"{self.before.auc:.3f}", f"{after.auc:.3f}" if after else "",
            f"{after.low:.3f} to {after.high:.3f}" if after else "", f"{self.before.pairs:.1%}",
            f"{after.pairs:.1%}" if after else "", self.note,
        )  # fmt: skip


@dataclass(frozen=True)
class Balance:
    """Which negatives stay, and the kinds before and after, `all` first."""

    stays: np.ndarray
    kinds: dict[str, Balanced]
    weights: np.ndarray | None = None
    """What each negative counts, where they were weighed."""

    def to_json(self) -> dict[str, Any]:
        """Plain names and numbers."""
        return {name: asdict(kind) for name, kind in self.kinds.items()}


def balance(stored: Stored, target: float, *, seed: int = 0) -> Balance:
    """Drop negatives of each kind, and then of all, until held-out AUC is at most `target`.

    Kinds of fewer than FEWEST negatives are judged with the others only. Raises UserError for a target that nothing
    can reach, for fewer than FEWEST negatives, and where none would be left.
    """
    _check(stored, target)
    cues = blind.cues_of([*stored.captions, *stored.texts])
    names = stored.kinds_by_count()
    groups = {name: stored.of_kind(name) for name in names}
    before = {name: read_blindly(stored, cues, group, seed).told for name, group in groups.items()}
    everything = np.sort(np.concatenate([*groups.values()]))
    before = {ALL: read_blindly(stored, cues, everything, seed).told, **before}
    left = {name: _thin(stored, cues, group, target, seed) for name, group in groups.items()}
    both = _thin(stored, cues, np.sort(np.concatenate([*left.values()])), target, seed)
    stays = np.zeros(len(stored.texts), bool)
    stays[both] = True
    _check_left(stays, target)
    kinds = {}
    for name, group in {ALL: everything, **groups}.items():
        kept = group[stays[group]]
        after = read_blindly(stored, cues, kept, seed + _FRESH).told if len(kept) else None
        kinds[name] = Balanced(before[name], after, len(group), len(kept), _note(len(group), after, target))
    return Balance(stays, kinds)


def reweigh(stored: Stored, target: float, *, seed: int = 0) -> Balance:
    """Weigh negatives of each kind, and then of all, until held-out AUC of what they weigh is at most `target`.

    Round by round a negative that stands above its own caption loses weight, by its logit's lead, and one below gains.
    Weights are 1 on average over each kind's negatives; 0, left out, are those of a kind that no weights balance:
    where AUC ceases to fall, or fewer than FEWEST negatives would carry it (the effective number, (Σw)² / Σw²). Kinds
    of fewer than FEWEST negatives are weighed with the others only. Raises UserError as `balance`.
    """
    _check(stored, target)
    cues = blind.cues_of([*stored.captions, *stored.texts])
    groups = {name: stored.of_kind(name) for name in stored.kinds_by_count()}
    before = {name: read_blindly(stored, cues, group, seed).told for name, group in groups.items()}
    everything = np.sort(np.concatenate([*groups.values()]))
    before = {ALL: read_blindly(stored, cues, everything, seed).told, **before}
    weights = np.ones(len(stored.texts))
    for group in groups.values():
        if len(group) >= FEWEST:
            weights[group] = _weigh(stored, cues, group, weights[group], target, seed)
    _check_left(weights > 0, target)
    both = everything[weights[everything] > 0]
    weights[both] = _weigh(stored, cues, both, weights[both], target, seed)
    for group in groups.values():
        if weights[group].sum() > 0:
            weights[group] /= weights[group].mean()
    _check_left(weights > 0, target)
    kinds = {}
    for name, group in {ALL: everything, **groups}.items():
        kept = group[weights[group] > 0]
        after = read_blindly(stored, cues, kept, seed + _FRESH, weight=weights[kept]).told if len(kept) else None
        kinds[name] = Balanced(before[name], after, len(group), len(kept), _note(len(group), after, target))
    return Balance(weights > 0, kinds, weights)


def _check(stored: Stored, target: float) -> None:
    """Raises UserError for a target that nothing can reach, and for too few negatives."""
    if not 0.5 < target <= 1.0:
        raise UserError(f"--balance {target}: between 0.5 (nothing can be told) and 1")
    if len(stored.texts) < FEWEST:
        raise UserError(
            f"--balance {target}: {len(stored.texts)} negatives are too few to be judged, it takes {FEWEST}; "
            "make more of them (clipkit negatives make --per-kind)"
        )


def _check_left(stays: np.ndarray, target: float) -> None:
    """Raises UserError where no negative stays."""
    if not stays.any():
        raise UserError(
            f"--balance {target}: leaves none of {len(stays)} negatives, fewer than {FEWEST} would be at it; take a "
            "higher AUC, or make more negatives (clipkit negatives make --per-kind)"
        )


def _note(count: int, after: Told | None, target: float) -> str:
    """What is to be said of a kind of `count` negatives that was not simply brought to the target."""
    if after is None:
        return "left out"
    notes = ["too few to be balanced alone"] * (count < FEWEST) + ["above the target"] * (after.auc > target)
    return ", ".join(notes)


def _weigh(
    stored: Stored, cues: blind.Cues, group: np.ndarray, weight: np.ndarray, target: float, seed: int
) -> np.ndarray:
    """The weights of a group at which its AUC is at the target; zeros where none are."""
    best, since, stride, last, lead = np.inf, 0, _STRIDE, weight, None
    for number in range(1, _FRESH):
        reading = read_blindly(stored, cues, group, seed + number, measured=False, weight=weight)
        if lead is not None and reading.told.auc < target - _BELOW and stride > _SHORTEST:
            stride /= 2
            weight = _moved(last, lead, stride)
            continue
        if reading.told.auc <= target - AIM:
            return weight
        best, since = (reading.told.auc, 0) if reading.told.auc < best - _STILL else (best, since + 1)
        last, lead = weight, reading.lead
        weight = _moved(weight, lead, stride)
        if since == _WAIT or weight.sum() ** 2 / (weight**2).sum() < FEWEST:
            break
    return np.zeros(len(group))


def _moved(weight: np.ndarray, lead: np.ndarray, stride: float) -> np.ndarray:
    """The weights after a step; 1 on average, within HEAVIEST."""
    weight = weight * np.exp(-stride * np.clip(lead, -_LEAD, _LEAD))
    return np.clip(weight / weight.mean(), 1 / HEAVIEST, HEAVIEST)


def _thin(stored: Stored, cues: blind.Cues, group: np.ndarray, target: float, seed: int) -> np.ndarray:
    """The negatives of a group that are left when its AUC is at the target."""
    if len(group) < FEWEST:
        return group
    for number in range(1, _FRESH):
        reading = read_blindly(stored, cues, group, seed + number, measured=False)
        above = reading.told.auc - (target - AIM)
        if above <= 0:
            break
        share = min(MOST_SHARE, max(LEAST_SHARE, above))
        group = np.sort(group[np.argsort(reading.lead, kind="stable")[: len(group) - math.ceil(share * len(group))]])
        if len(group) < FEWEST:
            return group[:0]
    return group


def write_balanced(
    shards: str | Path | Sequence[str | Path],
    out: Path,
    stays: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    overwrite: bool = False,
) -> int:
    """Write every shard again, to `out`, with the negatives that stay; all else is copied byte for byte. → shards.

    `stays` has an entry for each negative in the order of the shards, and so have `weights`, which become the `weight`
    of those that stay. Raises UserError for shards that are there.
    """
    paths = expand(shards)
    check_places(paths, out)
    if not overwrite:
        check_free(paths, out)
    marks = iter(zip(stays.tolist(), [None] * len(stays) if weights is None else weights.tolist()))
    for path in paths:
        rewrite(path, out / path.name, lambda members: _sheet(members, marks))
    return len(paths)


def _sheet(members: dict[str, bytes], marks: Iterator[tuple[bool, float | None]]) -> bytes:
    """KEY.json with the negatives that stay. Raises Unreadable."""
    sheet = read_sheet(members)
    gone = set()
    for c, i in each_negative(sheet):
        stays, weight = next(marks)
        if not stays:
            gone.add((c, i))
        elif weight is not None:
            sheet.negatives[c][i]["weight"] = round(weight, 4)
    record = json.loads(members["json"]) if "json" in members else {}
    kept = [[n for i, n in enumerate(group) if (c, i) not in gone] for c, group in enumerate(sheet.negatives)]
    return json.dumps(record | {"negatives": kept}, ensure_ascii=False).encode()
