"""What a univariate map is: an increasing map of the line, given by a row of unconstrained numbers."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Univariate"]


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
