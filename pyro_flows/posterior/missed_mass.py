"""Looks for parts of a posterior that a trained guide does not draw: round directions and angles, and at modes that are known of."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..guides import AutoFlow
from ..guides.modes import with_coordinates
from ..model.log_joint import LogJoint

__all__ = ["all_round", "missed_mass", "missed_modes"]

_TOO_MUCH = 0.05  # of a density: a guide that has next to nothing of it is poor
_THIN = math.log(0.05)  # of the density that there should be: next to nothing
_FROM = 5  # draws that looks all round start from
_LEAST, _MOST = 64, 1024  # points around each, for one direction or angle
_ALL = 4096  # points around each for all of them, about
_LOOKED_AT = 64  # directions and angles at most, about; of more, some
_BLOCKS, _BLOCK = 8, 64  # of draws around a mode: the median of their means is not swayed by a single weight


@torch.no_grad()
def missed_mass(guide: AutoFlow, log_joint: LogJoint, modes: Iterable[tuple[Tensor, Tensor]], log_evidence: float) -> list[str]:
    """What the guide overlooks, in words; nothing where the model's density is random.

    Args:
        guide: a guide, set up.
        log_joint: the model's log joint density over the guide's vector.
        modes: places and scales of modes, see :func:`missed_modes`.
        log_evidence: what the guide's own draws say.

    Cost: that of :func:`all_round` and :func:`missed_modes`.
    """
    reasons: list[str] = []
    if log_joint.stochastic:  # noise would look like modes
        return reasons
    on_manifolds = any(s.manifold is not None for s in guide.sites)
    remedy = "Fit again from other seeds" if on_manifolds else "Use AutoStochasticFlow, which keeps separate modes"
    for site, share in all_round(guide, log_joint).items():
        if share > _TOO_MUCH:
            reasons.append(
                f"With all else held fixed, about {share:.0%} of the density of {site} lies where the guide hardly ever draws: it misses a mode, "
                "or much of a wide one. Fit again from other seeds, or let a prior choose one of modes that mean the same."
            )
    modes = list(modes)
    for share, (loc, _) in zip(missed_modes(guide, log_joint, modes, log_evidence), modes, strict=True):
        if share > _TOO_MUCH:
            reasons.append(
                f"At least {share:.0%} of the posterior lies around another mode, with {_farthest(guide, loc)}, where the guide hardly ever draws. "
                f"{remedy}, or let a prior choose one of modes that mean the same."
            )
    return reasons


@torch.no_grad()
def all_round(guide: AutoFlow, log_joint: LogJoint) -> dict[str, float]:
    """How much of the posterior of each site's directions and angles a guide has next to nothing of, when nothing else moves.

    From draws of the guide one direction or angle goes all round. Over these points both densities are distributions; what the guide overlooks is
    the posterior's share of points where the guide has less than a twentieth of what it should have. Modes that open only when other
    coordinates move too are not seen, nor ones that lie between the points.

    Args:
        guide: a guide, set up.
        log_joint: the model's log joint density over the guide's vector.

    Returns:
        By site, the worst share among its directions or angles; sites of numbers are left out.

    Cost: 5120 evaluations of model and flow for a direction or an angle, less for each where there are more than four, 320 at least; of more than 64
    directions and angles some are looked at.
    """
    worst: dict[str, float] = {}
    singles = {s.name: s.manifold.single for s in guide.sites if s.manifold is not None}
    indices = {s.name: torch.arange(s.start, s.stop).split(singles[s.name].size) for s in guide.sites if s.name in singles}
    if not indices:
        return worst
    flow, total = guide.flow(), sum(map(len, indices.values()))
    draws, count = flow.sample((_FROM,)), min(_MOST, max(_LEAST, _ALL // total))
    for name, runs in indices.items():
        shares = []
        for index in runs[:: math.ceil(total / _LOOKED_AT)]:
            points = torch.stack([with_coordinates(z, index, singles[name].all_round(z[index], count)) for z in draws])
            values = (f(points.flatten(0, 1)).view(_FROM, count) for f in (log_joint, flow.log_prob))
            p, q = (v.nan_to_num(nan=-torch.inf, neginf=-torch.inf).log_softmax(-1) for v in values)
            shares.append((p.exp() * ~(q >= p + _THIN)).nansum(-1).median())
        worst[name] = float(torch.stack(shares).max())
    return worst


@torch.no_grad()
def missed_modes(guide: AutoFlow, log_joint: LogJoint, modes: Iterable[tuple[Tensor, Tensor]], log_evidence: float) -> list[float]:
    """How much of the posterior lies around each of some modes at points where a guide has next to nothing.

    By importance sampling from a normal distribution at the mode, of the mass where the guide has less than a twentieth of the density that it
    should have, beside what the guide's own draws have found: where a guide is good this is zero, whatever the mode is. It is a low estimate where a
    mode is far from normal, and lower still in many dimensions.

    Args:
        guide: a guide, set up.
        log_joint: the model's log joint density over the guide's vector.
        modes: points ``(d,)`` and Cholesky factors of covariances ``(d, d)``, those of the guide's ``lift``.
        log_evidence: the mass, in nats, that the guide's own draws have found.

    Returns:
        A share for each mode.

    Cost: 512 evaluations of model and flow a mode.
    """
    flow, shares = guide.flow(), []
    for loc, root in modes:
        noise = torch.randn(_BLOCKS * _BLOCK, len(loc)).to(loc)
        moves = noise @ root.mT
        z, extra = guide.lift(loc + moves)
        log_p = log_joint(z)
        log_normal = -0.5 * (noise**2).sum(-1) - root.diagonal().log().sum() - 0.5 * len(loc) * math.log(2 * math.pi)
        once = (moves.abs() <= 0.5 * guide.log_lengths().exp()).all(-1)  # an angle's circle is covered once
        thin = once & ~(flow.log_prob(z) >= log_p - log_evidence + _THIN)
        logs = torch.where(thin, log_p + extra - log_normal - log_evidence, -torch.inf).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        shares.append(float((logs.view(_BLOCKS, _BLOCK).logsumexp(-1) - math.log(_BLOCK)).median().sigmoid()))
    return shares


def _farthest(guide: AutoFlow, loc: Tensor) -> str:
    """The coordinate that tells a point from the guide's draws best, in words."""
    draws, point = guide.flow().sample((1000,)), guide.lift(loc)[0]
    away = ((point - draws.mean(0)) / draws.std(0)).abs().nan_to_num(0.0)
    best = int(away.argmax())
    site = next(s for s in guide.sites if s.start <= best < s.stop)
    value = guide.unpack(point)[site.name]
    if value.numel() != site.size:
        return f"another {site.name}"
    entry = list(map(int, torch.unravel_index(torch.tensor(best - site.start), site.shape))) if site.shape else ""
    return f"{site.name}{entry} = {float(value.flatten()[best - site.start]):.3g}"
