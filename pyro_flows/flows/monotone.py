"""The recipes whose maps have a formula one way only. They stand in the density direction, so a density takes no root, and a sample takes some."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..distributions import Flow
from ..transforms import Elementwise, FlowTransform, OrthogonalLinear
from ..univariate import BernsteinPolynomial, DeepSigmoid, Gaussianization, MixtureCDF, SumOfSquares, UnconstrainedMonotone
from .stacks import autoregressions, check_sizes, couplings, flow_towards_base

__all__ = ["naf", "umnn", "flowpp", "gaussianization", "sos", "bernstein"]


def naf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 3,
    hidden_features: Sequence[int] = (64, 64),
    units: int = 8,
    base: nn.Module | None = None,
) -> Flow:
    """Deep sigmoidal autoregressive layers (NAF).

    Args:
        units: sigmoids in each of the two layers of a coordinate's map.

    Cost: densities take one pass, samples ``dim`` dependent roots. Reference: Neural autoregressive flows (Huang et al., 2018),
    https://arxiv.org/abs/1804.00779
    """
    return flow_towards_base(autoregressions(DeepSigmoid(units), "sampling", dim, context_dim, transforms, hidden_features), dim, base)


def umnn(
    dim: int,
    context_dim: int = 0,
    transforms: int = 3,
    hidden_features: Sequence[int] = (64, 64),
    units: int = 8,
    bound: float = 4.0,
    base: nn.Module | None = None,
) -> Flow:
    """Autoregressive layers that integrate positive networks (UMNN).

    Args:
        units: hidden units of the integrand.
        bound: the slope varies inside ``[-bound, bound]`` and is constant outside, so standardise the target.

    Cost: densities take one pass and a quadrature a coordinate, samples ``dim`` dependent roots of such. Reference: Unconstrained monotonic neural
    networks (Wehenkel and Louppe, 2019), https://arxiv.org/abs/1908.05164
    """
    f = UnconstrainedMonotone(units, bound)
    return flow_towards_base(autoregressions(f, "sampling", dim, context_dim, transforms, hidden_features), dim, base)


def flowpp(
    dim: int,
    context_dim: int = 0,
    transforms: int = 4,
    hidden_features: Sequence[int] = (64, 64),
    components: int = 8,
    base: nn.Module | None = None,
) -> Flow:
    """Couplings by CDFs of logistic mixtures, with linear mixing between rounds (Flow++).

    Args:
        components: components of each mixture.

    Cost: densities take one pass, samples one pass and one root a layer. Reference: Flow++ (Ho et al., 2019), https://arxiv.org/abs/1902.00275
    """
    layers = couplings(MixtureCDF(components), dim, context_dim, transforms, hidden_features, mix=True)
    return flow_towards_base(layers, dim, base)


def gaussianization(
    dim: int,
    context_dim: int = 0,
    transforms: int = 6,
    components: int = 8,
    base: nn.Module | None = None,
) -> Flow:
    """Marginals made normal by mixtures of normals, and rotations in turn: no conditioner at all.

    Args:
        components: components of each mixture.

    Cost: densities take one pass, samples one root a layer. Reference: Gaussianization flows (Meng et al., 2020), https://arxiv.org/abs/2003.01941
    """
    layers: list[FlowTransform] = []
    for _ in range(check_sizes(dim, transforms)):
        layers += [OrthogonalLinear(dim), Elementwise(Gaussianization(components), dim, context_dim)]
    return flow_towards_base(layers, dim, base)


def sos(
    dim: int,
    context_dim: int = 0,
    transforms: int = 3,
    hidden_features: Sequence[int] = (64, 64),
    degree: int = 4,
    bound: float = 5.0,
    base: nn.Module | None = None,
) -> Flow:
    """Autoregressive layers of polynomials whose derivative is a sum of squares (SOS).

    Args:
        degree: degree of the polynomials that are squared.
        bound: the polynomials bend ``[-bound, bound]`` and are linear outside, so standardise the target.

    Cost: densities take one pass, samples ``dim`` dependent roots. Reference: Sum-of-squares polynomial flow (Jaini et al., 2019),
    https://arxiv.org/abs/1905.02325
    """
    f = SumOfSquares(degree, bound)
    return flow_towards_base(autoregressions(f, "sampling", dim, context_dim, transforms, hidden_features), dim, base)


def bernstein(
    dim: int,
    context_dim: int = 0,
    transforms: int = 3,
    hidden_features: Sequence[int] = (64, 64),
    degree: int = 12,
    bound: float = 5.0,
    base: nn.Module | None = None,
) -> Flow:
    """Autoregressive layers of Bernstein polynomials.

    Args:
        degree: degree of the polynomials.
        bound: the polynomials bend ``[-bound, bound]`` and are linear outside, so standardise the target.

    Cost: densities take one pass, samples ``dim`` dependent roots. Reference: Robust normalizing flows using Bernstein-type polynomials (Ramasinghe
    et al., 2021), https://arxiv.org/abs/2102.03509
    """
    f = BernsteinPolynomial(degree, bound)
    return flow_towards_base(autoregressions(f, "sampling", dim, context_dim, transforms, hidden_features), dim, base)
