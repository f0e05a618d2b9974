"""Stochastic optimisation of one stage: Adam with a schedule that ends by itself, and the best state kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .clipping import GradientClip

__all__ = ["Schedule", "Trainer"]

_CLOSE = 0.05  # a spread below it is an error of at most .16 standard deviations in any mean: nothing to complain about
_MEDIAN_ERROR = 1.86  # of a median, from the median absolute deviation of n normal numbers, times n ** -1/2
_RISING = 0.025  # nats: the whole divergence that a spread of _CLOSE stands for
_SHORTEST = 300  # steps that a further cycle needs to be worth it
_WINDOW = 50  # steps over which the ELBO is averaged
_NUMBERS = ("step", "rises_at", "falls_at", "cycle", "dropped", "best", "stale", "spread", "converged", "rising")


@dataclass(frozen=True)
class Schedule:
    """How long a stage lasts and how large its steps are.

    The learning rate rises and holds until the averaged ELBO is stationary, the spread of the log weights is below ``target`` (a falling rate brings
    it down further) or most of ``max_steps`` are spent; then it falls to a fiftieth. If the target is met, or no steps are left, the stage ends;
    if not, the rate rises again, to seven tenths.

    Attributes:
        max_steps: upper bound on the number of steps.
        lr: Adam's learning rate while it holds.
        target: variance of the log weights at which the rate may fall, and the stage end.
        patience: windows of 50 steps without progress of the averaged ELBO before the fall.
        progress: what counts as progress, in nats a window.
        fall: length of the fall, as a fraction of the steps before it.
        cycles: how often the rate may rise.
    """

    max_steps: int
    lr: float
    target: float = 0.016
    patience: int = 6
    progress: float = 1e-3
    fall: float = 0.6
    cycles: int = 4


@dataclass
class Trainer:
    """The state of one stage; :meth:`run` can be interrupted at any step and resumed from :meth:`state` bit for bit.

    Args:
        engine: ``(parameters, noise) -> (gradient, elbo, spread, dropped)``.
        draw_noise: draws the step's noise from the global random state.
        start: initial parameters, a flat vector.
        schedule: learning rate and length.
    """

    engine: Callable[..., tuple[Any, ...]]
    draw_noise: Callable[[], Tensor]
    start: Tensor
    schedule: Schedule
    step: int = 0
    rises_at: int = 0
    falls_at: int | None = None
    cycle: int = 0
    dropped: int = 0
    best: float = -float("inf")
    stale: int = 0
    spread: float = float("inf")  # of the last window
    converged: bool = False
    rising: bool = False  # when the rate last began to fall
    window: list[tuple[float, float]] = field(default_factory=list)
    held: list[float] = field(default_factory=list)  # averaged ELBOs while the rate holds, in this cycle
    clip: GradientClip = field(default_factory=GradientClip)

    def __post_init__(self) -> None:
        self.flat = torch.nn.Parameter(self.start.clone())
        self.best_flat = self.start.clone()
        self.adam = torch.optim.Adam([self.flat], lr=self.schedule.lr, betas=(0.9, 0.99), fused=True)

    @property
    def last_step(self) -> int:
        """Where the present cycle ends, as far as is known now."""
        s = self.schedule
        if self.falls_at is None:
            return s.max_steps
        return min(s.max_steps, self.falls_at + max(2 * _WINDOW, int(s.fall * (self.falls_at - self.rises_at))))

    def _is_rising(self, error: float) -> bool:
        """Whether the averaged ELBO rises steadily, by more than its error and than a small spread would explain.

        A guide that has not found all of the posterior may match the part where it is as closely as one likes: no spread is small enough to call
        that converged while the ELBO goes on rising.
        """
        return len(self.held) >= self.schedule.patience > 2 and self.held[-1] - self.held[-3] > max(_RISING, 4 * error)

    def _lr(self) -> float:
        lr = self.schedule.lr * 0.7**self.cycle * min(1.0, (self.step - self.rises_at + 1) / 20)
        if self.falls_at is not None:
            done = (self.step - self.falls_at) / max(1, self.last_step - self.falls_at)
            lr *= 1.0 - 0.98 * min(1.0, done)
        return lr

    def _usable(self, gradient: Tensor) -> bool:
        """Shorten a long gradient in place; false when it should be ignored."""
        factor = self.clip.factor(float(gradient.norm()))
        if 0.0 < factor < 1.0:
            gradient.mul_(factor)
        return factor > 0.0

    def run(self, report: Callable[[Trainer, float, float], None]) -> None:
        """Train to the end of the schedule; ``report(trainer, elbo, spread)`` is called after every window.

        On return, or when the report raises, :attr:`best_flat` holds the parameters with the best averaged ELBO.
        """
        self._rise_again()  # a finished stage that is given more steps goes on
        while self.step < self.last_step:
            with torch.no_grad():
                gradient, elbo, spread, dropped = self.engine(self.flat.detach(), self.draw_noise())
            self.dropped += int(dropped)
            for group in self.adam.param_groups:
                group["lr"] = self._lr()
            if self._usable(gradient):
                self.flat.grad = gradient
                self.adam.step()
            self.window.append((float(elbo), float(spread)))
            self.step += 1
            if len(self.window) >= _WINDOW or self.step == self.last_step:
                report(self, *self._close_window())

    def _close_window(self) -> tuple[float, float]:
        elbos, spreads = zip(*self.window, strict=True)
        # medians: one particle far out can carry a whole window's mean
        elbo, spread = statistics.median(elbos), statistics.median(spreads)
        self.window = []
        deviations = [abs(e - elbo) for e in elbos if math.isfinite(e)] or [0.0]
        error = _MEDIAN_ERROR * statistics.median(deviations) / len(elbos) ** 0.5
        s = self.schedule
        self.stale = 0 if elbo > self.best + max(error, s.progress) else self.stale + 1
        if elbo > self.best - error:  # of states that tie, the latest
            self.best_flat = self.flat.detach().clone()
        self.best = max(self.best, elbo)
        if self.falls_at is None:
            self.held.append(elbo)
            spent = self.rises_at + (s.max_steps - self.rises_at) / (1 + s.fall)
            if spread < s.target or self.stale >= s.patience or self.step >= spent:
                self.falls_at = self.step
                self.rising = self.stale < s.patience and self._is_rising(error)
                self.converged = self.step < spent and not self.rising
        self.spread = spread
        self._rise_again()
        self.converged = self.converged or (spread < _CLOSE and not self.rising)
        return elbo, spread

    def _rise_again(self) -> None:
        """Begin the next cycle if one has ended short of the target, and steps are left for it."""
        s = self.schedule
        ended = self.falls_at is not None and self.step >= self.last_step
        if ended and self.spread > s.target and self.cycle + 1 < s.cycles and s.max_steps - self.step >= _SHORTEST:
            self.rises_at, self.falls_at, self.cycle, self.stale, self.held = self.step, None, self.cycle + 1, 0, []

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain numbers."""
        return {
            "flat": self.flat.detach().clone(),
            "best_flat": self.best_flat,
            "adam": self.adam.state_dict(),
            "numbers": [getattr(self, name) for name in _NUMBERS],
            "window": list(self.window),
            "held": list(self.held),
            "norms": list(self.clip.norms),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        with torch.no_grad():
            self.flat.copy_(state["flat"])
        self.best_flat = state["best_flat"].clone()
        self.adam.load_state_dict(state["adam"])
        for name, number in zip(_NUMBERS, state["numbers"], strict=True):
            setattr(self, name, number)
        self.window, self.held = [tuple(w) for w in state["window"]], list(state["held"])
        self.clip.norms.extend(state["norms"])
