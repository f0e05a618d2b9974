"""The result of training a flow, with its figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .fit_record import FitRecord
from .flow_fit_plot import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FlowFit"]


@dataclass(repr=False)
class FlowFit(FitRecord):
    """The result of :func:`~pyro_flows.density.fit_density` or :func:`~pyro_flows.density.distill`.

    Attributes:
        flow: the flow in its best state, in evaluation mode (the same object that was passed).
        history: dicts of ``step, loss, validation, lr``, one a validation; ``loss`` is the mean training loss since the one before.
        validation_loss: the best validation loss, a row; NaN without a validation set.
        best_step: the step of the state that was kept.
        converged: whether the loss no longer gained when the training ended.
        warnings: what a user should know about the run, in words.
        seconds: wall time.
        loss_name: what was minimised.
        held_out: the rows of the validation set; ``None`` without one.
        in_nats: whether the losses are minus log densities, or bounds of them.
    """

    def plot(self, path: str | Path | None = None) -> Figure:
        """One figure: the course of the losses, and held-out rows beside as many draws.

        Args:
            path: where to save it as well, such as ``"fit.png"``.
        """
        return plot(self, path)
