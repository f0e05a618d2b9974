"""Other modes of a density than a known one: looked for along one angle or direction at a time, with all other coordinates fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..manifolds import Sphere, Torus
from .angle_profiles import BINS, STEP

__all__ = ["OtherModes", "angle_profiles", "circle_variances", "far_mass", "other_modes", "with_coordinates"]

_FINE = 4  # points that are looked at in each bin of a profile
_LOOKS = 1024  # random directions
_DROP = 4.0  # nats below the top, down to which a point belongs to a mode
_REACH = 5.0  # standard deviations, beyond which it belongs to another mode
_NEAREST, _STEPS = 1e-6, 96  # radians, and points on each side of a pole, each farther by the same factor


def with_coordinates(loc: Tensor, own: Tensor, values: Tensor) -> Tensor:
    """Copies of a point with some coordinates replaced: ``(d,), (k,), (N, k) -> (N, d)``."""
    points = loc.repeat(len(values), 1)
    points[:, own] = values
    return points


def _finite(log_density: Tensor) -> Tensor:
    """A log density in which NaN counts as zero density, and plus infinity as the largest finite value of the row."""
    log_density = torch.where(log_density.isnan(), -torch.inf, log_density)
    return torch.where(log_density == torch.inf, _top(log_density), log_density)


def _top(log_density: Tensor) -> Tensor:
    """The largest finite value of each row, ``(..., 1)``."""
    return torch.where(log_density.isfinite(), log_density, torch.finfo(log_density.dtype).min).amax(-1, keepdim=True)


@torch.no_grad()
def angle_profiles(log_density: Callable[[Tensor], Tensor], loc: Tensor, index: Tensor) -> Tensor:
    """The log density along the circle of each of some angles, all other coordinates fixed.

    Args:
        log_density: ``(N, d) -> (N,)``.
        loc: where all other coordinates stay, ``(d,)``.
        index: positions of the angles in it, ``(k,)``.

    Returns:
        Mean densities' logarithms over bins around ``loc[index] - pi + 2 pi j / 256``, ``(k, 256)``; for
        :meth:`~pyro_flows.guides.angle_profiles.AngleProfiles.tabulate`.

    Cost: 1024 evaluations an angle.
    """
    fine = BINS * _FINE
    offsets = (torch.arange(fine, dtype=loc.dtype, device=loc.device) + 0.5) * (2 * math.pi / fine) - 0.5 * STEP - math.pi
    circle = Torus(1)
    values = torch.stack([log_density(with_coordinates(loc, i, circle.project(loc[i] + offsets.unsqueeze(-1)))) for i in index.split(1)])
    profiles = _finite(values).view(len(index), BINS, _FINE).logsumexp(-1) - math.log(_FINE)
    return torch.where(profiles.isfinite().any(-1, keepdim=True), profiles, 0.0)


def far_mass(profiles: Tensor, spread: Tensor) -> Tensor:
    """The share of each profile that lies farther from its middle than a normal distribution of that spread reaches."""
    distance = (torch.arange(BINS, device=profiles.device) - BINS // 2).abs() * STEP
    far = distance > (_REACH * spread).clamp(min=2 * STEP).unsqueeze(-1)
    return (profiles.softmax(-1) * far).sum(-1)


class OtherModes(NamedTuple):
    """Whether a density has modes away from known points of directions, at their antipodes and elsewhere, ``(count,)`` each."""

    antipode: Tensor
    elsewhere: Tensor


@torch.no_grad()
def other_modes(log_density: Callable[[Tensor], Tensor], loc: Tensor, index: Tensor, poles: Tensor, spread: Tensor) -> OtherModes:
    """Look for other modes of each of several directions, all else fixed: at 1024 random points, and at the antipode.

    Args:
        log_density: ``(N, d) -> (N,)``.
        loc: where all other coordinates stay, ``(d,)``.
        index: positions of the directions' coordinates in it, ``(count * n,)``.
        poles: the known points, ``(count, n)``.
        spread: their standard deviations there in radians, ``(count,)``.

    Cost: 1026 evaluations a direction. Modes that are much narrower than a tenth of a radian may be missed, but for the antipode.
    """
    n, answers = poles.shape[-1], []
    for pole, own, width in zip(poles, index.unflatten(0, (-1, n)), spread, strict=True):
        directions = Sphere(n).all_round(pole, _LOOKS + 2)
        values = _finite(log_density(with_coordinates(loc, own, directions)))
        high = values > _top(values) - _DROP
        near = _REACH * width.clamp(min=0.02)
        angle = (directions @ pole).clamp(-1, 1).acos()
        answers.append(torch.stack([(high & (math.pi - angle < near)).any(), (high & (angle > near) & (math.pi - angle > near)).any()]))
    return OtherModes(*torch.stack(answers, -1).unbind())


@torch.no_grad()
def circle_variances(log_density: Callable[[Tensor], Tensor], loc: Tensor, index: Tensor, pole: Tensor, axes: Tensor, flatter: Tensor) -> Tensor:
    """The variances of one direction along great circles through a point, over the hemisphere around it, all else fixed.

    Args:
        log_density: ``(N, d) -> (N,)``.
        loc: where all other coordinates stay, ``(d,)``.
        index: positions of the direction's coordinates in it, ``(n,)``.
        pole: the point, ``(n,)``.
        axes: unit vectors across it, ``(n, k)``.
        flatter: powers of the density along each, ``(k,)``.

    Returns:
        ``(k,)``, squared radians; NaN where the density is zero on all of a circle.

    Cost: 192 evaluations an axis. Unlike a curvature it is right where a mode is flat or has corners.
    """
    side = torch.logspace(math.log10(_NEAREST), math.log10(math.pi / 2), _STEPS, dtype=loc.dtype, device=loc.device)
    angle = torch.cat([-side.flip(0), side])
    points = angle.cos().unsqueeze(-1) * pole + angle.sin().unsqueeze(-1) * axes.mT.unsqueeze(1)
    values = torch.stack([_finite(log_density(with_coordinates(loc, index, one))) for one in points])
    weights = (values * flatter.unsqueeze(-1) + angle.abs().log()).softmax(-1)  # steps are equal in the angle's logarithm
    return (weights * angle**2).sum(-1)
