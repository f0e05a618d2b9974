"""A look round directions and angles for modes that a trained guide does not draw."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..guides import AutoFlow
from ..guides.sites import LatentSite
from ..manifolds import Sphere, Torus
from .log_joint import LogJoint

__all__ = ["overlooked"]

_THIN = 0.05  # of the density that there should be: a guide with less overlooks the point
_FROM = 5  # draws that looks start from
_LEAST, _MOST = 64, 1024  # points around each, for one direction or angle
_ALL = 4096  # points around each for all of them, about


@torch.no_grad()
def overlooked(guide: AutoFlow, log_joint: LogJoint) -> dict[str, float]:
    """How much of the posterior of each site's directions and angles a guide has next to nothing of, when nothing else moves.

    From draws of the guide one direction or angle goes all round. Over these points both densities are distributions; what the guide overlooks is
    the posterior's share of points where the guide has less than a twentieth of what it should have. Modes that open only when other
    coordinates move too are not seen, nor ones that lie between the points.

    Args:
        guide: a guide, set up.
        log_joint: the model's log joint density over the guide's vector.

    Returns:
        By site, the worst share among its directions or angles; sites of numbers are left out.

    Cost: 4096 evaluations of model and flow for a direction or an angle, less for each where there are more than four, 256 at least.
    """
    found: dict[str, float] = {}
    indices = {s.name: torch.arange(s.start, s.stop).split(_numbers(s)) for s in guide.sites if s.manifold is not None}
    if not indices:
        return found
    flow = guide.flow()
    draws, count = flow.sample((_FROM,)), min(_MOST, max(_LEAST, _ALL // sum(map(len, indices.values()))))
    for name, runs in indices.items():
        shares = []
        for index in runs:
            points = torch.stack([_all_round(z, index, count) for z in draws])
            values = (f(points.flatten(0, 1)).view(_FROM, count) for f in (log_joint, flow.log_prob))
            p, q = (v.nan_to_num(nan=-torch.inf, neginf=-torch.inf).log_softmax(-1) for v in values)
            shares.append((p.exp() * (q < p + math.log(_THIN))).nansum(-1).median())
        found[name] = float(torch.stack(shares).max())
    return found


def _numbers(site: LatentSite) -> int:
    """How many coordinates one direction or angle of a site has."""
    return site.manifold.n if isinstance(site.manifold, Sphere) else 1


def _all_round(z: Tensor, index: Tensor, count: int) -> Tensor:
    """Copies of a point whose direction or angle is itself, its antipode, and others all round, ``(count, d)``."""
    own = z[index]
    if len(index) == 1:
        values = Torus(1).project(own + torch.arange(count).to(own).unsqueeze(-1) * (2 * math.pi / count))
    else:
        values = torch.cat([own[None], -own[None], Sphere(len(index)).random_uniform((count - 2,)).to(own)])
    points = z.repeat(count, 1)
    points[:, index] = values
    return points
