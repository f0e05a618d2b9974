"""What training a flow leaves behind: the flow, the course of the losses, and what to know about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import AnyFlow, Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FlowFit"]


@dataclass(repr=False)
class FlowFit:
    """The result of :func:`~pyro_flows.density.fit_density` or :func:`~pyro_flows.density.distill`.

    Attributes:
        flow: the flow in its best state, in evaluation mode (the same object that was passed).
        history: dicts of ``step, loss, validation, lr``, one a validation; ``loss`` is the mean training loss since the one before.
        validation_loss: the best validation loss, nats a row (the squared error a row in flow matching); NaN without a validation set.
        best_step: the step of the state that was kept.
        converged: whether the loss no longer gained when the training ended.
        warnings: what a user should know about the run, in words.
        seconds: wall time.
        loss_name: what was minimised.
        held_out: the rows of the validation set; ``None`` without one.
        in_nats: whether the losses are log densities.
    """

    flow: AnyFlow
    history: list[dict[str, Any]]
    validation_loss: float
    best_step: int
    converged: bool
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    loss_name: str = "negative log-likelihood"
    held_out: Rows | None = None
    in_nats: bool = True

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.history[-1]["step"]

    def plot(self, path: str | Path | None = None) -> Figure:
        """One figure: the course of the losses, and held-out rows beside as many draws.

        Args:
            path: where to save it as well, such as ``"fit.png"``.
        """
        from .flow_fit_plot import plot

        return plot(self, path)

    def __repr__(self) -> str:
        validated = math.isfinite(self.validation_loss)
        loss, where = (self.validation_loss, "validation") if validated else (self.history[-1]["loss"], "training")
        lines = [f"FlowFit of a flow with dim={self.flow.dim}, context_dim={self.flow.context_dim}"]
        unit = " nats" if self.in_nats else ""
        lines += [f"  {self.loss_name} {loss:.4f}{unit} ({where}) at step {self.best_step} of {self.steps}, {self.seconds:.1f} s"]
        lines += ["  warning: " + line for line in self.warnings]
        return "\n".join(lines)
