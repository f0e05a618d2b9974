"""The recipes of manifolds: directions, compositions and angles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..distributions import Flow
from ..manifolds import (
    AxisFlow,
    NormalizedAffine,
    NormalizedLinear,
    Simplex,
    SimplexFlow,
    Sphere,
    Torus,
    TorusCoupling,
    Uniform,
)
from ..nets.mlp import check_widths
from ..transforms import Compose, Embedded, FlowTransform, LULinear
from ..univariate import CircularSpline, RationalQuadraticSpline, Univariate
from .stacks import check_sizes, couplings

__all__ = ["sphere", "simplex", "torus"]


def sphere(
    n: int,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    bins: int = 8,
    antipodal: bool = False,
    base: nn.Module | None = None,
) -> Flow:
    """Densities on the sphere of ``R^n`` under surface measure: normalised affine maps and flows along free axes, in turn.

    Args:
        n: number of coordinates of a point.
        transforms: number of rounds, an affine map and an axis each.
        hidden_features: widths of the network that a context goes through.
        bins: bins of each axis' spline.
        antipodal: whether ``x`` and ``-x`` have the same density: for axes; and with ``n=4`` for rotations, as unit quaternions (the density under
            the uniform distribution of rotations is then that on the sphere times its area ``2 pi^2``).
        base: a base on the sphere, uniform by default: a module with attributes ``dim`` and ``manifold`` whose call gives a distribution there. It
            may have parameters, such as the concentration of a :class:`~pyro_flows.manifolds.PowerSpherical`, which are then trained with the rest.

    Cost: one pass for samples and for densities, all formulas. Example:
        >>> flow = sphere(3)
        >>> x = flow().sample((5,))
        >>> flow().log_prob(x).exp() * 4 * torch.pi  # not trained: uniform
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000], grad_fn=...)
    """
    features, widths = _features(context_dim, hidden_features)
    layers: list[FlowTransform] = []
    for _ in range(check_sizes(n, transforms)):
        layers += [(NormalizedLinear if antipodal else NormalizedAffine)(n, widths), AxisFlow(n, widths, bins, antipodal)]
    inner: FlowTransform = Compose(layers)
    return Flow(base or Uniform(Sphere(n)), inner if features is None else Embedded(inner, features, context_dim))


def _features(context_dim: int, hidden_features: Sequence[int]) -> tuple[nn.Module | None, int]:
    """A network of the context, whose last layer does not start at zero: what it conditions does."""
    if not context_dim:
        return None, 0
    widths = check_widths(hidden_features)
    if not widths:
        return None, context_dim
    layers = [part for a, b in zip((context_dim, *widths), widths, strict=False) for part in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*layers), widths[-1]


def simplex(
    n: int,
    context_dim: int = 0,
    transforms: int = 4,
    hidden_features: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    chart: str = "ilr",
    base: nn.Module | None = None,
) -> Flow:
    """Densities of compositions of ``n`` parts, under Lebesgue measure of the first ``n - 1``: spline couplings and linear maps of log-ratios.

    Args:
        n: number of parts.
        transforms: number of couplings.
        hidden_features: widths of each conditioner.
        bins, bound: bins of the splines, and the size of a log-ratio up to which they bend.
        chart: coordinates, ``"ilr"``, ``"alr"`` or ``"stick_breaking"``.
        base: a base on the simplex, uniform by default.

    Cost: one pass for samples and for densities.
    """
    where = Simplex(n)
    layers = couplings(RationalQuadraticSpline(bins, bound), n - 1, context_dim, transforms, hidden_features, mix=True)
    return Flow(base or Uniform(where), SimplexFlow([*layers, LULinear(n - 1)], chart))


def torus(
    d: int,
    context_dim: int = 0,
    transforms: int = 4,
    hidden_features: Sequence[int] = (64, 64),
    bins: int = 8,
    univariate: Univariate | None = None,
    base: nn.Module | None = None,
) -> Flow:
    """Densities of ``d`` angles: couplings of circular splines whose conditioners see cosines and sines.

    Args:
        d: number of angles, in ``[-pi, pi]``.
        transforms: number of couplings; with ``d > 1`` at least two are needed to move every angle.
        hidden_features: widths of each conditioner.
        bins: bins of the splines.
        univariate: another map of the circle, such as ``MobiusMixture(8)``, which is smooth.
        base: a base on the torus, uniform by default.

    Cost: one pass for samples and for densities. Reference: Normalizing flows on tori and spheres (Rezende et al., 2020),
    https://arxiv.org/abs/2002.02428
    """
    f, index, bits = univariate or CircularSpline(bins), torch.arange(d), max(1, (d - 1).bit_length())
    layers: list[FlowTransform] = []
    for i in range(check_sizes(d, transforms)):
        # Angles that differ in a binary digit of their index are on different sides in its round.
        side = (index >> (i // 2 % bits)) % 2 == i % 2
        layers.append(TorusCoupling(f, d, side if d > 1 else torch.ones(1, dtype=torch.bool), context_dim, hidden_features))
    return Flow(base or Uniform(Torus(d)), Compose(layers))
