"""What every training of a flow has around its descent: seed, progress bar, checkpoint, Ctrl-C, and the result."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distributions.abstract_flow import AbstractFlow
from ..errors import ConvergenceWarning
from ..numerics.random import seeded
from ..training.checkpoint import Checkpoint, remedy_of_interrupt
from ..training.descent import Descent, Plan
from ..training.processes import Processes
from ..training.progress import Progress
from .flow_fit import FlowFit
from .rows import Batches, Rows

__all__ = ["Training"]


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
        """Train, and say how it went.

        Args:
            loss, validate, plan: see :class:`~pyro_flows.training.descent.Descent`.
            batches: where ``loss`` takes its rows from, if it does.
            fingerprint: numbers that must agree between a checkpoint and this call.
            held_out: the validation set, for the result.
        """
        start, notes = time.perf_counter(), []
        interrupted = False
        with self.seeded(1), Progress(self.progress and self.processes.first) as bar:
            descent = Descent(self.flow, loss, validate, plan, self.processes)
            self._load(descent, batches, fingerprint)
            bar.stage(self.name)
            try:
                descent.run(lambda d: self._report(d, bar, batches))
            except KeyboardInterrupt:
                interrupted = True
                notes.append(f"interrupted: this is the best state so far; {remedy_of_interrupt(self.checkpoint)}")
            bar.done(f"{self.loss_name} {descent.best:.4f} at step {descent.best_step}")
        if descent.skipped:
            notes.append(f"{descent.skipped} steps without a finite loss were left out; the learning rate was halved {descent.retries} times")
        gain = descent.still_gaining
        if gain:
            unit = " nats" if self.in_nats else ""
            notes.append(f"the loss gained {gain:.3f}{unit} over the second half of the schedule: a larger max_steps may gain more")
        if interrupted:
            warnings.warn(notes[0], ConvergenceWarning, stacklevel=3)
        seconds = time.perf_counter() - start
        converged = not interrupted and not gain
        return FlowFit(self.flow, descent.history, descent.best, descent.best_step, converged, notes, seconds, self.loss_name, held_out, self.in_nats)

    def _report(self, descent: Descent, bar: Progress, batches: Batches | None) -> None:
        record = descent.history[-1]
        bar.step(descent.step, descent.plan.max_steps, f"loss {record['loss']:.4f}, validation {record['validation']:.4f}")
        if self.checkpoint is not None and self.processes.first:
            place = None if batches is None else [batches.order, batches.position]
            self.checkpoint.save(self.flow, {"descent": descent.state(), "batches": place})
        for callback in self.callbacks:
            callback(record)

    def _load(self, descent: Descent, batches: Batches | None, fingerprint: list[Any]) -> None:
        if self.checkpoint is None:
            return
        self.checkpoint.fingerprint = fingerprint
        content = self.checkpoint.load(self.flow)
        if content is None:
            return
        descent.restore(content["descent"])
        if batches is not None:
            batches.order, batches.position = content["batches"]
