"""The contract of transforms whose points live on a manifold: that of every transform, with points checked to lie there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..transforms import FlowTransform
from .manifold import Manifold

__all__ = ["ManifoldTransform"]


class OnManifold:
    """Added to a transform: its domain is a manifold, and so is its codomain. Comes before it among the bases."""

    def _live_on(self, manifold: Manifold) -> None:
        self.manifold = manifold
        self.domain = self.codomain = manifold.support


class ManifoldTransform(OnManifold, FlowTransform):
    r"""A bijection of a manifold, conditional on a context when ``context_dim > 0``.

    Points are vectors of ``manifold.size`` coordinates, and the log-determinant is the log ratio of volumes :math:`\log\,dV(y)/dV(x)` under the
    manifold's measure. So a :class:`~pyro_flows.distributions.Flow` from a base density under that measure has its density under the same.

    Args:
        manifold: where the points live.
        context_dim: size of the context vector; 0 for an unconditional transform.

    Raises:
        SupportError: a point does not lie on the manifold; the message says how far from it (not inside traced graphs, which cannot look).
    """

    def __init__(self, manifold: Manifold, context_dim: int = 0) -> None:
        super().__init__(manifold.size, context_dim)
        self._live_on(manifold)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in double precision, where the device has it: points near a pole are differences of nearly equal numbers."""
    return tuple(t if t.device.type == "mps" else t.to(torch.float64) for t in tensors)
