"""The differential volume ratio of any smooth map, by automatic differentiation: the referee of every formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ..errors import OptionError
from ..numerics import batch_jacobian
from ..numerics.factors import log_abs_det
from .manifold import Manifold

__all__ = ["volume_ratio", "log_volume_ratio"]

Map = Callable[[Tensor], Tensor]


def log_volume_ratio(f: Map, x: Tensor, manifold: Manifold, method: Literal["homogeneous", "tangent"] = "homogeneous") -> Tensor:
    r"""The log of how much a map of a manifold into itself changes volumes, :math:`\log R_f(x) = \log\,|dV(f(x)) / dV(x)|`.

    A density moves by :math:`\log p_Y(f(x)) = \log p_X(x) - \log R_f(x)`, and ratios of maps in a row add up.

    Args:
        f: the map, on batches ``(*batch, size)``; rows do not influence each other.
        x: points of the manifold.
        manifold: which one.
        method: ``"homogeneous"``, the determinant of the Jacobian of :math:`z \mapsto r(z) f(z / r(z))`, with :math:`r` the norm on spheres and
            the sum on simplices, accurate near the edges too; or ``"tangent"``, :math:`|\det T_{f(x)}^\top F_x T_x|` with orthonormal tangent bases.

    Returns:
        ``(*batch,)``; differentiable, so that it can stand in for the log-determinant of a transform that has no formula.

    Cost: ``size`` vector-Jacobian products and a determinant.

    Raises:
        OptionError: an unknown method.

    Example:
        >>> import torch
        >>> from pyro_flows.manifolds import Sphere
        >>> x = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
        >>> c = torch.tensor([0.5, 0.0], dtype=torch.float64)
        >>> f = lambda x: Sphere(2).project(x + c)
        >>> round(log_volume_ratio(f, x, Sphere(2)).exp().item(), 6), round(((1 + x @ c) / (x + c).norm() ** 2).item(), 6)
        (0.702703, 0.702703)
    """
    if method == "homogeneous":

        def extended(z: Tensor) -> Tensor:
            r = manifold.radius(z)
            return r * f(z / r)

        return log_abs_det(batch_jacobian(extended, x))
    if method == "tangent":
        there = manifold.tangent_basis(f(x).detach())
        return log_abs_det(there.mT @ batch_jacobian(f, x) @ manifold.tangent_basis(x))
    raise OptionError(f'volume_ratio: method must be "homogeneous" or "tangent", got {method!r}')


def volume_ratio(f: Map, x: Tensor, manifold: Manifold, method: Literal["homogeneous", "tangent"] = "homogeneous") -> Tensor:
    r"""The factor :math:`R_f(x)` by which a map of a manifold into itself changes volumes: see :func:`log_volume_ratio`."""
    return log_volume_ratio(f, x, manifold, method).exp()
