"""Rotations by Householder reflections, and the QR-factored linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..errors import OptionError
from .linear import Linear, eye_like, solve_rows, times, triangular, zeros

__all__ = ["OrthogonalLinear", "QRLinear"]


def reflect(vectors: Tensor, x: Tensor, inverse: bool = False) -> Tensor:
    r"""Multiply the rows of ``x``, ``(*batch, D)``, by :math:`Q = H_1 \cdots H_K` or its transpose; ``vectors``, ``(*batch, K, D)``, has the normals.

    With unit normals as the rows of :math:`U`, the product is :math:`I - U^\top S^{-1} U`, where :math:`S` is the upper triangle of
    :math:`U U^\top` with its diagonal halved: two matrix products in place of :math:`K` reflections in a row.
    """
    unit = normalize(vectors, dim=-1)
    gram = unit @ unit.mT
    half = gram.triu(1) + 0.5 * eye_like(gram)
    solved = torch.linalg.solve_triangular(half if inverse else half.mT, unit, upper=inverse)
    return x - times(solved.mT, times(unit, x))


def normals(dim: int, reflections: int | None, name: str) -> Tensor:
    """Random normals in equal pairs, whose reflections undo each other: a product that starts at the identity, ready to turn."""
    count = dim - dim % 2 if reflections is None else reflections
    if not isinstance(count, int) or count < 0 or count % 2:
        raise OptionError(f"{name}: reflections must be an even number, so that the layer can start at the identity, got {reflections!r}")
    return torch.randn(count // 2, dim).div(dim**0.5).repeat_interleave(2, 0)


class OrthogonalLinear(Linear):
    r"""A rotation: :math:`y = Q x + t`, with :math:`Q = H_1 \cdots H_K` and the reflections :math:`H_k = I - 2 v_k v_k^\top / \lVert v_k \rVert^2`.

    The log-determinant is 0 and the inverse is :math:`Q^\top`. Every rotation is a product of at most :math:`D` reflections, an even number of
    them; so the determinant is 1, not -1.

    Args:
        dim: number of coordinates :math:`D`.
        reflections: number of reflections :math:`K`, even; by default the largest even number up to ``dim``, which reaches every rotation.
        context_dim: size of the context that all parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(KD)` a point in both directions, and :math:`O(K^2 D)` once a call (a context), all in matrix products: the reflections are
    accumulated as :math:`I - U^\top S^{-1} U` with a triangular :math:`S`. Starts at the identity, from normals in equal pairs.

    Raises:
        OptionError: ``reflections`` is not an even number.

    Reference: Improving variational auto-encoders using Householder flow (Tomczak & Welling, 2016), https://arxiv.org/abs/1611.09630;
    accumulation: Accumulating Householder transformations, revisited (Joffrain et al., 2006), https://doi.org/10.1145/1141885.1141886

    Example:
        >>> OrthogonalLinear(4).logabsdet()
        tensor(0.)
    """

    vectors: Tensor

    def __init__(self, dim: int, reflections: int | None = None, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim, vectors=normals(dim, reflections, "OrthogonalLinear"), shift=zeros(dim))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reflections={len(self.vectors)}"

    def _log_det(self, at: Any) -> Tensor:
        return at.shift.new_zeros(at.shift.shape[:-1])

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return reflect(at.vectors, x)

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return reflect(at.vectors, y, inverse=True)


class QRLinear(Linear):
    r"""A general linear layer: :math:`y = Q R x + t`, with a rotation :math:`Q` and an upper triangular :math:`R`, :math:`R_{ii} = e^{d_i}`.

    :math:`Q` is that of :class:`OrthogonalLinear`. Every matrix of positive determinant has such factors, without the permutation that LU factors
    need, and the rotation adds nothing to the condition number; the price is a dearer call.

    Args:
        dim: number of coordinates :math:`D`.
        reflections: number of reflections :math:`K` in :math:`Q`, even; by default the largest even number up to ``dim``.
        context_dim: size of the context that all parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(D^2 + KD)` a point in both directions (a triangular solve back), and :math:`O(K^2 D)` once a call (a context). Starts at the
    identity.

    Raises:
        OptionError: ``reflections`` is not an even number.

    Reference: Emerging convolutions for generative normalizing flows (Hoogeboom et al., 2019), https://arxiv.org/abs/1901.11137
    """

    vectors: Tensor

    def __init__(self, dim: int, reflections: int | None = None, context_dim: int = 0) -> None:
        vectors = normals(dim, reflections, "QRLinear")
        super().__init__(dim, context_dim, vectors=vectors, upper=zeros(dim, dim), log_diag=zeros(dim), shift=zeros(dim))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reflections={len(self.vectors)}"

    def _factor(self, at: Any) -> Tensor:
        return triangular(at.upper, at.log_diag, upper=True)

    def _log_det(self, at: Any) -> Tensor:
        return at.log_diag.sum(-1)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return reflect(at.vectors, times(self._factor(at), x))

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return solve_rows(self._factor(at), reflect(at.vectors, y, inverse=True), upper=True)
