"""One figure of a transform: its errors beside what conditioning allows, its singular values, and its stress inputs."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .findings import Findings
from .style import AMBER, BLUE, GRID, INK, MUTED, STYLE, VERDICTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

_COLOURS = {torch.float64: BLUE, torch.float32: AMBER}
_NAMES = {torch.float64: "float64", torch.float32: "float32"}
_LEAST = 1e-17  # an error of zero is drawn here
_MOST = 1e3  # and one that is larger, or not a number, here


def plot(findings: Findings, path: str | Path | None = None) -> Figure:
    """Draw the figure; see :meth:`Invertibility.plot`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        title = f"{findings.verdict.upper()}    {findings.name}, dim {findings.dim}, condition number {findings.condition:.1e}\n\n"
        figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=VERDICTS[findings.verdict])
        reason = textwrap.shorten(findings.reasons[0], 150, placeholder=" ...")
        figure.text(0.012, 1 - 0.42 / figure.get_figheight(), reason, ha="left", va="top", fontsize=8.5, color=MUTED)
        axes = figure.subplots(1, 3)
        _errors(axes[0], findings)
        _singular_values(axes[1], findings)
        _stress(axes[2], findings)
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure


def _shown(values: torch.Tensor) -> np.ndarray:
    return values.double().nan_to_num(_MOST, _MOST, _MOST).clamp(_LEAST, _MOST).cpu().numpy()


def _quantity(findings: Findings) -> str:
    """The round trip; where there is none, the log-det."""
    names = [name for name, _ in findings.errors]
    return "x → y → x" if "x → y → x" in names else names[0] if names else ""


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    axes.set_xticks([]), axes.set_yticks([])


def _errors(axes: Axes, findings: Findings) -> None:
    quantity = _quantity(findings)
    unit = "nats" if quantity.startswith("log-det") else "relative"
    axes.set_title(f"{quantity}: errors at the points")
    ends = [np.inf, 0.0]
    for dtype in (torch.float64, torch.float32):
        if (quantity, dtype) in findings.errors:
            error, allowed = (_shown(v) for v in findings.errors[quantity, dtype])
            axes.plot(allowed, error, ls="", marker="o", ms=3, mec="none", color=_COLOURS[dtype], alpha=0.5, label=_NAMES[dtype])
            ends = [min(ends[0], allowed.min()), max(ends[1], allowed.max())]
    if not ends[1]:
        return _nothing(axes, "no evaluation")
    line = np.array([ends[0] / 3, ends[1] * 3])
    axes.plot(line, line, color=INK, lw=1.0)
    axes.fill_between(line, line, 10 * _MOST, color=VERDICTS["wrong"], alpha=0.07, lw=0)
    axes.text(0.04, 0.97, "not explained", ha="left", va="top", color=VERDICTS["wrong"], fontsize=8, transform=axes.transAxes)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*line), axes.set_ylim(_LEAST / 3, 3 * _MOST)
    axes.set_xlabel(f"allowed ({unit})"), axes.set_ylabel(f"error ({unit})")
    axes.grid(color=GRID, lw=0.8)
    axes.minorticks_off()
    axes.legend(loc="upper right", handletextpad=0.1)


def _singular_values(axes: Axes, findings: Findings) -> None:
    axes.set_title("Singular values of the Jacobian")
    values = findings.singular_values[findings.singular_values.isfinite().all(-1) & (findings.singular_values[:, 0] > 0)]
    if not len(values):
        return _nothing(axes, "singular everywhere")
    ordered = values[(values[:, 1] / values[:, 0]).argsort()].cpu().numpy()
    at = np.linspace(0, 100, len(ordered)) if len(ordered) > 1 else np.array([50.0])
    for column, label in ((1, "largest"), (0, "smallest")):
        axes.plot(at, ordered[:, column], ls="", marker="o", ms=2.5, mec="none", color=BLUE, alpha=0.5 + 0.5 * column, label=label)
    for k, bound in enumerate(findings.lipschitz):
        if np.isfinite(bound) and bound > 0:
            axes.axhline(bound, color=AMBER, lw=1.2, ls=(0, (4, 2)), label=None if k else "pairs of points")
    axes.set_yscale("log")
    low, high = min(ordered[:, 0].min(), 0.5), max(ordered[:, 1].max(), 2.0)
    axes.set_ylim(low / 2, high * (high / low) ** 0.35 * 1.5)  # leaves space for the legend
    axes.set_xlabel("points by condition number, %")
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.minorticks_off()
    axes.legend(loc="upper left", handletextpad=0.3, ncols=3, columnspacing=1.0, handlelength=1.6)


def _stress(axes: Axes, findings: Findings) -> None:
    quantity = _quantity(findings)
    axes.set_title(f"{quantity}: worst, at scaled inputs")
    rows = [c for c in findings.checks if c.quantity == quantity and c.points != "around x"]
    if not rows:
        return _nothing(axes, "no evaluation")
    inputs = list(dict.fromkeys(c.points for c in rows))
    for dtype in (torch.float64, torch.float32):
        own = [c for c in rows if c.dtype == dtype]
        at = [inputs.index(c.points) for c in own]
        error, allowed = (_shown(torch.tensor([getattr(c, name) for c in own])) for name in ("error", "allowed"))
        axes.plot(at, allowed, color=_COLOURS[dtype], lw=1.0, ls=(0, (4, 2)))
        axes.plot(at, error, color=_COLOURS[dtype], lw=1.5, marker="o", ms=4, label=_NAMES[dtype])
        bad = [i for i, c in enumerate(own) if c.status in ("failed", "not finite")]
        axes.plot([at[i] for i in bad], error[bad], ls="", marker="x", ms=7, mew=1.8, color=VERDICTS["wrong"])
    axes.plot([], [], color=MUTED, lw=1.0, ls=(0, (4, 2)), label="allowed")
    axes.set_yscale("log")
    axes.set_ylim(_LEAST / 3, 1e4 * _MOST)  # leaves space for the legend
    axes.set_xticks(range(len(inputs)), [p.replace("x · ", "") for p in inputs])
    axes.set_xlabel("scale of x"), axes.set_ylabel("nats" if quantity.startswith("log-det") else "relative error")
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.legend(loc="upper right", ncols=3, columnspacing=1.0, handlelength=1.6)
