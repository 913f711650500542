"""What stands between a run and its ruin: which steps are taken, when it goes back, when it is asked to stop."""

from __future__ import annotations

import math
import signal
import threading
from statistics import median
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from clipkit import distributed
from clipkit.data.loader import STOPPING
from clipkit.errors import UserError
from clipkit.settings import GuardConfig

WINDOW, ENOUGH = 128, 32
"""Losses that say what is usual, and how many of them do at least."""
NORMAL, LEAST = 1.4826, 0.01
"""From a median deviation to a standard one; the least that counts as one, as a share of the loss."""
KEPT = ("updates", "skipped", "streak", "returned_to", "spikes", "losses")


class Guard:
    """Judges every step, with one answer on all ranks, and counts what it let pass and what not.

    A step whose gradient norm is not finite is skipped: weights, optimizer, teacher and what terms remember stay as
    they were, while the samples, the learning rate and the number of the step go on. After `guard.patience` of them in
    a row the run is `exhausted` and goes back to a checkpoint, once to the same weights. As a context it listens to
    SIGTERM and SIGUSR1: from the next judged step on the run is `stopping`, on all ranks. When `save_minutes` have
    passed since the last checkpoint by rank 0's clock, one is due (`save_due`), on all ranks.

    A loss far above the usual has `spiked`: the step is taken, and with `guard.spike_patience` so many in a row send
    the run back as well. Usual is the median of the last WINDOW losses, and how far from it they are in the median.
    """

    def __init__(self, config: GuardConfig, save_minutes: float = 0.0):
        self._patience = config.patience
        self.updates = 0
        """Steps taken: what the optimizer itself counts."""
        self.skipped = 0
        self.streak = 0
        """Steps skipped since the last one taken."""
        self.returned_to: int | None = None
        """Updates in the checkpoint that the run last went back to; skipped steps behind it do not change the place."""
        self._spike, self._spike_patience = config.spike, config.spike_patience
        self.losses: list[float] = []
        """Of the last steps taken."""
        self.spiked = False
        """Whether the loss of the step just judged was far above those before."""
        self.spikes = 0
        """Steps in a row that have spiked, up to the last."""
        self.stopping = False
        self.save_due = False
        self._save_after_s = save_minutes * 60 or float("inf")
        self._saved_at = monotonic()
        self._signalled = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Guard:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._handlers = {number: signal.signal(number, self._listen) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def passes(self, norm: Tensor, loss: Tensor, *, excused: bool = False) -> bool:
        """Whether the step may be taken: its gradient norm is finite on every rank. All ranks ask together.

        One that is skipped and `excused` (the loss scale's doing) does not bring the run closer to going back.
        Costs one all-reduce of four bytes, and the host waits for the device.
        """
        _, bound = self.usual
        late = distributed.is_main() and monotonic() - self._saved_at >= self._save_after_s
        here = torch.tensor([self._signalled, late], device=norm.device)
        judged = torch.stack([~torch.isfinite(norm.view(())), loss.detach() > bound])
        bad, high, self.stopping, self.save_due = distributed.anywhere(torch.cat([judged, here]))
        self.skipped += bad
        self.updates += not bad
        self.streak = self.streak + (not excused) if bad else 0
        self.spiked = high and not bad
        self.spikes = self.spikes + 1 if self.spiked else 0
        if not bad and self._spike:
            self.losses = [*self.losses, float(loss.detach())][-WINDOW:]
        return not bad

    @property
    def usual(self) -> tuple[float, float]:
        """The median of the last losses, and what is a spike above it: infinity while too few are known."""
        if len(self.losses) < ENOUGH:
            return math.nan, math.inf
        usual = median(self.losses)
        deviation = NORMAL * median(abs(loss - usual) for loss in self.losses)
        return usual, usual + self._spike * max(deviation, LEAST * abs(usual))

    @property
    def sound(self) -> bool:
        """Whether the run is not just now on its way back: what is saved is worth going back to."""
        return self.trusts(self.state())

    def trusts(self, state: dict[str, Any]) -> bool:
        """Whether weights saved in this state come from before anything that sends a run back."""
        return not state["streak"] and not (self._spike_patience and state.get("spikes"))

    def saved(self) -> None:
        """A checkpoint is written: the next is due `save_minutes` from now."""
        self._saved_at = monotonic()

    @property
    def exhausted(self) -> bool:
        """Whether too many steps in a row were skipped to simply go on."""
        return self.streak >= self._patience or 0 < self._spike_patience <= self.spikes

    def go_back(self, updates: int | None) -> None:
        """Count on from a checkpoint that holds so many updates.

        Raises UserError when there is no such checkpoint (None), or the run has gone back to this place before.
        """
        happened = f"{self.streak} steps in a row were skipped, their loss or gradient not finite"
        if self.spikes:
            happened = f"the loss of {self.spikes} steps in a row was far above the usual (guard.spike)"
        log = "spikes" if self.spikes else "skipped"
        remedy = f"{log}.jsonl in the run folder names the samples; lower optim.lr, or look at the data"
        if updates is None:
            raise UserError(f"{happened}, and there is no checkpoint from before them (save_every); {remedy}")
        if updates == self.returned_to:
            raise UserError(f"{happened}, again after going back to the checkpoint of {updates} updates; {remedy}")
        self.updates = self.returned_to = updates
        self.losses = self.losses[: len(self.losses) - self.spikes]
        self.streak = self.spikes = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in KEPT}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def _listen(self, _number: int, _frame: object) -> None:
        self._signalled = True
