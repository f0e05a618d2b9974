"""The recipes whose maps have formulas both ways: shifts, scales and splines."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..distributions import Flow, GaussianMixture
from ..errors import ShapeError
from ..transforms import Affine as Scale
from ..transforms import Compose, Embedded
from ..univariate import Affine, RationalQuadraticSpline, Shift, Univariate
from .stacks import autoregressions, couplings, flow_of

__all__ = ["nice", "realnvp", "maf", "iaf", "nsf", "nsf_ar", "cinn", "flow_gmm"]


def nice(
    dim: int,
    context_dim: int = 0,
    transforms: int = 4,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
) -> Flow:
    """Additive couplings, then one diagonal scale (NICE): volume-preserving but for the scale.

    Args:
        transforms: number of couplings; with ``dim > 1`` at least two are needed to move every coordinate, and the scale moves all.
        hidden_features: widths of each conditioner.

    Cost: one pass for samples and for densities. Reference: NICE (Dinh et al., 2014), https://arxiv.org/abs/1410.8516
    """
    return flow_of([*couplings(Shift(), dim, context_dim, transforms, hidden_features), Scale(dim, context_dim)], dim, base)


def realnvp(
    dim: int,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
) -> Flow:
    """Affine couplings (RealNVP).

    Args:
        transforms: number of couplings, two for each round over all coordinates.
        hidden_features: widths of each conditioner.

    Cost: one pass for samples and for densities. Reference: Density estimation using real NVP (Dinh et al., 2016), https://arxiv.org/abs/1605.08803
    """
    return flow_of(couplings(Affine(), dim, context_dim, transforms, hidden_features), dim, base)


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
        transforms: number of couplings, two for each round over all coordinates.
        hidden_features: widths of each conditioner.
        bins: bins of each spline.
        bound: the splines bend ``[-bound, bound]``; outside they are the identity, so standardise the target.

    Cost: one pass for samples and for densities. Reference: Neural spline flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032
    """
    spline = RationalQuadraticSpline(bins, bound)
    return flow_of(couplings(spline, dim, context_dim, transforms, hidden_features, mix=True), dim, base)


def maf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
) -> Flow:
    """Affine autoregressive layers whose density takes one pass (MAF).

    Args:
        hidden_features: widths of each conditioner.

    Cost: densities take one pass, samples ``dim`` dependent steps. Reference: Masked autoregressive flow (Papamakarios et al., 2017),
    https://arxiv.org/abs/1705.07057
    """
    return flow_of(autoregressions(Affine(), "density", dim, context_dim, transforms, hidden_features), dim, base)


def iaf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 5,
    hidden_features: Sequence[int] = (64, 64),
    base: nn.Module | None = None,
) -> Flow:
    """Affine autoregressive layers whose samples take one pass (IAF).

    Args:
        hidden_features: widths of each conditioner.

    Cost: samples take one pass, densities of given points ``dim`` dependent steps. Reference: Improved variational inference with inverse
    autoregressive flow (Kingma et al., 2016), https://arxiv.org/abs/1606.04934
    """
    return flow_of(autoregressions(Affine(), "sampling", dim, context_dim, transforms, hidden_features), dim, base)


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
        hidden_features: widths of each conditioner.
        bins: bins of each spline.
        bound: the splines bend ``[-bound, bound]``; outside they are the identity, so standardise the target.

    Cost: densities take one pass, samples ``dim`` dependent steps. Reference: Neural spline flows (Durkan et al., 2019),
    https://arxiv.org/abs/1906.04032
    """
    spline = RationalQuadraticSpline(bins, bound)
    return flow_of(autoregressions(spline, "density", dim, context_dim, transforms, hidden_features), dim, base)


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
    layers = couplings(univariate or Affine(), dim, feature_dim if context_dim else 0, transforms, hidden_features, mix=True)
    if not context_dim:
        return flow_of(layers, dim, base)
    if features is None:
        features = nn.Sequential(nn.Linear(context_dim, 64), nn.SiLU(), nn.Linear(64, feature_dim))
    return Flow(dim if base is None else base, Embedded(Compose(layers), features, context_dim))


def flow_gmm(
    dim: int,
    components: int,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    trainable: bool = True,
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
    return flow_of(couplings(Affine(), dim, context_dim, transforms, hidden_features), dim, base)
