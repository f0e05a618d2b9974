"""Coordinates of the simplex: bijections of R^(n-1) onto compositions, which work with logarithms of the parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn import functional as F

from .geometry import Simplex, helmert

__all__ = ["ILR", "ALR", "StickBreaking", "positive_exp"]


def positive_exp(log_p: Tensor) -> Tensor:
    """``exp``, with the smallest normal number in place of what would underflow to zero."""
    return log_p.exp().clamp(min=torch.finfo(log_p.dtype).tiny)


class _Chart(Transform):
    """From coordinates ``(*batch, n - 1)`` to compositions ``(*batch, n)``.

    Subclasses give :meth:`log_parts` and :meth:`coordinates`, which keep to logarithms, so that parts of 1e-38 are ordinary numbers.
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def __init__(self, n: int, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.n = Simplex(n).n

    def log_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the parts, and the log ratio of volumes, Lebesgue's of the first n - 1 parts to that of ``z``."""
        raise NotImplementedError

    def coordinates(self, log_p: Tensor) -> Tensor:
        """The inverse of :meth:`log_parts`."""
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        return positive_exp(self.log_parts(x)[0])

    def _inverse(self, y: Tensor) -> Tensor:
        return self.coordinates(y.log())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_parts(x)[1]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] + 1])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size([*shape[:-1], shape[-1] - 1])

    def with_cache(self, cache_size: int = 1) -> _Chart:
        return type(self)(self.n, cache_size)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.n == self.n

    def __hash__(self) -> int:
        return hash((type(self), self.n))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.n})"


class ILR(_Chart):
    r"""Isometric log-ratio coordinates: :math:`p = \mathrm{softmax}(Tz)`, with orthonormal columns :math:`T` of sum zero (Helmert's).

    Aitchison's geometry of compositions is Euclid's of :math:`z`. :math:`\log|dV(p)/dz| = \frac12\log n + \sum_i \log p_i`.

    Args:
        n: number of parts.

    Example:
        >>> p = torch.tensor([0.2, 0.3, 0.5])
        >>> ILR(3)(ILR(3).inv(p))
        tensor([0.2000, 0.3000, 0.5000])

    Reference: Isometric logratio transformations for compositional data analysis (Egozcue et al., 2003),
    https://doi.org/10.1023/A:1023818214614
    """

    def log_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (z @ helmert(self.n, z).mT).log_softmax(-1)
        return log_p, 0.5 * math.log(self.n) + log_p.sum(-1)

    def coordinates(self, log_p: Tensor) -> Tensor:
        return log_p @ helmert(self.n, log_p)


class ALR(_Chart):
    r"""Additive log-ratio coordinates: :math:`z_i = \log(p_i / p_n)`, with :math:`\log|dV(p)/dz| = \sum_i \log p_i`.

    Args:
        n: number of parts.
    """

    def log_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.pad(z, (0, 1)).log_softmax(-1)
        return log_p, log_p.sum(-1)

    def coordinates(self, log_p: Tensor) -> Tensor:
        return log_p[..., :-1] - log_p[..., -1:]


class StickBreaking(_Chart):
    r"""Breaks off one part after the other: :math:`p_i = \sigma(z_i - \log(n - i)) \bigl(1 - \sum_{j<i} p_j\bigr)`, the chart of torch and Stan.

    Args:
        n: number of parts.
    """

    def _offset(self, like: Tensor) -> Tensor:
        return torch.arange(self.n - 1, 0, -1, dtype=like.dtype, device=like.device).log()

    def log_parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        u = z - self._offset(z)
        rest = F.pad(F.logsigmoid(-u).cumsum(-1), (1, 0))  # the logarithm of what is left before each part
        log_p = F.pad(F.logsigmoid(u), (0, 1)) + rest
        return log_p, (log_p + F.pad(F.logsigmoid(-u), (0, 1)))[..., :-1].sum(-1)

    def coordinates(self, log_p: Tensor) -> Tensor:
        after = log_p.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
        return log_p[..., :-1] - after + self._offset(log_p)
