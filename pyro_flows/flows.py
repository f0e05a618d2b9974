"""Recipes: one short function for each published architecture, returning a :class:`~pyro_flows.distributions.Flow`.

Options that mean the same carry the same name everywhere. Stacks alternate complementary masks, or an order and its reverse, so every coordinate is
transformed. Each starts at the identity: the flow is its base until it is trained. All take

- ``dim``: number of coordinates; ``context_dim``: size of the context, 0 for none;
- ``transforms``: number of layers;
- ``base``: base module, standard normal by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from .distributions import Flow
from .errors import OptionError, ShapeError
from .transforms import Affine as Scale
from .transforms import Autoregressive, BlockAutoregressive, Compose, Coupling, FlowTransform, LULinear, Permutation, Planar, Radial, Sylvester
from .transforms.embedded import Embedded
from .transforms.residual import ContractiveResidual
from .univariate import Affine, RationalQuadraticSpline, Shift, Univariate

__all__ = ["nice", "realnvp", "maf", "iaf", "nsf", "nsf_ar", "planar", "radial", "sylvester", "bnaf", "residual", "cinn"]


def _count(dim: int, transforms: int) -> int:
    if not isinstance(dim, int) or dim < 1:
        raise ShapeError(f"dim must be a positive integer, got {dim!r}")
    if not isinstance(transforms, int) or transforms < 1:
        raise OptionError(f"transforms must be a positive integer, got {transforms!r}")
    return transforms


def _couplings(
    univariate: Univariate, dim: int, context_dim: int, transforms: int, hidden_features: Sequence[int], mix: bool = False
) -> list[FlowTransform]:
    """Couplings of the first half and the second in turn, with a riffle after each round and the original order at the end.

    A riffle (even places, then odd ones) puts any two coordinates in different halves after a few rounds, so that each can depend on each; and
    contiguous halves are slices, which cost nothing to take apart and join.
    """
    transforms = _count(dim, transforms)
    first = torch.arange(dim) < (dim + 1) // 2
    riffle = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])
    order = torch.arange(dim)
    layers: list[FlowTransform] = []
    for i in range(transforms):
        layers.append(Coupling(univariate, dim, first if i % 2 == 0 or dim == 1 else ~first, context_dim, hidden_features))
        if i % 2 == 1 and i + 1 < transforms and dim > 1:
            if mix:
                layers.append(LULinear(dim))
            if dim > 2:
                layers.append(Permutation(riffle))
                order = order[riffle]
    if not torch.equal(order, torch.arange(dim)):
        layers.append(Permutation(order.argsort()))
    return layers


def _autoregressions(
    univariate: Univariate, direction: str, dim: int, context_dim: int, transforms: int, hidden_features: Sequence[int]
) -> list[FlowTransform]:
    transforms = _count(dim, transforms)
    order = torch.arange(dim)
    return [
        Autoregressive(univariate, dim, direction, order if i % 2 == 0 else order.flip(0), context_dim, hidden_features)  # type: ignore[arg-type]
        for i in range(transforms)
    ]


def _alternating(layers: list[FlowTransform], dim: int) -> list[FlowTransform]:
    """The same layers, every second one on the coordinates in reverse order."""
    flip = torch.arange(dim).flip(0)
    return [part for i, layer in enumerate(layers) for part in ((Permutation(flip), layer, Permutation(flip)) if i % 2 else (layer,))]


def _flow(layers: list[FlowTransform], dim: int, base: nn.Module | None) -> Flow:
    return Flow(dim if base is None else base, Compose(layers))


def nice(
    dim: int, context_dim: int = 0, transforms: int = 4, hidden_features: Sequence[int] = (64, 64), base: nn.Module | None = None
) -> Flow:
    """Additive couplings, then one diagonal scale (NICE): volume-preserving but for the scale.

    Args:
        dim: number of coordinates.
        context_dim: size of the context; 0 for none.
        transforms: number of couplings; with ``dim > 1`` at least two are needed to move every coordinate, and the scale moves all.
        hidden_features: widths of each conditioner.
        base: base module; standard normal by default.

    Cost: one pass for samples and for densities. Reference: NICE (Dinh et al., 2014), https://arxiv.org/abs/1410.8516
    """
    return _flow([*_couplings(Shift(), dim, context_dim, transforms, hidden_features), Scale(dim, context_dim)], dim, base)


def realnvp(
    dim: int, context_dim: int = 0, transforms: int = 6, hidden_features: Sequence[int] = (64, 64), base: nn.Module | None = None
) -> Flow:
    """Affine couplings (RealNVP).

    Args:
        dim: number of coordinates.
        context_dim: size of the context; 0 for none.
        transforms: number of couplings, two for each round over all coordinates.
        hidden_features: widths of each conditioner.
        base: base module; standard normal by default.

    Cost: one pass for samples and for densities. Reference: Density estimation using real NVP (Dinh et al., 2016), https://arxiv.org/abs/1605.08803
    """
    return _flow(_couplings(Affine(), dim, context_dim, transforms, hidden_features), dim, base)


def nsf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    base: nn.Module | None = None,
) -> Flow:
    """Rational-quadratic spline couplings with linear mixing between rounds (NSF, coupling).

    Args:
        dim: number of coordinates.
        context_dim: size of the context; 0 for none.
        transforms: number of couplings, two for each round over all coordinates.
        hidden_features: widths of each conditioner.
        bins: bins of each spline.
        bound: the splines bend ``[-bound, bound]``; outside they are the identity, so standardise the target.
        base: base module; standard normal by default.

    Cost: one pass for samples and for densities. Reference: Neural spline flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032
    """
    spline = RationalQuadraticSpline(bins, bound)
    return _flow(_couplings(spline, dim, context_dim, transforms, hidden_features, mix=True), dim, base)


def maf(
    dim: int, context_dim: int = 0, transforms: int = 5, hidden_features: Sequence[int] = (64, 64), base: nn.Module | None = None
) -> Flow:
    """Affine autoregressive layers whose density takes one pass (MAF).

    Args:
        dim: number of coordinates.
        context_dim: size of the context; 0 for none.
        transforms: number of layers.
        hidden_features: widths of each conditioner.
        base: base module; standard normal by default.

    Cost: densities take one pass, samples ``dim`` dependent steps. Reference: Masked autoregressive flow (Papamakarios et al., 2017),
    https://arxiv.org/abs/1705.07057
    """
    return _flow(_autoregressions(Affine(), "density", dim, context_dim, transforms, hidden_features), dim, base)


def iaf(
    dim: int, context_dim: int = 0, transforms: int = 5, hidden_features: Sequence[int] = (64, 64), base: nn.Module | None = None
) -> Flow:
    """Affine autoregressive layers whose samples take one pass (IAF).

    Args:
        dim: number of coordinates.
        context_dim: size of the context; 0 for none.
        transforms: number of layers.
        hidden_features: widths of each conditioner.
        base: base module; standard normal by default.

    Cost: samples take one pass, densities of given points ``dim`` dependent steps. Reference: Improved variational inference with inverse
    autoregressive flow (Kingma et al., 2016), https://arxiv.org/abs/1606.04934
    """
    return _flow(_autoregressions(Affine(), "sampling", dim, context_dim, transforms, hidden_features), dim, base)


def nsf_ar(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    base: nn.Module | None = None,
) -> Flow:
    """Rational-quadratic spline autoregressive layers whose density takes one pass (NSF, autoregressive).

    Args:
        dim: number of coordinates.
        context_dim: size of the context; 0 for none.
        transforms: number of layers.
        hidden_features: widths of each conditioner.
        bins: bins of each spline.
        bound: the splines bend ``[-bound, bound]``; outside they are the identity, so standardise the target.
        base: base module; standard normal by default.

    Cost: densities take one pass, samples ``dim`` dependent steps. Reference: Neural spline flows (Durkan et al., 2019),
    https://arxiv.org/abs/1906.04032
    """
    spline = RationalQuadraticSpline(bins, bound)
    return _flow(_autoregressions(spline, "density", dim, context_dim, transforms, hidden_features), dim, base)


def planar(
    dim: int, context_dim: int = 0, transforms: int = 16, activation: Literal["tanh", "leaky_relu"] = "tanh", base: nn.Module | None = None
) -> Flow:
    """Planar layers: each bends space along one direction.

    Args:
        activation: the shape of the bend, ``"tanh"`` or ``"leaky_relu"``.

    Cost: samples take one pass; densities one scalar equation a layer for tanh, one pass for leaky ReLU. Reference: Variational inference with
    normalizing flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
    """
    return _flow([Planar(dim, context_dim, activation) for _ in range(_count(dim, transforms))], dim, base)


def radial(dim: int, context_dim: int = 0, transforms: int = 16, base: nn.Module | None = None) -> Flow:
    """Radial layers: each pushes points away from a centre, or pulls them to it.

    Cost: one pass for samples and for densities. Reference: Variational inference with normalizing flows (Rezende & Mohamed, 2015),
    https://arxiv.org/abs/1505.05770
    """
    return _flow([Radial(dim, context_dim) for _ in range(_count(dim, transforms))], dim, base)


def sylvester(
    dim: int,
    context_dim: int = 0,
    transforms: int = 4,
    rank: int | None = None,
    basis: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
    base: nn.Module | None = None,
) -> Flow:
    """Sylvester layers: each bends space along several directions at once.

    Args:
        rank: directions of each layer; all ``dim`` by default.
        basis: how the directions are made; ``"triangular"`` takes the coordinates themselves, reversed in every second layer.

    Cost: samples take one pass, densities of given points ``rank`` dependent scalar equations a layer. Reference: Sylvester normalizing flows for
    variational inference (van den Berg et al., 2018), https://arxiv.org/abs/1803.05649
    """
    layers: list[FlowTransform] = [Sylvester(dim, rank, context_dim, basis) for _ in range(_count(dim, transforms))]
    return _flow(_alternating(layers, dim) if basis == "triangular" else layers, dim, base)


def bnaf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 2,
    hidden_factors: Sequence[int] = (8, 8),
    direction: Literal["density", "sampling"] = "density",
    base: nn.Module | None = None,
) -> Flow:
    """Block autoregressive networks, in an order and its reverse (BNAF).

    Args:
        hidden_factors: units of each hidden layer, per coordinate.
        direction: ``"density"`` or ``"sampling"``: which takes one pass.

    Cost: one pass in the named direction; ``dim`` dependent scalar equations a network in the other. Reference: Block neural autoregressive flow
    (De Cao et al., 2019), https://arxiv.org/abs/1904.04676
    """
    if direction not in ("density", "sampling"):
        raise OptionError(f'bnaf: direction must be "density" or "sampling", got {direction!r}')
    layers = [BlockAutoregressive(dim, hidden_factors, context_dim) for _ in range(_count(dim, transforms))]
    return _flow(_alternating([f.inv if direction == "density" else f for f in layers], dim), dim, base)


def residual(
    dim: int,
    context_dim: int = 0,
    transforms: int = 8,
    hidden_features: Sequence[int] = (64, 64),
    lipschitz: float = 0.97,
    direction: Literal["density", "sampling"] = "density",
    base: nn.Module | None = None,
) -> Flow:
    """Contractive residual layers, whose Jacobians are full (i-ResNet, Residual Flow); above 8 coordinates the density is estimated.

    Args:
        lipschitz: bound of each net's Lipschitz constant, below 1.

    Cost: one pass and a log-det in the direction named, ``"density"`` or ``"sampling"``; a fixed point of 10 to 40 passes a layer in the other.
    Reference: Residual flows (Chen et al., 2019), https://arxiv.org/abs/1906.02735
    """
    return _flow([ContractiveResidual(dim, context_dim, direction, hidden_features, lipschitz) for _ in range(_count(dim, transforms))], dim, base)


def cinn(
    dim: int,
    context_dim: int = 0,
    features: nn.Module | None = None,
    feature_dim: int = 32,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    univariate: Univariate | None = None,
    base: nn.Module | None = None,
) -> Flow:
    """Couplings on features of the context, learned with the flow (cINN); without a context, the couplings alone.

    Args:
        features: network from ``(N, context_dim)`` to ``(N, feature_dim)``, see :class:`~pyro_flows.transforms.Embedded`; an MLP by default.
        univariate: the couplings' map; affine (a conditional RealNVP) by default, ``RationalQuadraticSpline()`` for a conditional NSF.

    Cost: one pass both ways, and one of the feature network. Reference: cINN (Ardizzone et al., 2019), https://arxiv.org/abs/1907.02392
    """
    if context_dim < 0:
        raise ShapeError(f"context_dim must be a non-negative integer, got {context_dim!r}")
    layers = _couplings(univariate or Affine(), dim, feature_dim if context_dim else 0, transforms, hidden_features, mix=True)
    if not context_dim:
        return _flow(layers, dim, base)
    if features is None:
        features = nn.Sequential(nn.Linear(context_dim, 64), nn.SiLU(), nn.Linear(64, feature_dim))
    return Flow(dim if base is None else base, Embedded(Compose(layers), features, context_dim))
