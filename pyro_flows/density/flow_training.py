"""What every training of a flow has around its loop: seed, progress bar, checkpoint, Ctrl-C, and the result."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributions.abstract_flow import AbstractFlow
from ..errors import ConvergenceWarning, OptionError, TrainingError
from ..numerics.random import seeded
from ..training.checkpoint import Checkpoint, remedy_of_interrupt
from ..training.cosine import Cosine
from ..training.gradients import Gradients
from ..training.loop import Loop
from ..training.processes import Processes
from ..training.progress import Progress
from .flow_fit import FlowFit
from .rows import Batches, Rows

__all__ = ["Plan", "Training"]

_RETRIES = 3  # how often to go back to the best state with half the learning rate


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


class Training:
    """One call of ``fit_density`` or ``distill``.

    Args:
        flow: the flow to train, in place.
        seed, progress, callbacks, checkpoint: see :func:`~pyro_flows.density.fit_density`.
        name: of the calling function.
        loss_name: what is minimised.
        processes: those that train together.
        in_nats: whether the loss is.
    """

    def __init__(
        self,
        flow: AbstractFlow,
        seed: int,
        progress: bool,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
        checkpoint: str | Path | None,
        name: str,
        loss_name: str,
        processes: Processes,
        in_nats: bool = True,
    ) -> None:
        self.in_nats = in_nats
        self.flow, self.seed, self.progress, self.callbacks = flow, seed, progress, tuple(callbacks)
        self.name, self.loss_name, self.processes = name, loss_name, processes
        self.checkpoint = None if checkpoint is None else Checkpoint(checkpoint, name)

    def seeded(self, stream: int = 0) -> AbstractContextManager[None]:
        """Random numbers that follow from the seed; each stream is another sequence."""
        return seeded(self.seed + stream * 2**31)

    def run(
        self,
        loss: Callable[[], Tensor],
        validate: Callable[[], float] | None,
        plan: Plan,
        batches: Batches | None,
        fingerprint: list[Any],
        held_out: Rows | None = None,
    ) -> FlowFit:
        """Train, and say how it went. The flow ends in its best state and in evaluation mode, also when something raises.

        Args:
            loss: this process's part of the loss of a fresh batch; random numbers come from the global state.
            validate: the loss that decides which state is best; ``None`` to keep the last.
            plan: how long and how fast.
            batches: where ``loss`` takes its rows from, if it does.
            fingerprint: numbers that must agree between a checkpoint and this call.
            held_out: the validation set, for the result.

        Raises:
            TrainingError: the loss is not finite, at the start or again and again.
        """
        start = time.perf_counter()
        interrupted = False
        schedule = Cosine(plan.max_steps, plan.lr, plan.every, plan.patience)
        if validate is not None:
            schedule.validate = lambda: self._validate(validate, first=not schedule.history)
        with self.seeded(1), Progress(self.progress and self.processes.first) as bar:
            step = Gradients(self.flow, loss, self.processes)
            loop = Loop(step.parameters, step, schedule, self._read, self.flow.load_state_dict, plan.weight_decay, _RETRIES)
            self._load(loop, batches, fingerprint)
            bar.stage(self.name)
            try:
                self._run(loop, schedule, lambda: self._report(loop, schedule, bar, batches))
            except KeyboardInterrupt:
                interrupted = True
            bar.done(f"{self.loss_name} {schedule.best:.4f} at step {schedule.best_step}")
        notes = self._notes(loop, schedule, interrupted)
        if interrupted:
            warnings.warn(notes[0], ConvergenceWarning, stacklevel=3)
        seconds = time.perf_counter() - start
        converged = not interrupted and not schedule.still_gaining
        history, best, best_step = schedule.history, schedule.best, schedule.best_step
        return FlowFit(self.flow, history, best, best_step, converged, notes, seconds, self.loss_name, held_out, self.in_nats)

    def _run(self, loop: Loop[dict[str, Tensor]], schedule: Cosine, report: Callable[[], None]) -> None:
        try:
            if not schedule.history:
                loop.close_window(lambda _: report())  # the start, to compare with
            loop.run(lambda _: report())
        finally:
            self.flow.load_state_dict(loop.best)
            self.flow.eval()

    @torch.no_grad()
    def _validate(self, validate: Callable[[], float], first: bool) -> float:
        self.flow.eval()
        value = validate()
        if first and not math.isfinite(value):
            raise TrainingError(
                f"the validation loss is {value} before any training: some rows have no finite density. Standardise x, and check it against the "
                "support of the flow's base"
            )
        return value

    def _read(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.flow.state_dict().items()}

    def _notes(self, loop: Loop[dict[str, Tensor]], schedule: Cosine, interrupted: bool) -> list[str]:
        """What a user should know about the training, in words."""
        notes = []
        if interrupted:
            notes.append(f"interrupted: this is the best state so far; {remedy_of_interrupt(self.checkpoint)}")
        if loop.skipped:
            notes.append(f"{loop.skipped} steps without a finite loss were left out; the learning rate was halved {loop.retries} times")
        if gain := schedule.still_gaining:
            unit = " nats" if self.in_nats else ""
            notes.append(f"the loss gained {gain:.3f}{unit} over the second half of the schedule: a larger max_steps may gain more")
        return notes

    def _report(self, loop: Loop[dict[str, Tensor]], schedule: Cosine, bar: Progress, batches: Batches | None) -> None:
        record = schedule.history[-1]
        record["lr"] = loop.lr  # with what retries have taken off
        bar.step(loop.step, schedule.max_steps, f"loss {record['loss']:.4f}, validation {record['validation']:.4f}")
        if self.checkpoint is not None and self.processes.first:
            place = None if batches is None else [batches.order, batches.position]
            self.checkpoint.save(self.flow, {"loop": loop.state(), "batches": place})
        for callback in self.callbacks:
            callback(record)

    def _load(self, loop: Loop[dict[str, Tensor]], batches: Batches | None, fingerprint: list[Any]) -> None:
        if self.checkpoint is None:
            return
        self.checkpoint.fingerprint = fingerprint
        content = self.checkpoint.load(self.flow)
        if content is None:
            return
        loop.restore(content["loop"])
        if batches is not None:
            batches.order, batches.position = content["batches"]
