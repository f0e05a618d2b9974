"""What the steps of all objectives share: sound particles, cut-off gradients, and what a step returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

__all__ = ["LogDensity", "StepOutput", "clean", "finish", "gaps_and_slopes", "output", "slopes_and_values", "sound_median"]

LogDensity = Callable[[Tensor], Tensor]
_CLIP = 10.0  # a particle's gradient is shortened to this many times the median
_LOST_COST = 100.0  # nats: what all of the mass would cost


class StepOutput(NamedTuple):
    """What a step returns, all tensors: the gradient of the loss, and per-step statistics (scalars)."""

    gradient: Tensor
    elbo: Tensor
    spread: Tensor  # variance of the log weights: twice the KL divergence, near the optimum
    dropped: Tensor  # number of particles with a non-finite value or gradient


def slopes_and_values(function: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(N, d)`` and values ``(N,)`` of a function at each of N points."""
    values, pull = vjp(function, x)  # type: ignore[misc]
    return pull(torch.ones_like(values))[0], values


def gaps_and_slopes(log_joint: LogDensity, x: Tensor, log_q: Tensor, power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``log q - power log p`` at points ``(*batch, d)``, its slopes there through ``log p``, and which of them are sound.

    Where value or slope is not finite both are zero: a loss that masks the value alone would still multiply the slope by zero, and get NaN.
    """
    slopes, log_p = slopes_and_values(log_joint, x.reshape(-1, x.shape[-1]))
    gaps, slopes = log_q - power * log_p.view(log_q.shape), -power * slopes.view(x.shape)
    sound = torch.isfinite(gaps) & torch.isfinite(slopes).all(-1)
    return torch.where(sound, gaps, torch.zeros_like(gaps)), torch.where(sound.unsqueeze(-1), slopes, torch.zeros_like(slopes)), sound


def sound_median(sizes: Tensor, sound: Tensor) -> Tensor:
    """The median of those of sound particles, 0 without any."""
    return torch.where(sound, sizes, torch.full_like(sizes, torch.nan)).nanmedian().nan_to_num(0.0)


def clean(gap: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Per-particle gradients with the non-finite ones zeroed and the longest shortened; and which particles are sound."""
    sound = torch.isfinite(rows).all(-1) & torch.isfinite(gap)
    rows = torch.where(sound.unsqueeze(-1), rows, torch.zeros_like(rows))
    norms = rows.norm(dim=-1)
    limit = _CLIP * sound_median(norms, sound)
    return rows * (limit / norms.clamp(min=torch.finfo(rows.dtype).tiny)).clamp(max=1.0).unsqueeze(-1), sound


def output(gradient: Tensor, gap: Tensor, sound: Tensor) -> StepOutput:
    """A step's output from the gaps ``log q - log p`` of its particles, of which the sound ones count."""
    count = sound.sum().clamp(min=1)
    mean = torch.where(sound, gap, torch.zeros_like(gap)).sum() / count
    spread = (torch.where(sound, gap - mean, torch.zeros_like(gap)) ** 2).sum() / (count - 1).clamp(min=1)
    return finish(gradient, mean, spread, 1 - sound.sum() / len(gap), sound.logical_not().sum())


def finish(gradient: Tensor, mean: Tensor, spread: Tensor, lost: Tensor, dropped: Tensor) -> StepOutput:
    """A step's output, given the mean and variance of log q - log p, and the share of mass where the density is zero or not a number.

    Leaving that mass out must not look like progress.
    """
    elbo = torch.where(lost < 1, -mean - _LOST_COST * lost, -torch.inf)
    return StepOutput(gradient, elbo, torch.where(lost < 1, spread, torch.inf), dropped)
