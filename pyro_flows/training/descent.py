"""Stochastic descent of a loss over a module's parameters, watched by a validation loss; the best state is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IntegrationError, OptionError, TrainingError
from .clipping import GradientClip
from .processes import Processes

__all__ = ["Descent", "Plan"]

_WARM_UP = 20  # steps over which the rate rises
_BAD_STEPS, _RETRIES = 10, 3  # steps in a row without a finite loss before going back; how often to go back
_STILL = 0.02  # nats gained over the second half of the schedule that show that the loss still falls
_NUMBERS = ("step", "best", "best_step", "bad", "skipped", "retries", "stopped")


@dataclass(frozen=True)
class Plan:
    """How long to train, and how fast.

    Attributes:
        max_steps: length of the cosine schedule, along which the rate falls from ``lr`` to 0.
        lr: Adam's learning rate, reached after 20 steps.
        weight_decay: decoupled, as in AdamW.
        every: steps between validations.
        patience: steps without a better validation loss after which training stops.
    """

    max_steps: int
    lr: float
    weight_decay: float
    every: int
    patience: int

    def __post_init__(self) -> None:
        for name in ("max_steps", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be a positive integer, got {value!r}")
        if not self.lr > 0:
            raise OptionError(f"lr must be positive, got {self.lr}")
        if not self.weight_decay >= 0:
            raise OptionError(f"weight_decay must not be negative, got {self.weight_decay}")


class Descent:
    """The state of a training; it can be interrupted at any step, and resumed from :meth:`state` bit for bit.

    Args:
        module: what is trained, in place.
        loss: this process's part of the loss of a fresh batch; random numbers come from the global state.
        validate: the loss that decides which state is best; ``None`` to keep the last.
        plan: the schedule.
        processes: those that train together.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[[], Tensor], validate: Callable[[], float] | None, plan: Plan, processes: Processes
    ) -> None:
        self.module, self.loss, self.validate, self.plan, self.processes = module, loss, validate, plan, processes
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise OptionError("flow: it has no parameter with requires_grad, so there is nothing to train")
        processes.same_start(module)
        self.adam = self._optimizer()
        self.clip = GradientClip()
        self.step = self.bad = self.skipped = self.retries = self.best_step = 0
        self.best, self.stopped = math.inf, False
        self.best_state = self._copy()
        self.window: list[float] = []
        self.history: list[dict[str, Any]] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters, lr=self.plan.lr, betas=(0.9, 0.99), weight_decay=self.plan.weight_decay, fused=True)

    def _copy(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.module.state_dict().items()}

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.plan.max_steps))
        return self.plan.lr * min(1.0, (self.step + 1) / _WARM_UP) * cosine * 0.5**self.retries

    def run(self, report: Callable[[Descent], None]) -> None:
        """Train to the end of the plan; ``report(descent)`` is called after every validation.

        On return, or when something raises, the module is in evaluation mode and in the best state.

        Raises:
            TrainingError: the loss is not finite, at the start or again and again.
        """
        try:
            if not self.history:
                self._watch(report)
            while self.step < self.plan.max_steps and not self.stopped:
                self._step()
                if self.step % self.plan.every == 0 or self.step == self.plan.max_steps:
                    self._watch(report)
        finally:
            self.module.load_state_dict(self.best_state)
            self.module.eval()

    def _step(self) -> None:
        self.module.train()
        found: Sequence[Tensor | None]
        try:
            loss = self.loss()
            # autograd.grad, not backward: whatever else the loss depends on (a teacher) is left alone
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        except IntegrationError:  # of a batch's equation, there or in the adjoint's backward solve: a step without a finite loss
            loss, found = torch.full_like(self.parameters[0].detach().sum(), torch.nan), (None,) * len(self.parameters)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        flat = self.processes.sum(torch.cat([*(g.reshape(-1) for g in parts), loss.detach().reshape(1)]))
        value = float(flat[-1])
        finite = math.isfinite(value) and math.isfinite(float(flat[:-1].norm()))
        factor = self.clip.factor(float(flat[:-1].norm())) if finite else 0.0
        if factor > 0.0:
            for group in self.adam.param_groups:
                group["lr"] = self.lr
            for p, g in zip(self.parameters, (factor * flat[:-1]).split([p.numel() for p in self.parameters]), strict=True):
                p.grad = g.view_as(p)
            self.adam.step()
            self.adam.zero_grad()
        self.step += 1
        if finite:
            self.window.append(value)
            self.bad = 0
        else:
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
            if self.bad == _BAD_STEPS:
                self._go_back()

    def _go_back(self) -> None:
        if self.retries == _RETRIES:
            raise TrainingError(
                f"the loss was not finite in {_BAD_STEPS} steps in a row up to step {self.step}. Tried: leaving such steps out ({self.skipped} of "
                f"them), and going back to the best state with half the learning rate, {_RETRIES} times. The flow is in its best state, of step "
                f"{self.best_step}: use a smaller lr (now {self.plan.lr}), or standardise x and look for rows far out"
            )
        self.retries, self.bad = self.retries + 1, 0
        self.module.load_state_dict(self.best_state)
        self.adam = self._optimizer()

    def _watch(self, report: Callable[[Descent], None]) -> None:
        """Validate, keep the best state, and decide whether to stop."""
        self.module.eval()
        with torch.no_grad():
            value = math.nan if self.validate is None else self.validate()
        if self.validate is not None and not self.history and not math.isfinite(value):
            raise TrainingError(
                f"the validation loss is {value} before any training: some rows have no finite density. Standardise x, and check it against the "
                "support of the flow's base"
            )
        if self.validate is None or value < self.best:
            self.best, self.best_step, self.best_state = value, self.step, self._copy()
        elif self.step - self.best_step >= self.plan.patience:
            self.stopped = True
        loss = sum(self.window) / len(self.window) if self.window else math.nan
        self.history.append({"step": self.step, "loss": loss, "validation": value, "lr": self.lr})
        self.window = []
        report(self)

    @property
    def still_gaining(self) -> float:
        """What the loss gained over the second half of the schedule, in nats, where that is worth mentioning; 0 after an early stop."""
        if self.stopped or self.step < self.plan.max_steps:
            return 0.0
        values = [(h["step"], h["loss"] if self.validate is None else h["validation"]) for h in self.history if h["step"]]
        before = [v for step, v in values if step <= self.plan.max_steps / 2 and math.isfinite(v)]
        after = [v for step, v in values if step > self.plan.max_steps / 2 and math.isfinite(v)]
        gain = min(before) - min(after) if before and after else 0.0
        return gain if gain > _STILL else 0.0

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on besides the module's own state, as tensors and plain numbers."""
        return {
            "adam": self.adam.state_dict(),
            "best_state": self.best_state,
            "numbers": [getattr(self, name) for name in _NUMBERS],
            "norms": list(self.clip.norms),
            "history": self.history,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state`, which is taken after a validation."""
        self.adam.load_state_dict(state["adam"])
        self.best_state = {name: t.clone() for name, t in state["best_state"].items()}
        for name, number in zip(_NUMBERS, state["numbers"], strict=True):
            setattr(self, name, number)
        self.clip.norms.extend(state["norms"])
        self.history = [dict(record) for record in state["history"]]
