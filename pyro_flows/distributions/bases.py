"""Base distributions of independent coordinates, as modules, so that they move between devices and dtypes with their flow."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError

__all__ = ["BoxUniform", "Gaussian", "StudentT"]


def check_dim(name: str, dim: int) -> int:
    """The dimension; raises a ``ShapeError`` unless it is a positive integer."""
    if not isinstance(dim, int) or dim < 1:
        raise ShapeError(f"{name}: dim must be a positive integer, got {dim!r}")
    return dim


def coordinates(name: str, option: str, value: float | Tensor, dim: int) -> Tensor:
    """A number, or one a coordinate, as a tensor of shape ``(dim,)``."""
    value = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if value.shape not in (torch.Size(), torch.Size([dim])):
        raise ShapeError(f"{name}: {option} must be a number or have shape ({dim},), got {tuple(value.shape)}")
    return value.expand(dim).clone()


class Gaussian(nn.Module):
    """The standard normal distribution on ``R^dim``, or one with learned means and scales; calling it gives the Pyro distribution.

    Args:
        dim: number of coordinates.
        trainable: whether means and scales are learned, from 0 and 1.

    Example:
        >>> Gaussian(3)().event_shape
        torch.Size([3])
    """

    independent = True  # its coordinates are
    loc: Tensor
    log_scale: Tensor
    zero: Tensor

    def __init__(self, dim: int, trainable: bool = False) -> None:
        super().__init__()
        self.dim, self.trainable = check_dim("Gaussian", dim), trainable
        if trainable:
            self.loc, self.log_scale = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        else:
            self.register_buffer("zero", torch.zeros(dim))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        loc, scale = (self.loc, self.log_scale.exp()) if self.trainable else (self.zero, torch.ones_like(self.zero))
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ", trainable=True" * self.trainable


class StudentT(nn.Module):
    """Independent Student-t coordinates, for heavy-tailed targets; calling it gives the Pyro distribution.

    A Lipschitz flow keeps the tails of its base, so each coordinate may need degrees of freedom of its own.

    Args:
        dim: number of coordinates.
        df: degrees of freedom, positive; one number or one a coordinate, shape ``(dim,)``.
        trainable: whether the degrees of freedom are learned, from ``df``, each coordinate its own.

    Reference: Tails of Lipschitz triangular flows (Jaini et al., 2020), https://arxiv.org/abs/1907.04481
    """

    independent = True  # its coordinates are
    df: Tensor
    log_df: Tensor

    def __init__(self, dim: int, df: float | Tensor = 5.0, trainable: bool = False) -> None:
        super().__init__()
        self.dim, self.trainable = check_dim("StudentT", dim), trainable
        df = coordinates("StudentT", "df", df, dim)
        if not bool((df > 0).all()):
            raise OptionError("StudentT: df must be positive")
        if trainable:
            self.log_df = nn.Parameter(df.log())
        else:
            self.register_buffer("df", df)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        df = self.log_df.exp() if self.trainable else self.df
        zero = torch.zeros_like(df)
        return dist.StudentT(df, zero, zero + 1, validate_args=False).to_event(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ", trainable=True" * self.trainable


class BoxUniform(nn.Module):
    """The uniform distribution on a box; calling it gives the Pyro distribution. Its density is 0 outside, ``-inf`` in logarithms.

    Maximum likelihood needs every point inside: put a transform whose inverse ends in the box behind it.

    Args:
        dim: number of coordinates.
        low, high: the sides; each one number or one a coordinate, shape ``(dim,)``.

    Example:
        >>> BoxUniform(2, -1.0, 1.0)().log_prob(torch.zeros(2)).exp()
        tensor(0.2500)
    """

    independent = True  # its coordinates are
    low: Tensor
    high: Tensor

    def __init__(self, dim: int, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> None:
        super().__init__()
        self.dim = check_dim("BoxUniform", dim)
        self.register_buffer("low", coordinates("BoxUniform", "low", low, dim))
        self.register_buffer("high", coordinates("BoxUniform", "high", high, dim))
        if not bool((self.low < self.high).all()):
            raise OptionError("BoxUniform: low must be below high")

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Uniform(self.low, self.high, validate_args=False).to_event(1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
