"""The recipes whose maps have formulas both ways: shifts, scales and splines; and the stacks that all recipes are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..distributions import Flow, GaussianMixture
from ..errors import OptionError, ShapeError
from ..transforms import Affine as Scale
from ..transforms import Autoregressive, Compose, Coupling, Embedded, FlowTransform, LULinear, Permutation
from ..univariate import Affine, RationalQuadraticSpline, Shift, Univariate

__all__ = ["nice", "realnvp", "maf", "iaf", "nsf", "nsf_ar", "cinn", "flow_gmm"]


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


def _flow(layers: list[FlowTransform], dim: int, base: nn.Module | None, compile: bool) -> Flow:
    return Flow(dim if base is None else base, Compose(layers), compile)


def nice(
    dim: int,
    context_dim: int = 0,
    transforms: int = 4,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
    compile: bool = False,
) -> Flow:
    """Additive couplings, then one diagonal scale (NICE): volume-preserving but for the scale.

    Args:
        transforms: number of couplings; with ``dim > 1`` at least two are needed to move every coordinate, and the scale moves all.
        hidden_features: widths of each conditioner.

    Cost: one pass for samples and for densities. Reference: NICE (Dinh et al., 2014), https://arxiv.org/abs/1410.8516
    """
    return _flow([*_couplings(Shift(), dim, context_dim, transforms, hidden_features), Scale(dim, context_dim)], dim, base, compile)


def realnvp(
    dim: int,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
    compile: bool = False,
) -> Flow:
    """Affine couplings (RealNVP).

    Args:
        transforms: number of couplings, two for each round over all coordinates.
        hidden_features: widths of each conditioner.

    Cost: one pass for samples and for densities. Reference: Density estimation using real NVP (Dinh et al., 2016), https://arxiv.org/abs/1605.08803
    """
    return _flow(_couplings(Affine(), dim, context_dim, transforms, hidden_features), dim, base, compile)


def nsf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    base: nn.Module | None = None,
    compile: bool = False,
) -> Flow:
    """Rational-quadratic spline couplings with linear mixing between rounds (NSF, coupling).

    Args:
        transforms: number of couplings, two for each round over all coordinates.
        hidden_features: widths of each conditioner.
        bins: bins of each spline.
        bound: the splines bend ``[-bound, bound]``; outside they are the identity, so standardise the target.

    Cost: one pass for samples and for densities. Reference: Neural spline flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032
    """
    spline = RationalQuadraticSpline(bins, bound)
    return _flow(_couplings(spline, dim, context_dim, transforms, hidden_features, mix=True), dim, base, compile)


def maf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
    compile: bool = False,
) -> Flow:
    """Affine autoregressive layers whose density takes one pass (MAF).

    Args:
        hidden_features: widths of each conditioner.

    Cost: densities take one pass, samples ``dim`` dependent steps. Reference: Masked autoregressive flow (Papamakarios et al., 2017),
    https://arxiv.org/abs/1705.07057
    """
    return _flow(_autoregressions(Affine(), "density", dim, context_dim, transforms, hidden_features), dim, base, compile)


def iaf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
    compile: bool = False,
) -> Flow:
    """Affine autoregressive layers whose samples take one pass (IAF).

    Args:
        hidden_features: widths of each conditioner.

    Cost: samples take one pass, densities of given points ``dim`` dependent steps. Reference: Improved variational inference with inverse
    autoregressive flow (Kingma et al., 2016), https://arxiv.org/abs/1606.04934
    """
    return _flow(_autoregressions(Affine(), "sampling", dim, context_dim, transforms, hidden_features), dim, base, compile)


def nsf_ar(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    bins: int = 8,
    bound: float = 5.0,
    base: nn.Module | None = None,
    compile: bool = False,
) -> Flow:
    """Rational-quadratic spline autoregressive layers whose density takes one pass (NSF, autoregressive).

    Args:
        hidden_features: widths of each conditioner.
        bins: bins of each spline.
        bound: the splines bend ``[-bound, bound]``; outside they are the identity, so standardise the target.

    Cost: densities take one pass, samples ``dim`` dependent steps. Reference: Neural spline flows (Durkan et al., 2019),
    https://arxiv.org/abs/1906.04032
    """
    spline = RationalQuadraticSpline(bins, bound)
    return _flow(_autoregressions(spline, "density", dim, context_dim, transforms, hidden_features), dim, base, compile)


def cinn(
    dim: int,
    context_dim: int = 0,
    features: nn.Module | None = None,
    feature_dim: int = 32,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    univariate: Univariate | None = None,
    base: nn.Module | None = None,
    compile: bool = False,
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
        return _flow(layers, dim, base, compile)
    if features is None:
        features = nn.Sequential(nn.Linear(context_dim, 64), nn.SiLU(), nn.Linear(64, feature_dim))
    return Flow(dim if base is None else base, Embedded(Compose(layers), features, context_dim), compile)


def flow_gmm(
    dim: int,
    components: int,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    trainable: bool = True,
    compile: bool = False,
) -> Flow:
    """Affine couplings on a Gaussian mixture, one component a class (FlowGMM).

    ``pf.fit_density(flow, x, labels=labels)`` trains it on rows of which some or all have a label. Then
    ``flow.base.component_log_prob(flow.transform.inv(x))`` scores the classes of new rows.

    Args:
        components: number of components of the base.
        trainable: whether the components' means, scales and weights are learned.

    Cost: one pass for samples and for densities. Reference: Semi-supervised learning with normalizing flows (Izmailov et al., 2019),
    https://arxiv.org/abs/1912.13025
    """
    base = GaussianMixture(dim, components, trainable=trainable)
    return _flow(_couplings(Affine(), dim, context_dim, transforms, hidden_features), dim, base, compile)
