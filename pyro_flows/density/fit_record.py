"""What training a flow leaves behind: the flow, the course of the losses, and what to know about it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..distributions.abstract_flow import AbstractFlow
from .rows import Rows

__all__ = ["FitRecord"]


@dataclass(repr=False)
class FitRecord:
    """The facts of a training. Its fields are described at :class:`~pyro_flows.density.FlowFit`."""

    flow: AbstractFlow
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

    def __repr__(self) -> str:
        validated = math.isfinite(self.validation_loss)
        loss, rows = (self.validation_loss, "validation") if validated else (self.history[-1]["loss"], "training")
        lines = [f"FlowFit of a flow with dim={self.flow.dim}, context_dim={self.flow.context_dim}"]
        unit = " nats" if self.in_nats else ""
        lines += [f"  {self.loss_name} {loss:.4f}{unit} ({rows}) at step {self.best_step} of {self.steps}, {self.seconds:.1f} s"]
        lines += ["  warning: " + line for line in self.warnings]
        return "\n".join(lines)
