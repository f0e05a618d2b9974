"""The figure of a trained flow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..diagnostics.style import AMBER, BLUE, GRID, MUTED, STYLE
from ..numerics.random import seeded
from .fit_record import FitRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

_POINTS = 1000


def plot(fit: FitRecord, path: str | Path | None = None) -> Figure:
    """Draw the figure; see :meth:`pyro_flows.density.FlowFit.plot`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _losses(left, fit)
        _points(right, fit)
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure


def _losses(axes: Axes, fit: FitRecord) -> None:
    steps = [h["step"] for h in fit.history]
    loss, validation = (np.array([h[name] for h in fit.history]) for name in ("loss", "validation"))
    axes.plot(steps, loss, color=MUTED, lw=1.0, label="training")
    if np.isfinite(validation).any():
        axes.plot(steps, validation, color=BLUE, lw=1.5, label="validation")
        axes.axvline(fit.best_step, color=AMBER, lw=1.0, ls=":", label="kept")
    finite = np.concatenate([loss, validation])
    finite = finite[np.isfinite(finite)]
    low, high = finite.min(), np.quantile(finite, 0.9)
    axes.set_ylim(low - 0.1 * (high - low + 0.1), high + 0.5 * (high - low + 0.1))  # the first steps would hide the rest
    axes.set(title=fit.loss_name, xlabel="step", ylabel="nats a row" if fit.in_nats else "loss a row")
    axes.grid(color=GRID, lw=0.6)
    axes.legend()


def _points(axes: Axes, fit: FitRecord) -> None:
    """The two coordinates most correlated among the held-out rows, or the histogram of a single one."""
    with torch.no_grad(), seeded(0):
        if fit.held_out is None:
            x, drawn = None, fit.flow().sample((_POINTS,)) if not fit.flow.context_dim else None
        else:
            rows = fit.held_out.take(slice(_POINTS))
            x, drawn = rows.x.cpu(), fit.flow(rows.context).sample(() if rows.context is not None else (len(rows.x),))
    groups = [(v.cpu(), c, n) for v, c, n in ((x, MUTED, "held out"), (drawn, BLUE, "drawn")) if v is not None]
    if not groups:
        axes.set_axis_off()
        return
    if fit.flow.dim == 1:
        for value, colour, name in groups:
            axes.hist(value[:, 0].numpy(), bins=40, density=True, histtype="step", color=colour, label=name)
    else:
        correlation = torch.corrcoef(groups[0][0].T).abs().nan_to_num().fill_diagonal_(-1)
        i, j = sorted(divmod(int(correlation.argmax()), fit.flow.dim))
        for value, colour, name in groups:
            axes.scatter(value[:, i].numpy(), value[:, j].numpy(), s=5, lw=0, alpha=0.5, color=colour, label=name)
        axes.set(xlabel=f"coordinate {i}", ylabel=f"coordinate {j}")
    axes.set_title("held-out rows and draws")
    axes.legend()
