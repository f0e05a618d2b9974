"""What a univariate map is: an increasing map of the line, given by a row of unconstrained numbers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ..numerics import invert_monotone

__all__ = ["Univariate", "InvertedByRoot"]


@runtime_checkable
class Univariate(Protocol):
    """An increasing map of the real line with ``num_params`` unconstrained parameters; all-zero parameters give the identity.

    ``forward`` and ``inverse`` are pure: they take points of shape ``(...)`` and parameters of shape ``(..., num_params)``, and return the mapped
    points and the log slope of the map they applied, both of shape ``(...)``. Where the map comes from is a structure's business
    (:class:`~pyro_flows.transforms.Elementwise`, :class:`~pyro_flows.transforms.Coupling`, :class:`~pyro_flows.transforms.Autoregressive`).
    """

    @property
    def num_params(self) -> int:
        """How many unconstrained numbers one coordinate needs."""
        ...

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log dy/dx)``."""
        ...

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log dx/dy)``."""
        ...


class InvertedByRoot:
    """The inverse of a map that has no formula for it: the root of its forward map, with implicit gradients.

    Raises:
        InversionError: a root was not found (see :func:`~pyro_flows.numerics.invert_monotone`).
    """

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = invert_monotone(self.forward, y, params)
        return x, -self.forward(x, params)[1]
