"""A learning rate that falls along a cosine, and a validation loss that decides which state is best and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .loop import Window

__all__ = ["Cosine"]

_WARM_UP = 20  # steps over which the rate rises
_STILL = 0.02  # nats gained over the second half of the schedule that show that the loss still falls


@dataclass
class Cosine:
    """The schedule of a fit to data.

    Attributes:
        max_steps: length of the schedule, along which the rate falls from ``max_lr`` to 0.
        max_lr: Adam's learning rate, reached after 20 steps.
        every: steps between validations.
        patience: steps without a better validation loss after which training stops.
        validate: the loss that decides which state is best; ``None`` to keep the last.
        best, best_step: the best validation loss, and the step where it was.
        stopped: whether training stopped early.
        history: dicts of ``step, loss, validation, lr``, one a validation; ``loss`` is the mean training loss since the one before.
    """

    max_steps: int
    max_lr: float
    every: int
    patience: int
    validate: Callable[[], float] | None = None
    best: float = field(default=math.inf, init=False)
    best_step: int = field(default=0, init=False)
    stopped: bool = field(default=False, init=False)
    history: list[dict[str, Any]] = field(default_factory=list, init=False)

    def resume(self, step: int) -> None:
        """Nothing changes when training goes on."""

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.max_steps))
        return self.max_lr * min(1.0, (step + 1) / _WARM_UP) * cosine

    def ends(self, step: int) -> bool:
        """Whether no step follows."""
        return self.stopped or step >= self.max_steps

    def closes(self, step: int, length: int) -> bool:
        """Whether a validation is due before this step."""
        return step % self.every == 0 or step == self.max_steps

    def judge(self, step: int, window: Window) -> bool:
        """Validate, decide whether to stop, and say whether the present state is the best so far."""
        validation = math.nan if self.validate is None else self.validate()
        keep = self.validate is None or validation < self.best
        if keep:
            self.best, self.best_step = validation, step
        elif step - self.best_step >= self.patience:
            self.stopped = True
        losses = [value for value, _ in window if math.isfinite(value)]
        loss = sum(losses) / len(losses) if losses else math.nan
        self.history.append({"step": step, "loss": loss, "validation": validation, "lr": self.lr(step)})
        return keep

    @property
    def still_gaining(self) -> float:
        """What the loss gained over the second half of the schedule, in nats, where that is worth mentioning; 0 after an early stop."""
        records = [h for h in self.history if h["step"]]
        if self.stopped or not records or records[-1]["step"] < self.max_steps:
            return 0.0
        values = [(h["step"], h["loss"] if self.validate is None else h["validation"]) for h in records]
        before = [v for step, v in values if step <= self.max_steps / 2 and math.isfinite(v)]
        after = [v for step, v in values if step > self.max_steps / 2 and math.isfinite(v)]
        gain = min(before) - min(after) if before and after else 0.0
        return gain if gain > _STILL else 0.0

    def state(self) -> dict[str, Any]:
        """All that it remembers, as plain numbers."""
        return {"best": self.best, "best_step": self.best_step, "stopped": self.stopped, "history": [dict(h) for h in self.history]}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`."""
        self.best, self.best_step, self.stopped = state["best"], state["best_step"], state["stopped"]
        self.history = [dict(record) for record in state["history"]]
