"""From measured errors and weights to a word, good, usable or poor, and the sentences that explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .psis import khat_limit

__all__ = ["MomentErrors", "Verdict", "judge", "moment_errors"]

Verdict = Literal["good", "usable", "poor"]

# The limits of the verdict; tests/test_diagnostics.py measures the rates that they give.
_MEAN_GOOD, _MEAN_POOR = 0.10, 0.15  # posterior standard deviations
_SD_GOOD, _SD_POOR = 0.15, 0.20  # relative
_NOISE = 2.0  # variances taken off a squared error: one would make it unbiased, the worst of many needs more
_FEW_GOOD, _FEW_POOR = 100, 20  # draws' worth of weights left
TAIL_ESS = 0.3  # above it, a heavy tail of the weights carries too little to matter
_DROPPED_GOOD, _DROPPED_POOR = 0.001, 0.01  # fraction of the draws
_SPREAD = 3.0  # nats
_BLOCK = 256  # columns looked at together


class MomentErrors(NamedTuple):
    """Worst estimated errors of the raw draws, and the columns where they are."""

    mean: float
    mean_at: str
    sd: float
    sd_at: str


def moment_errors(w: Tensor, draws: Tensor, names: Sequence[str] | None) -> MomentErrors:
    """The worst errors of raw means and standard deviations against weighted ones, less their noise, and where."""
    sizes = [_sizes(w, block) for block in draws.split(_BLOCK, 1)]  # in blocks, to bound memory
    found: list[Any] = []
    for size in (torch.cat([s[0] for s in sizes]), torch.cat([s[1] for s in sizes])):
        worst = int(size.argmax())
        found += [size[worst].item(), names[worst] if names else f"column {worst}"]
    return MomentErrors(*found)


def _sizes(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of means (in standard deviations) and of standard deviations (relative), by column; 0 where neither is."""
    x = (x - x[:1]).to(torch.float64)  # against cancellation far from 0
    raw_mean, raw_var = x.mean(0), x.var(0, correction=0)
    fine = torch.isfinite(x).all(0) & (raw_var > 1e-24 * (1 + raw_mean**2))
    mean = w @ x
    centred = x - mean
    var = (w @ centred**2).clamp(min=1e-300)
    # Influence functions of the two differences: their squares add up to the variances of the estimates.
    shift = (mean - raw_mean) / var.sqrt()
    shift_noise = ((w[:, None] * centred - (x - raw_mean) / len(x)) ** 2).sum(0) / var
    ratio = (raw_var / var).sqrt()
    influence = 0.5 * (w[:, None] * (centred**2 / var - 1) - ((x - raw_mean) ** 2 / raw_var - 1) / len(x))
    ratio_noise = (influence**2).sum(0) * ratio**2
    sizes = [(e**2 - _NOISE * noise).clamp(min=0).sqrt() for e, noise in ((shift, shift_noise), (ratio - 1, ratio_noise))]
    return tuple(torch.where(fine, size, torch.zeros_like(size)) for size in sizes)  # type: ignore[return-value]


def judge(
    ess: float, khat: float, spread: float, errors: MomentErrors | None, total: int, dropped: int
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and the reasons for it, worst first."""
    poor: list[str] = []
    doubtful: list[str] = []

    def limit(value: float, usable: float, bad: float, reason: str) -> None:
        (poor if value > bad else doubtful if value > usable else []).append(reason)

    limit(
        dropped / total,
        _DROPPED_GOOD,
        _DROPPED_POOR,
        f"{dropped} of {total} draws have a density that is zero or not a number and were left out: check the model's "
        "supports, and fit in float64.",
    )
    few = ess * total
    limit(
        -few,
        -_FEW_GOOD,
        -_FEW_POOR,
        f"The weighted draws are worth {few:.0f} of {total}: the guide misses most of the posterior's mass, or is far "
        "too wide. Train longer, or use a richer flow or a full-rank affine layer.",
    )
    if errors is None:
        bound = math.sqrt(1 / max(ess, 1e-9) - 1)
        heavy = khat > khat_limit(total) and ess < 0.7
        reason = f"From the ESS alone, means of the raw draws may be off by up to {bound:.2f} standard deviations"
        limit(bound + heavy * 10, 1 / 3, 1.5, f"{reason}; give evaluate() the draws for a measured answer.")
    else:
        limit(
            errors.mean,
            _MEAN_GOOD,
            _MEAN_POOR,
            f"The mean of {errors.mean_at} is off by about {errors.mean:.2g} posterior standard deviations: train "
            "longer, or use a richer flow.",
        )
        limit(
            errors.sd,
            _SD_GOOD,
            _SD_POOR,
            f"The spread of {errors.sd_at} is off by about {errors.sd:.0%}: train longer, or use a richer flow (a "
            "Student-t base for heavy tails).",
        )
        if khat > khat_limit(total) and ess < TAIL_ESS:
            # neither the raw draws nor the weighted ones can be relied on, so a small measured error clears nothing
            poor.append(
                f"k-hat is {khat:.2f} and the ESS {ess:.1%}: the posterior has tails that the guide seldom reaches, so "
                "these numbers are optimistic. Train longer, or reparameterise the model."
            )
    remarks = []
    if spread > _SPREAD and ess >= TAIL_ESS:
        remarks.append(
            f"The log weights spread over {spread:.1f} nats: a few draws lie where the posterior has almost no mass. They "
            "pull the ELBO down, averages hardly."
        )
    if poor or doubtful:
        return ("poor" if poor else "usable"), tuple(poor + doubtful + remarks)
    fine = "The guide's draws agree with their importance-weighted version"
    if errors is not None:
        fine += f": means within {errors.mean:.2f} posterior standard deviations, spreads within {errors.sd:.0%}"
    if khat > khat_limit(total):
        remarks.append(
            f"k-hat is {khat:.2f} all the same: use the draws as they are (their weights are nearly equal), not "
            "importance=True."
        )
    blind = "Modes that the guide never visits cannot be seen from here: compare fits from several seeds."
    return "good", (fine + ".", *remarks, blind)
