"""Transforms of compositions: calibrations, and any Euclidean flow in coordinates of the simplex."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import DtypeError, OptionError, ShapeError
from ..nets import Hypernetwork
from ..numerics.factors import log_abs_det
from ..transforms import Compose, FlowTransform
from ..transforms.linear import times
from .charts import ALR, ILR, StickBreaking, _Chart, positive_exp
from .distribution import check_finite
from .geometry import Simplex, helmert
from .transform import ManifoldTransform

__all__ = ["Calibration", "GeneralizedCalibration", "SimplexFlow"]

CHARTS: dict[str, type[_Chart]] = {"ilr": ILR, "alr": ALR, "stick_breaking": StickBreaking}


class _InChart(ManifoldTransform):
    """A map of coordinates of the simplex, seen as one of compositions. Works with logarithms of the parts from end to end."""

    def __init__(self, n: int, context_dim: int = 0, chart: str = "ilr") -> None:
        super().__init__(Simplex(n), context_dim)
        if chart not in list(CHARTS):
            raise OptionError(f"{type(self).__name__}: chart must be one of {', '.join(CHARTS)}, got {chart!r}")
        self.chart = chart

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _backward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._through(x, context, forward=True)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._through(y, context, forward=False)

    def _through(self, p: Tensor, context: Tensor | None, forward: bool) -> tuple[Tensor, Tensor]:
        chart = CHARTS[self.chart](self.dim)
        z = chart.coordinates(p.log())
        moved, ladj = self._forward(z, context) if forward else self._backward(z, context)
        log_q, there = chart.log_parts(moved)
        return positive_exp(log_q), ladj + there - chart.log_parts(z)[1]


class Calibration(_InChart):
    r"""Scales and shifts log-probabilities: :math:`q = \mathrm{softmax}(a^{-1} \log p + c)`, with :math:`R = |a|^{1-n} \prod_i q_i / p_i`.

    The map of a classifier's probabilities that recalibrates them: :math:`a` is the temperature, and :math:`c = 0` temperature scaling. A Dirichlet
    becomes a :class:`SimplicialGeneralizedBeta`. The inverse is :math:`p = \mathrm{softmax}(a(\log q - c))`.

    Args:
        n: number of parts.
        context_dim: size of the context that :math:`\log|a|` and :math:`c` may depend on (linearly); 0 for none.
        temperature: :math:`a` at the start, not zero. Its sign stays; a negative one turns the order of the parts round.
        shifted: whether there is a shift :math:`c`, from 0 (of sum zero: any other would have the same effect); if not, this is temperature scaling.

    Cost: :math:`O(n^2)` a point in both directions. Starts at the identity, for ``temperature=1``.

    Raises:
        OptionError: a temperature that is zero or no finite number.

    Example:
        >>> layer = Calibration(3, temperature=2.0)
        >>> layer(torch.tensor([0.04, 0.16, 0.8])).detach()  # in proportion to square roots
        tensor([0.1338, 0.2677, 0.5985])

    Reference: On calibration of modern neural networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599
    """

    def __init__(self, n: int, context_dim: int = 0, temperature: float = 1.0, shifted: bool = True) -> None:
        super().__init__(n, context_dim)
        if not isinstance(temperature, int | float) or temperature == 0 or not math.isfinite(temperature):
            raise OptionError(f"Calibration: temperature must be a finite number, not zero, got {temperature!r}")
        self._side, self.shifted = 1.0 if temperature > 0 else -1.0, shifted
        self.params = Hypernetwork((n if shifted else 1,), context_dim)
        with torch.no_grad():
            self.params.bias[0] = math.log(abs(temperature))

    def extra_repr(self) -> str:
        known = not self.context_dim and not self.params.bias.is_meta
        temperature = f"={self.temperature().item():.4g}" if known else ">0" if self._side > 0 else "<0"
        return f"{super().extra_repr()}, temperature{temperature}" + ", shifted=False" * (not self.shifted)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``log|a|``, and the shift in ILR coordinates."""
        params = self.params(context)
        return params[..., :1], params[..., 1:] if self.shifted else torch.zeros_like(params)

    def temperature(self, context: Tensor | None = None) -> Tensor:
        """The temperature ``a``, or one for each context."""
        self._check_context(context)
        return self._side * self._parts(context)[0].exp().squeeze(-1)

    def shift(self, context: Tensor | None = None) -> Tensor:
        """The shift ``c`` of the logarithms, of sum zero, ``(n,)``, or one for each context."""
        self._check_context(context)
        c = self._parts(context)[1].expand(*self._parts(context)[0].shape[:-1], self.dim - 1)
        return c @ helmert(self.dim, c).mT

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_a, c = self._parts(context)
        return self._side * (-log_a).exp() * z + c, ((1 - self.dim) * log_a.squeeze(-1)).expand(z.shape[:-1])

    def _backward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_a, c = self._parts(context)
        return self._side * log_a.exp() * (z - c), ((self.dim - 1) * log_a.squeeze(-1)).expand(z.shape[:-1])


class GeneralizedCalibration(_InChart):
    r"""Any affine map of log-ratios: :math:`z' = Bz + b` in ILR coordinates, with :math:`R = |\det B| \prod_i q_i / p_i`.

    Written with all parts it is :math:`q = \mathrm{softmax}(A\log p + c)`, :math:`A = T B T^\top`, :math:`c = Tb`. These maps are the affine group of
    Aitchison's geometry: :meth:`compose` and :meth:`inverse` give maps of the same kind.

    Args:
        n: number of parts.
        context_dim: size of the context that :math:`B` and :math:`b` may depend on (linearly); 0 for none.
        matrix: :math:`B` at the start, ``(n - 1, n - 1)``, invertible; the identity when omitted.
        shift: :math:`b` at the start, ``(n - 1,)``; zero when omitted.

    Cost: :math:`O(n^2)` a point in both directions, and :math:`O(n^3)` once a context. Starts at the identity, or at what is given.

    Raises:
        ShapeError: a matrix or a shift of another shape. DtypeError: one that is no tensor of floating-point numbers.
        OptionError: a singular matrix, or entries that are not finite; or a group operation of layers that depend on a context.
    """

    def __init__(self, n: int, context_dim: int = 0, matrix: Tensor | None = None, shift: Tensor | None = None) -> None:
        super().__init__(n, context_dim)
        self.params = Hypernetwork((n - 1, n), context_dim)
        bias, eye = self.params.bias, torch.eye(n - 1)
        for name, value, shape in (("matrix", matrix, (n - 1, n - 1)), ("shift", shift, (n - 1,))):
            if value is None:
                continue
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise DtypeError(f"GeneralizedCalibration: {name} must be a tensor of floating-point numbers, got {kind}")
            if value.shape != shape:
                raise ShapeError(f"GeneralizedCalibration: {name} must have shape {shape}, got {tuple(value.shape)}: it acts on ILR coordinates")
            check_finite("GeneralizedCalibration", name, value)
        if matrix is not None and not bool(torch.linalg.matrix_rank(matrix.detach()) == n - 1):
            raise OptionError(f"GeneralizedCalibration: matrix is singular, of rank {int(torch.linalg.matrix_rank(matrix.detach()))} of {n - 1}")
        given = next((t for t in (matrix, shift) if t is not None), bias).detach()
        bias.data = bias.data.to(given)
        with torch.no_grad():
            bias[:, :-1] = (eye.to(bias) if matrix is None else matrix) - eye.to(bias)
            bias[:, -1] = bias[:, -1] if shift is None else shift

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        params = self.params(context)
        return params[..., :-1] + torch.eye(self.dim - 1, dtype=params.dtype, device=params.device), params[..., -1]

    def matrix(self, context: Tensor | None = None) -> Tensor:
        """``B``, ``(n - 1, n - 1)``, or one for each context."""
        self._check_context(context)
        return self._parts(context)[0]

    def shift(self, context: Tensor | None = None) -> Tensor:
        """``b``, ``(n - 1,)``, or one for each context."""
        self._check_context(context)
        return self._parts(context)[1]

    def _alone(self, what: str) -> tuple[Tensor, Tensor]:
        if self.context_dim:
            raise OptionError(f"GeneralizedCalibration: {what} is of layers without a context")
        matrix, shift = self._parts(None)
        return matrix.detach(), shift.detach()

    def compose(self, other: GeneralizedCalibration) -> GeneralizedCalibration:
        """The one map that does what ``other`` does and then this one: a new layer."""
        (a, c), (b, d) = self._alone("composition"), other._alone("composition")
        return GeneralizedCalibration(self.dim, matrix=a @ b, shift=a @ d + c)

    def inverse(self) -> GeneralizedCalibration:
        """The inverse map, a new layer. (``.inv`` is the inverse that shares this one's parameters.)"""
        matrix, shift = self._alone("inversion")
        return GeneralizedCalibration(self.dim, matrix=torch.linalg.inv(matrix), shift=-torch.linalg.solve(matrix, shift))

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix, shift = self._parts(context)
        return times(matrix, z) + shift, log_abs_det(matrix).expand(z.shape[:-1])

    def _backward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix, shift = self._parts(context)
        moved = z - shift
        if matrix.dim() == 2:
            back = torch.linalg.solve(matrix, moved.reshape(-1, z.shape[-1]).mT).mT.reshape(z.shape)
        else:
            back = torch.linalg.solve(matrix, moved.unsqueeze(-1)).squeeze(-1)
        return back, -log_abs_det(matrix).expand(z.shape[:-1])


class SimplexFlow(_InChart):
    r"""Any Euclidean transforms, in coordinates of the simplex: :math:`q = \phi(h(\phi^{-1}(p)))`, with a chart :math:`\phi`.

    Inside, parts are logarithms and may be as small as they like. What comes out is at least the smallest normal number, 1e-38 in single precision:
    of several layers in a row, one that sends parts below that loses them for the next. Transforms of one ``SimplexFlow`` do not.

    Args:
        transforms: transforms :math:`h` of ``n - 1`` coordinates, one after the other.
        chart: ``"ilr"`` (isometric log-ratios: no part is special), ``"alr"`` (log-ratios to the last part) or ``"stick_breaking"``.

    Cost: that of the transforms, and :math:`O(n^2)`. Starts where they start.

    Raises:
        OptionError: an unknown chart, or no transforms.
        ShapeError: transforms of different sizes.

    Example:
        >>> from pyro_flows.transforms import Affine
        >>> SimplexFlow([Affine(2)])(torch.tensor([0.2, 0.3, 0.5]))
        tensor([0.2000, 0.3000, 0.5000], grad_fn=...)
    """

    def __init__(self, transforms: FlowTransform | Sequence[FlowTransform], chart: str = "ilr") -> None:
        inner = transforms if isinstance(transforms, FlowTransform) else Compose(transforms)
        if inner.manifold is not None:
            raise OptionError(f"SimplexFlow: transforms act on coordinates of R^{inner.dim}, but these live on {inner.manifold}")
        super().__init__(inner.dim + 1, inner.context_dim, chart)
        self.transform: nn.Module = inner
        self.one_pass = inner.one_pass

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chart={self.chart!r}"

    def _forward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(z, context)  # type: ignore[operator]

    def _backward(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(z, context)  # type: ignore[operator]
