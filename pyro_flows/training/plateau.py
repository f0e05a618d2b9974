"""A learning rate that holds until the ELBO is stationary, then falls; and rises again where the guide is not close enough yet."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from .loop import Window

__all__ = ["Plateau"]

_WARM_UP = 20  # steps over which the rate rises
_WINDOW = 50  # steps over which the ELBO is averaged
_SHORTEST = 300  # steps that a further cycle needs to be worth it
_CLOSE = 0.05  # a spread below it is an error of at most .16 standard deviations in any mean: nothing to complain about
_RISING = 0.025  # nats: the whole divergence that a spread of _CLOSE stands for
_MEDIAN_ERROR = 1.86  # of a median, from the median absolute deviation of n normal numbers, times n ** -1/2
_STATE = ("elbo", "spread", "best", "stale", "rises_at", "falls_at", "cycle", "rising", "converged", "averages")


@dataclass
class Plateau:
    """The schedule of variational inference.

    The learning rate rises and holds until the averaged ELBO is stationary, the spread of the log weights is below ``target`` (a falling rate brings
    it down further) or most of ``max_steps`` are spent; then it falls to a fiftieth. If the target is met, or no steps are left, training ends;
    if not, the rate rises again, to seven tenths.

    Attributes:
        max_steps: upper bound on the number of steps.
        max_lr: Adam's learning rate while it holds.
        target: variance of the log weights at which the rate may fall, and training end.
        patience: windows of 50 steps without progress of the averaged ELBO before the fall.
        progress: what counts as progress, in nats a window.
        fall: length of the fall, as a fraction of the steps before it.
        cycles: how often the rate may rise.
        elbo, spread: medians over the last window.
        best: the best averaged ELBO.
        converged: whether training ended, or would end, because nothing more was to be gained.
    """

    max_steps: int
    max_lr: float
    target: float = 0.016
    patience: int = 6
    progress: float = 1e-3
    fall: float = 0.6
    cycles: int = 4
    elbo: float = field(default=math.nan, init=False)
    spread: float = field(default=math.inf, init=False)
    best: float = field(default=-math.inf, init=False)
    stale: int = field(default=0, init=False)  # windows without progress
    rises_at: int = field(default=0, init=False)
    falls_at: int | None = field(default=None, init=False)
    cycle: int = field(default=0, init=False)
    rising: bool = field(default=False, init=False)  # whether the ELBO was rising steadily when the rate last began to fall
    converged: bool = field(default=False, init=False)
    averages: list[float] = field(default_factory=list, init=False)  # ELBOs of this cycle's windows while the rate holds

    @property
    def last_step(self) -> int:
        """Where the present cycle ends, as far as is known now."""
        if self.falls_at is None:
            return self.max_steps
        return min(self.max_steps, self.falls_at + max(2 * _WINDOW, int(self.fall * (self.falls_at - self.rises_at))))

    def resume(self, step: int) -> None:
        """Training goes on at this step, also one that had ended and is given more steps."""
        self._rise_again(step)

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        lr = self.max_lr * 0.7**self.cycle * min(1.0, (step - self.rises_at + 1) / _WARM_UP)
        if self.falls_at is not None:
            lr *= 1.0 - 0.98 * min(1.0, (step - self.falls_at) / max(1, self.last_step - self.falls_at))
        return lr

    def ends(self, step: int) -> bool:
        """Whether no step follows."""
        return step >= self.last_step

    def closes(self, step: int, length: int) -> bool:
        """Whether a window of so many steps ends before this step."""
        return length >= _WINDOW or step == self.last_step

    def judge(self, step: int, window: Window) -> bool:
        """Average a window, decide what the rate does next, and say whether its state is the best so far; of states that tie, the latest."""
        elbos, spreads = zip(*window, strict=True)
        # medians: one particle far out can carry a whole window's mean
        elbo, spread = statistics.median(elbos), statistics.median(spreads)
        deviations = [abs(e - elbo) for e in elbos if math.isfinite(e)] or [0.0]
        error = _MEDIAN_ERROR * statistics.median(deviations) / len(elbos) ** 0.5
        self.stale = 0 if elbo > self.best + max(error, self.progress) else self.stale + 1
        keep = elbo > self.best - error
        self.best = max(self.best, elbo)
        if self.falls_at is None:
            self._hold(step, elbo, spread, error)
        self.elbo, self.spread = elbo, spread
        self._rise_again(step)
        self.converged = self.converged or (spread < _CLOSE and not self.rising)
        return keep

    def _hold(self, step: int, elbo: float, spread: float, error: float) -> None:
        """Let the rate fall where the target is met, the ELBO is stationary, or the steps that are left are needed for the fall."""
        self.averages.append(elbo)
        latest = self.rises_at + (self.max_steps - self.rises_at) / (1 + self.fall)
        if spread < self.target or self.stale >= self.patience or step >= latest:
            self.falls_at = step
            self.rising = self.stale < self.patience and self._is_rising(error)
            self.converged = step < latest and not self.rising

    def _is_rising(self, error: float) -> bool:
        """Whether the averaged ELBO rises steadily, by more than its error and than a small spread would explain.

        A guide that has not reached all of the posterior may match the part where it is as closely as one likes: no spread is small enough to call
        that converged while the ELBO goes on rising.
        """
        return len(self.averages) >= self.patience > 2 and self.averages[-1] - self.averages[-3] > max(_RISING, 4 * error)

    def _rise_again(self, step: int) -> None:
        """Begin the next cycle if one has ended short of the target, and steps are left for it."""
        ended = self.falls_at is not None and step >= self.last_step
        if ended and self.spread > self.target and self.cycle + 1 < self.cycles and self.max_steps - step >= _SHORTEST:
            self.rises_at, self.falls_at, self.cycle, self.stale, self.averages = step, None, self.cycle + 1, 0, []

    def state(self) -> dict[str, Any]:
        """All that it remembers, as plain numbers."""
        return {name: getattr(self, name) for name in _STATE} | {"averages": list(self.averages)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`; a larger ``max_steps`` stays as it is."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.averages = list(state["averages"])
