"""How far draws of a guide are from a reference posterior, and what counts as a pass.

Errors are those of the worst coordinate, from raw draws (no importance correction), in the reference's parametrisation:
``e_mean = max |m - mean| / sd``, ``e_sd = max |s / sd - 1|`` and ``coverage = max |F(q_p) - p|``, the share F of draws
below the reference's quantiles q_p at p = .05, .5, .95.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.models import Task

NUM_DRAWS = 10_000
PASS = {"e_mean": 0.10, "e_sd": 0.15}
EXCELLENT = {"e_mean": 0.05, "e_sd": 0.05}
COVERAGE = 0.03
BY_COVERAGE = {"irt_2pl"}  # sd of exp(.) columns is mostly tail: the quantiles may stand in for the moments


class FitFailed(RuntimeError):
    """A fit that gave no usable draws; the message is the reason that the table shows."""


def score(task: Task, draws: Tensor) -> dict[str, Any]:
    """Errors of ``draws`` (S, d), columns as in ``task.names``, and the coordinates where the moments are worst."""
    x = draws.detach().double()
    if not x.isfinite().all():
        raise FitFailed(f"{float((~x.isfinite()).any(-1).double().mean()):.2%} of the draws are not finite")
    mean_error = ((x.mean(0) - task.mean) / task.sd).abs()
    sd_error = (x.std(0) / task.sd - 1).abs()
    coverage = torch.stack(
        [
            ((x <= quantile).double().mean(0) - p).abs()
            for p, quantile in ((0.05, task.q05), (0.5, task.q50), (0.95, task.q95))
        ]
    )
    return {
        "e_mean": float(mean_error.max()),
        "e_sd": float(sd_error.max()),
        "coverage": float(coverage.max()),
        "worst": [task.names[int(mean_error.argmax())], task.names[int(sd_error.argmax())]],
    }


def passes(record: dict[str, Any]) -> bool:
    """Whether a finished fit is a PASS."""
    by_moments = all(record[key] < bound for key, bound in PASS.items())
    return by_moments or (record["task"] in BY_COVERAGE and record["coverage"] < COVERAGE)


def excels(record: dict[str, Any]) -> bool:
    """Whether a finished fit is EXCELLENT, by its moments alone."""
    return all(record[key] < bound for key, bound in EXCELLENT.items())
