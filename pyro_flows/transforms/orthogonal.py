"""Rotations by Householder reflections, and the QR-factored linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import OptionError
from .linear import Linear, eye_like, solve_rows, triangular

__all__ = ["OrthogonalLinear", "QRLinear"]


def reflect(vectors: Tensor, x: Tensor, inverse: bool = False) -> Tensor:
    r"""Multiply the rows of ``x``, ``(*batch, D)``, by :math:`Q = H_1 \cdots H_K` or its transpose; ``vectors``, ``(K, D)``, has the normals.

    With unit normals as the rows of :math:`U`, the product is :math:`I - U^\top S^{-1} U`, where :math:`S` is the upper triangle of
    :math:`U U^\top` with its diagonal halved: two matrix products in place of :math:`K` reflections in a row.
    """
    unit = normalize(vectors, dim=-1)
    gram = unit @ unit.mT
    half = gram.triu(1) + 0.5 * eye_like(gram)
    return x - x @ unit.mT @ torch.linalg.solve_triangular(half if inverse else half.mT, unit, upper=inverse)


def normals(dim: int, reflections: int | None, name: str) -> nn.Parameter:
    """Random normals in equal pairs, whose reflections undo each other: a product that starts at the identity, ready to turn."""
    count = dim - dim % 2 if reflections is None else reflections
    if not isinstance(count, int) or count < 0 or count % 2:
        raise OptionError(f"{name}: reflections must be an even number, so that the layer can start at the identity, got {reflections!r}")
    return nn.Parameter(torch.randn(count // 2, dim).div(dim**0.5).repeat_interleave(2, 0))


class OrthogonalLinear(Linear):
    r"""A rotation: :math:`y = Q x + t`, with :math:`Q = H_1 \cdots H_K` and the reflections :math:`H_k = I - 2 v_k v_k^\top / \lVert v_k \rVert^2`.

    The log-determinant is 0 and the inverse is :math:`Q^\top`. Every rotation is a product of at most :math:`D` reflections, an even number of
    them; so the determinant is 1, not -1.

    Args:
        dim: number of coordinates :math:`D`.
        reflections: number of reflections :math:`K`, even; by default the largest even number up to ``dim``, which reaches every rotation.

    Cost: :math:`O(KD)` a point in both directions, and :math:`O(K^2 D)` once a call, all in matrix products: the reflections are accumulated as
    :math:`I - U^\top S^{-1} U` with a triangular :math:`S`. Starts at the identity, from normals in equal pairs.

    Raises:
        OptionError: ``reflections`` is not an even number.

    Reference: Improving variational auto-encoders using Householder flow (Tomczak & Welling, 2016), https://arxiv.org/abs/1611.09630;
    accumulation: Accumulating Householder transformations, revisited (Joffrain et al., 2006), https://doi.org/10.1145/1141885.1141886

    Example:
        >>> OrthogonalLinear(4).logabsdet()
        tensor(0.)
    """

    def __init__(self, dim: int, reflections: int | None = None) -> None:
        super().__init__(dim)
        self.vectors, self.shift = normals(dim, reflections, "OrthogonalLinear"), nn.Parameter(torch.zeros(dim))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reflections={len(self.vectors)}"

    def logabsdet(self) -> Tensor:
        return self.shift.new_zeros(())

    def _multiply(self, x: Tensor) -> Tensor:
        return reflect(self.vectors, x)

    def _solve(self, y: Tensor) -> Tensor:
        return reflect(self.vectors, y, inverse=True)


class QRLinear(Linear):
    r"""A general linear layer: :math:`y = Q R x + t`, with a rotation :math:`Q` and an upper triangular :math:`R`, :math:`R_{ii} = e^{d_i}`.

    :math:`Q` is that of :class:`OrthogonalLinear`. Every matrix of positive determinant has such factors, without the permutation that LU factors
    need, and the rotation adds nothing to the condition number; the price is a dearer call.

    Args:
        dim: number of coordinates :math:`D`.
        reflections: number of reflections :math:`K` in :math:`Q`, even; by default the largest even number up to ``dim``.

    Cost: :math:`O(D^2 + KD)` a point in both directions (a triangular solve back), and :math:`O(K^2 D)` once a call. Starts at the identity.

    Raises:
        OptionError: ``reflections`` is not an even number.

    Reference: Emerging convolutions for generative normalizing flows (Hoogeboom et al., 2019), https://arxiv.org/abs/1901.11137
    """

    def __init__(self, dim: int, reflections: int | None = None) -> None:
        super().__init__(dim)
        self.vectors, self.upper = normals(dim, reflections, "QRLinear"), nn.Parameter(torch.zeros(dim, dim))
        self.log_diag, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reflections={len(self.vectors)}"

    def _factor(self) -> Tensor:
        return triangular(self.upper, self.log_diag, upper=True)

    def logabsdet(self) -> Tensor:
        return self.log_diag.sum()

    def _multiply(self, x: Tensor) -> Tensor:
        return reflect(self.vectors, x @ self._factor().mT)

    def _solve(self, y: Tensor) -> Tensor:
        return solve_rows(self._factor(), reflect(self.vectors, y, inverse=True), upper=True)
