"""How the house draws: one ink, one grid, one colour for each thing that recurs."""

from __future__ import annotations

from typing import Any

__all__ = ["AMBER", "BLUE", "GRID", "INK", "MUTED", "STYLE", "VERDICTS"]

INK, MUTED, GRID = "#22303c", "#7b8794", "#e4e7eb"
BLUE, AMBER = "#2f6f9f", "#d9822b"
_GOOD, _DOUBTFUL, _BAD = "#2e7d4f", "#b7791f", "#b3382c"
VERDICTS = {
    **{"good": _GOOD, "usable": _DOUBTFUL, "poor": _BAD},
    **{"ill-conditioned": _DOUBTFUL, "unstable": _DOUBTFUL, "one-way": _DOUBTFUL, "wrong": _BAD},
}
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 6.0,
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.facecolor": "white",
}
