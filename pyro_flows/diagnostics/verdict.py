"""From measured errors and weights to a word, good, usable or poor, and the sentences that explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

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
_SPREAD_NATS = 3.0
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
    mean, sd = (torch.cat(parts) for parts in zip(*sizes, strict=True))
    worst = [int(size.argmax()) for size in (mean, sd)]
    mean_at, sd_at = (names[i] if names else f"column {i}" for i in worst)
    return MomentErrors(mean[worst[0]].item(), mean_at, sd[worst[1]].item(), sd_at)


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
    by_mean, by_sd = ((e**2 - _NOISE * noise).clamp(min=0).sqrt() for e, noise in ((shift, shift_noise), (ratio - 1, ratio_noise)))
    zero = torch.zeros_like(by_mean)
    return torch.where(fine, by_mean, zero), torch.where(fine, by_sd, zero)


class _Reasons:
    """Sentences that speak against a guide: some forbid to use its draws, others want to be read first."""

    def __init__(self) -> None:
        self.poor: list[str] = []
        self.doubtful: list[str] = []

    def add(self, value: float, usable: float, poor: float, sentence: str) -> None:
        """Note a sentence where a value is above a limit: that of ``"good"``, or that of ``"usable"``."""
        (self.poor if value > poor else self.doubtful if value > usable else []).append(sentence)


def judge(
    ess: float, khat: float, spread: float, errors: MomentErrors | None, total: int, dropped: int
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and the reasons for it, worst first."""
    reasons = _Reasons()
    reasons.add(
        dropped / total,
        _DROPPED_GOOD,
        _DROPPED_POOR,
        f"{dropped} of {total} draws have a density that is zero or not a number and were left out: check the model's "
        "supports, and fit in float64.",
    )
    worth = ess * total
    reasons.add(
        -worth,
        -_FEW_GOOD,
        -_FEW_POOR,
        f"The weighted draws are worth {worth:.0f} of {total}: the guide misses most of the posterior's mass, or is far "
        "too wide. Train longer, or use a richer flow or a full-rank affine layer.",
    )
    if errors is None:
        _bound_by_weights(reasons, ess, khat, total)
    else:
        _compare_moments(reasons, errors, ess, khat, total)
    remarks = []
    if spread > _SPREAD_NATS and ess >= TAIL_ESS:
        remarks.append(
            f"The log weights spread over {spread:.1f} nats: a few draws lie where the posterior has almost no mass. They "
            "pull the ELBO down, averages hardly."
        )
    if reasons.poor or reasons.doubtful:
        return ("poor" if reasons.poor else "usable"), tuple(reasons.poor + reasons.doubtful + remarks)
    return "good", _praise(errors, khat, total, remarks)


def _bound_by_weights(reasons: _Reasons, ess: float, khat: float, total: int) -> None:
    """What the weights alone allow to say of the raw draws' means."""
    bound = math.sqrt(1 / max(ess, 1e-9) - 1)
    heavy = khat > khat_limit(total) and ess < 0.7
    sentence = f"From the ESS alone, means of the raw draws may be off by up to {bound:.2f} standard deviations"
    reasons.add(bound + heavy * 10, 1 / 3, 1.5, f"{sentence}; give evaluate() the draws for a measured answer.")


def _compare_moments(reasons: _Reasons, errors: MomentErrors, ess: float, khat: float, total: int) -> None:
    """What raw and weighted moments of the draws say, and whether the weights can be believed."""
    reasons.add(
        errors.mean,
        _MEAN_GOOD,
        _MEAN_POOR,
        f"The mean of {errors.mean_at} is off by about {errors.mean:.2g} posterior standard deviations: train "
        "longer, or use a richer flow.",
    )
    reasons.add(
        errors.sd,
        _SD_GOOD,
        _SD_POOR,
        f"The spread of {errors.sd_at} is off by about {errors.sd:.0%}: train longer, or use a richer flow (a "
        "Student-t base for heavy tails).",
    )
    if khat > khat_limit(total) and ess < TAIL_ESS:
        # neither the raw draws nor the weighted ones can be relied on, so a small measured error clears nothing
        reasons.poor.append(
            f"k-hat is {khat:.2f} and the ESS {ess:.1%}: the posterior has tails that the guide seldom reaches, so "
            "these numbers are optimistic. Train longer, or reparameterise the model."
        )


def _praise(errors: MomentErrors | None, khat: float, total: int, remarks: list[str]) -> tuple[str, ...]:
    """What a good guide is told: how good it is, what to mind, and what cannot be seen from its draws."""
    sentence = "The guide's draws agree with their importance-weighted version"
    if errors is not None:
        sentence += f": means within {errors.mean:.2f} posterior standard deviations, spreads within {errors.sd:.0%}"
    if khat > khat_limit(total):
        remarks = [
            *remarks,
            f"k-hat is {khat:.2f} all the same: use the draws as they are (their weights are nearly equal), not importance=True.",
        ]
    unseen = "Modes that the guide never visits cannot be seen from here: compare fits from several seeds."
    return sentence + ".", *remarks, unseen
