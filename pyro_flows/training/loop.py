"""The training loop: steps of Adam on clipped gradients, watched window by window; the best state is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import TrainingError
from .clipping import GradientClip

__all__ = ["Loop", "Outcome", "Schedule"]

_BAD_STEPS = 10  # in a row without a usable gradient before going back to the best state
_COUNTERS = ("step", "best_step", "bad", "skipped", "dropped", "retries")
State = TypeVar("State")


class Outcome(NamedTuple):
    """What a step has computed.

    Attributes:
        gradient: of the loss, as one vector ``(P,)``; not finite where the step is to be left out.
        value: what is followed, an ELBO or a loss.
        spread: variance of the log weights, where there are any.
        dropped: number of particles without a finite value.
    """

    gradient: Tensor
    value: float
    spread: float = 0.0
    dropped: int = 0


Window = Sequence[tuple[float, float]]  # the values and spreads of its steps


class Schedule(Protocol):
    """How large the steps are, how long training lasts, and which state is the best: what differs between one training and another."""

    def resume(self, step: int) -> None:
        """Training begins, or goes on, at this step."""

    def lr(self, step: int) -> float:
        """The learning rate of a step."""

    def ends(self, step: int) -> bool:
        """Whether no step follows."""

    def closes(self, step: int, length: int) -> bool:
        """Whether a window of so many steps ends before this step."""

    def judge(self, step: int, window: Window) -> bool:
        """Look at a window, and say whether the parameters are the best so far, to be kept."""

    def state(self) -> dict[str, Any]:
        """All that it remembers, as plain numbers."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""


class Loop(Generic[State]):
    """A training that can be interrupted at any step, and resumed from :meth:`state` bit for bit.

    Args:
        parameters: the tensors that are trained, in place.
        step: computes the gradient at the present parameters; random numbers come from torch's global state.
        schedule: learning rates, length, and the judge of what is best.
        read, write: copy the state that is kept, and put one back.
        weight_decay: decoupled, as in AdamW.
        retries: how often to go back to the best state, with half the learning rate, after ten steps in a row without a usable gradient; ``None`` to
            go on.

    Attributes:
        step: number of steps taken.
        best: the best state so far, that of step ``best_step``.
        skipped: steps without a usable gradient; ``dropped``: particles without a finite value.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        step: Callable[[], Outcome],
        schedule: Schedule,
        read: Callable[[], State],
        write: Callable[[State], Any],
        weight_decay: float = 0.0,
        retries: int | None = None,
    ) -> None:
        self.parameters, self.compute, self.schedule, self.read, self.write = list(parameters), step, schedule, read, write
        self.weight_decay, self.limit = weight_decay, retries
        self.sizes = [p.numel() for p in self.parameters]
        self.step = self.best_step = self.bad = self.skipped = self.dropped = self.retries = 0
        self.window: list[tuple[float, float]] = []
        self.clip = GradientClip()
        self.adam, self.best = self._optimizer(), read()

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=self.weight_decay, fused=True)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.schedule.lr(self.step) * 0.5**self.retries

    def run(self, report: Callable[[Window], None]) -> None:
        """Train to the end of the schedule; ``report(window)`` is called after every window. What it raises ends the training.

        Raises:
            TrainingError: no usable gradient again and again, with ``retries``.
        """
        self.schedule.resume(self.step)
        while not self.schedule.ends(self.step):
            self._take_step()
            if self.schedule.closes(self.step, len(self.window)):
                self.close_window(report)

    def close_window(self, report: Callable[[Window], None]) -> None:
        """End a window: judge the present parameters, keep them if they are the best, and report."""
        window, self.window = self.window, []
        if self.schedule.judge(self.step, window):
            self.best, self.best_step = self.read(), self.step
        report(window)

    def _take_step(self) -> None:
        outcome = self.compute()
        norm = float(outcome.gradient.norm())
        factor = self.clip.factor(norm)
        for group in self.adam.param_groups:
            group["lr"] = self.lr
        if factor > 0.0:
            gradient = outcome.gradient if factor == 1.0 else factor * outcome.gradient
            for p, part in zip(self.parameters, gradient.split(self.sizes), strict=True):
                p.grad = part.view_as(p)
            self.adam.step()
            self.adam.zero_grad()
        self.step += 1
        self.dropped += outcome.dropped
        self.window.append((outcome.value, outcome.spread))
        self._count(math.isfinite(norm))

    def _count(self, usable: bool) -> None:
        """Count steps without a usable gradient, and go back after too many in a row."""
        if usable:
            self.bad = 0
            return
        self.bad, self.skipped = self.bad + 1, self.skipped + 1
        if self.bad < _BAD_STEPS or self.limit is None:
            return
        if self.retries == self.limit:
            raise TrainingError(
                f"the loss was not finite in {_BAD_STEPS} steps in a row up to step {self.step}. Tried: leaving such steps out ({self.skipped} of "
                f"them), and going back to the best state with half the learning rate, {self.retries} times. The flow is in its best state, of step "
                f"{self.best_step}: use a smaller lr, or standardise x and look for rows far out"
            )
        self.retries, self.bad = self.retries + 1, 0
        self.write(self.best)
        self.adam = self._optimizer()

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, as tensors and plain numbers."""
        return {
            "parameters": [p.detach().clone() for p in self.parameters],
            "best": self.best,
            "adam": self.adam.state_dict(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "window": list(self.window),
            "norms": list(self.clip.norms),
            "schedule": self.schedule.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        with torch.no_grad():
            for p, value in zip(self.parameters, state["parameters"], strict=True):
                p.copy_(value)
        self.best = state["best"]
        self.adam.load_state_dict(state["adam"])
        for name, count in state["counters"].items():
            setattr(self, name, count)
        self.window = [tuple(pair) for pair in state["window"]]
        self.clip.norms.extend(state["norms"])
        self.schedule.restore(state["schedule"])
