"""Base distributions as modules, so that they move between devices and dtypes with their flow."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError

__all__ = ["Gaussian", "StudentT"]


def _check_dim(name: str, dim: int) -> int:
    if not isinstance(dim, int) or dim < 1:
        raise ShapeError(f"{name}: dim must be a positive integer, got {dim!r}")
    return dim


class Gaussian(nn.Module):
    """The standard normal distribution on ``R^dim``; calling it gives the Pyro distribution.

    Args:
        dim: number of coordinates.

    Example:
        >>> Gaussian(3)().event_shape
        torch.Size([3])
    """

    zero: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = _check_dim("Gaussian", dim)
        self.register_buffer("zero", torch.zeros(dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero), validate_args=False).to_event(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class StudentT(nn.Module):
    """Independent Student-t coordinates with fixed degrees of freedom, for heavy-tailed targets; calling it gives the Pyro distribution.

    Args:
        dim: number of coordinates.
        df: degrees of freedom, positive; one number or one a coordinate, shape ``(dim,)``.

    Reference: Tails of Lipschitz triangular flows (Jaini et al., 2020), https://arxiv.org/abs/1907.04481
    """

    df: Tensor

    def __init__(self, dim: int, df: float | Tensor = 5.0) -> None:
        super().__init__()
        self.dim = _check_dim("StudentT", dim)
        df = torch.as_tensor(df, dtype=torch.get_default_dtype())
        if df.shape not in (torch.Size(), torch.Size([dim])):
            raise ShapeError(f"StudentT: df must be a number or have shape ({dim},), got {tuple(df.shape)}")
        if not bool((df > 0).all()):
            raise OptionError("StudentT: df must be positive")
        self.register_buffer("df", df.expand(dim).clone())

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        zero = torch.zeros_like(self.df)
        return dist.StudentT(self.df, zero, zero + 1, validate_args=False).to_event(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
