"""Two-dimensional targets with known entropy: a centre that depends on uniform numbers, plus normal noise (or none).

Angles are drawn at random: on a grid, as some libraries draw them, points are not independent, and a validation set says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["TOYS", "Toy"]


@dataclass(frozen=True)
class Toy:
    """A target.

    Attributes:
        centre: uniform numbers ``(n, 4)`` to points ``(n, 2)``.
        noise: standard deviation of the normal noise.
        entropy: nats.
    """

    centre: Callable[[Tensor], Tensor]
    noise: float
    entropy: float

    def sample(self, count: int) -> Tensor:
        """Independent draws ``(count, 2)`` from the global random numbers."""
        return self.centre(torch.rand(count, 4)) + self.noise * torch.randn(count, 2)

    def log_prob(self, x: Tensor, nodes: int = 2**15) -> Tensor:
        """Log density of the noisy targets, by quasi-Monte Carlo over the centres: for tests."""
        centres = self.centre(SobolEngine(4, scramble=True, seed=0).draw(nodes))
        scores = -torch.cdist(x, centres) ** 2 / (2 * self.noise**2)
        return scores.logsumexp(-1) - math.log(nodes) - math.log(2 * math.pi * self.noise**2)


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)


def _eight_gaussians(u: Tensor) -> Tensor:
    return _polar(torch.tensor(4 / 1.414), math.pi / 4 * (8 * u[:, 0]).floor())


def _checkerboard(u: Tensor) -> Tensor:
    first = 4 * u[:, 0] - 2
    second = u[:, 1] - 2 * (2 * u[:, 2]).floor() + first.floor() % 2
    return 2 * torch.stack([first, second], -1)


def _two_spirals(u: Tensor) -> Tensor:
    t = 3 * math.pi * u[:, 0].sqrt()
    half = torch.stack([-t.cos() * t, t.sin() * t], -1) + 0.5 * torch.stack([u[:, 1], u[:, 3]], -1)
    return half * (2 * (2 * u[:, 2]).floor() - 1)[:, None] / 3


def _rings(u: Tensor) -> Tensor:
    return _polar(0.75 * (1 + (4 * u[:, 0]).floor()), 2 * math.pi * u[:, 1])


def _circles(u: Tensor) -> Tensor:
    return _polar(1.5 * (1 + (2 * u[:, 0]).floor()), 2 * math.pi * u[:, 1])


def _moons(u: Tensor) -> Tensor:
    side = (2 * u[:, 0]).floor()
    arc = _polar(1 - 2 * side, math.pi * u[:, 1])
    return 2 * (arc + torch.stack([side, 0.5 * side], -1)) - torch.tensor([1.0, 0.2])


def _swissroll(u: Tensor) -> Tensor:
    t = 1.5 * math.pi * (1 + 2 * u[:, 0])
    return _polar(t, t) / 5


def _annulus(u: Tensor) -> Tensor:
    return _polar((1 + 3 * u[:, 0]).sqrt(), 2 * math.pi * u[:, 1])


def _two_squares(u: Tensor) -> Tensor:
    side = 2 * (2 * u[:, 0]).floor() - 1
    return torch.stack([side * (1 + 2 * u[:, 1]), 2 * u[:, 2] - 1], -1)


TOYS = {
    "8gaussians": Toy(_eight_gaussians, 0.5 / 1.414, 2.8319),
    "checkerboard": Toy(_checkerboard, 0.0, math.log(32)),
    "annulus": Toy(_annulus, 0.0, math.log(3 * math.pi)),
    "two squares": Toy(_two_squares, 0.0, math.log(8)),
    "2spirals": Toy(_two_spirals, 0.1, 2.649),
    "rings": Toy(_rings, 0.08, 2.620),
    "moons": Toy(_moons, 0.2, 2.397),
    "circles": Toy(_circles, 0.24, 3.267),
    "swissroll": Toy(_swissroll, 0.2, 2.670),
}
