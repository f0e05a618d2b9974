"""The closed-form maps of the sphere, as pure functions of points and parameters: each gives ``(y, log ratio of volumes)``."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import helmert, unit

__all__ = ["unit", "pulled_back", "dot", "translate", "untranslate", "mobius", "stretch", "log_widening", "unpack_lu"]


def pulled_back(z: Tensor) -> tuple[Tensor, Tensor]:
    """``z = Mx`` of a point ``x`` of the sphere and a matrix of determinant one, pulled back onto the sphere: ``(z / |z|, log ratio of volumes)``."""
    length = torch.linalg.vector_norm(z, dim=-1)
    return z / length.unsqueeze(-1), -z.shape[-1] * length.log()


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product, with a last dimension of one."""
    return (x * y).sum(-1, keepdim=True)


def inside_ball(v: Tensor) -> tuple[Tensor, Tensor]:
    """The point ``c = v / sqrt(1 + |v|^2)`` of the open ball, and ``1 - |c|^2`` without cancellation."""
    k = 1 / (1 + dot(v, v))
    return v * k.sqrt(), k


def stretch(y: Tensor, c: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """From ``y = (x + c) / |x + c|``: the length ``|x + c|``, and the log ratio of the translation."""
    b = dot(y, c)
    s = (b * b + k).sqrt()
    longer = s + torch.where(b >= 0, b, -b)  # not abs, whose derivative at zero, where layers start, is zero
    length = torch.where(b >= 0, longer, k / longer)  # b + s, which cancels where b < 0
    return length, (s.log() - (y.shape[-1] - 1) * length.log()).squeeze(-1)


def translate(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``(x + c) / |x + c|`` with ``c`` the point of the ball that ``v`` stands for."""
    c, k = inside_ball(v)
    y = unit(x + c)
    return y, stretch(y, c, k)[1]


def untranslate(y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`translate`."""
    c, k = inside_ball(v)
    length, ratio = stretch(y, c, k)
    return unit(length * y - c), -ratio


def mobius(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The Moebius map ``(1 - |w|^2) / |x - w|^2 (x - w) - w``; its inverse is that of ``-v``."""
    w, k = inside_ball(v)
    apart = x - w
    d = dot(apart, apart)
    y = unit(k / d * apart - w)
    e = dot(y + w, y + w)  # k^2 / d: of the two the larger is accurate
    ratio = torch.where(d >= e, k.log() - d.log(), e.log() - k.log())
    return y, (x.shape[-1] - 1) * ratio.squeeze(-1)


_POLE = 1e-8  # of 1 - t^2, below which the quotient of two such is replaced by its limit


def log_widening(g: Tensor, width: Tensor, log_slope: Tensor) -> Tensor:
    """``log((1 - g^2) / (1 - t^2))`` for a map ``g`` of heights ``t`` that keeps both poles: there it is the log slope. ``width`` is ``1 - t^2``."""
    pole = width < _POLE
    there = ((1 - g) * (1 + g)).clamp(min=_POLE**2)
    return torch.where(pole, log_slope, there.log() - torch.where(pole, 1.0, width).log())


def unpack_lu(raw: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A unit lower and an upper triangular matrix of determinant one from ``n^2 - 1`` numbers, zeros giving identities."""
    below, above, log_diag = raw.split([n * (n - 1) // 2, n * (n - 1) // 2, n - 1], -1)
    diag = (log_diag @ helmert(n, raw).mT).exp()
    lower = _fill(below, n, -1) + torch.eye(n, dtype=raw.dtype, device=raw.device)
    return lower, _fill(above, n, 1) + torch.diag_embed(diag)


def _fill(values: Tensor, n: int, side: int) -> Tensor:
    """Numbers row by row into the strict triangle below (-1) or above (1) the diagonal."""
    row = torch.arange(n, device=values.device)
    there = (row[:, None] - row) * -side > 0
    index = there.flatten().cumsum(0) - 1
    matrix = values.index_select(-1, index.clamp(min=0)).unflatten(-1, (n, n))
    return matrix * there.to(values.dtype)
