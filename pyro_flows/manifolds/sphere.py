"""Transforms of the sphere whose map, inverse and ratio of volumes are closed formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ..nets import Hypernetwork
from ..transforms.linear import solve_rows, times
from ..univariate import IntervalSpline
from .geometry import Sphere
from .sphere_maps import dot, log_widening, mobius, pulled_back, translate, unit, unpack_lu, untranslate
from .transform import ManifoldTransform, widened

__all__ = ["Rotation", "NormalizedTranslation", "NormalizedLinear", "NormalizedAffine", "SphereMobius", "AxisFlow"]


class _SphereTransform(ManifoldTransform):
    """Holds the parameters, and does the arithmetic in double precision; a subclass gives the maps of points and parameters."""

    def __init__(self, n: int, context_dim: int, num_params: int) -> None:
        super().__init__(Sphere(n), context_dim)
        self.params = Hypernetwork((num_params,), context_dim)

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self._forward(*widened(x, self.params(context)))
        return y.to(x), ladj.to(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self._backward(*widened(y, self.params(context)))
        return x.to(y), ladj.to(y)


class Rotation(_SphereTransform):
    r"""Turns the sphere: :math:`y = Qx`, with :math:`Q = (I - A)^{-1}(I + A)` for a skew-symmetric :math:`A` (Cayley's map); :math:`R = 1`.

    Args:
        n: number of coordinates.
        context_dim: size of the context that :math:`A` may depend on (linearly); 0 for none.

    Cost: :math:`O(n^2)` a point in both directions, and :math:`O(n^3)` once a context. Every rotation without a half turn has one :math:`A`. Starts
    at the identity.
    """

    def __init__(self, n: int, context_dim: int = 0) -> None:
        super().__init__(n, context_dim, Sphere(n).n * (n - 1) // 2)

    def _matrix(self, params: Tensor) -> Tensor:
        n = self.dim
        row = torch.arange(n, device=params.device)
        below = row[:, None] > row
        index = (below.flatten().cumsum(0) - 1).clamp(min=0)
        lower = params.index_select(-1, index).unflatten(-1, (n, n)) * below.to(params.dtype)
        skew, eye = lower - lower.mT, torch.eye(n, dtype=params.dtype, device=params.device)
        return torch.linalg.solve(eye - skew, eye + skew)

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return unit(times(self._matrix(params), x)), x.new_zeros(x.shape[:-1])

    def _backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return unit(times(self._matrix(params).mT, y)), y.new_zeros(y.shape[:-1])


class NormalizedTranslation(_SphereTransform):
    r"""Moves the sphere, then pulls it back onto itself: :math:`y = (x + c)/\|x + c\|`, :math:`\|c\| < 1`.

    .. math:: R = \frac{1 + x^\top c}{\|x + c\|^n}, \qquad c = v / \sqrt{1 + \|v\|^2}

    Points flow towards :math:`c/\|c\|`. Near :math:`\|c\| = 1` a small cap around the opposite pole is spread over half of the sphere; the ratio is
    computed from :math:`y` by a formula that does not cancel there.

    Args:
        n: number of coordinates.
        context_dim: size of the context that :math:`v` may depend on (linearly); 0 for none.

    Cost: :math:`O(n)` a point in both directions. Starts at the identity.
    """

    def __init__(self, n: int, context_dim: int = 0) -> None:
        super().__init__(n, context_dim, n)

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return translate(x, params)

    def _backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return untranslate(y, params)


class NormalizedLinear(_SphereTransform):
    r"""A linear map, pulled back onto the sphere: :math:`y = Mx / \|Mx\|`, with :math:`R = |\det M| / \|Mx\|^n`.

    :math:`M = LU` with :math:`\det M = 1`, since its size has no effect. The map is odd, :math:`f(-x) = -f(x)`, so it is one of axes and, for
    :math:`n = 4`, of rotations as well. The uniform distribution becomes the angular central Gaussian of :math:`MM^\top`.

    Args:
        n: number of coordinates.
        context_dim: size of the context that :math:`M` may depend on (linearly in its parameters); 0 for none.

    Cost: :math:`O(n^2)` a point in both directions. Starts at the identity.

    Reference: Delving into discrete normalizing flows on SO(3) manifold for probabilistic rotation modeling (Liu et al., 2023),
    https://arxiv.org/abs/2304.03937
    """

    def __init__(self, n: int, context_dim: int = 0) -> None:
        super().__init__(n, context_dim, Sphere(n).n ** 2 - 1)

    def matrix(self, context: Tensor | None = None) -> Tensor:
        """The matrix ``M``, ``(n, n)``, or one for each context, ``(*batch, n, n)``."""
        self._check_context(context)
        lower, upper = unpack_lu(self.params(context), self.dim)
        return lower @ upper

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = unpack_lu(params, self.dim)
        return pulled_back(times(lower, times(upper, x)))

    def _backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = unpack_lu(params, self.dim)
        return pulled_back(solve_rows(upper, solve_rows(lower, y), upper=True))


class NormalizedAffine(NormalizedLinear):
    r"""An affine map, pulled back onto the sphere: :math:`y = (Mx + c)/\|Mx + c\|`, with :math:`\|M^{-1}c\| < 1`.

    .. math:: R = |\det M| \frac{1 + x^\top M^{-1} c}{\|Mx + c\|^n}

    A :class:`NormalizedTranslation` by :math:`M^{-1}c`, then a :class:`NormalizedLinear`. From the uniform distribution it makes shapes from an
    antipodal pair of modes to one skewed mode.

    Args:
        n: number of coordinates.
        context_dim: size of the context that :math:`M` and :math:`c` may depend on; 0 for none.

    Cost: :math:`O(n^2)` a point in both directions. Starts at the identity.
    """

    def __init__(self, n: int, context_dim: int = 0) -> None:
        super().__init__(n, context_dim)
        self.shift = Hypernetwork((n,), context_dim)

    def _given(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        return widened(x, self.params(context), self.shift(context))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, params, shift = self._given(x, context)
        moved, first = translate(wide, shift)
        y, second = self._forward(moved, params)
        return y.to(x), (first + second).to(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, params, shift = self._given(y, context)
        moved, first = self._backward(wide, params)
        x, second = untranslate(moved, shift)
        return x.to(y), (first + second).to(y)


class SphereMobius(_SphereTransform):
    r"""A Möbius map of the sphere: :math:`y = \frac{1 - \|\omega\|^2}{\|x - \omega\|^2}(x - \omega) - \omega`, :math:`\|\omega\| < 1`.

    .. math:: R = \left(\frac{1 - \|\omega\|^2}{\|x - \omega\|^2}\right)^{n-1}, \qquad \omega = v / \sqrt{1 + \|v\|^2}

    It keeps angles, and its inverse has :math:`-\omega`. The uniform distribution becomes a spherical Cauchy distribution around :math:`-\omega`.

    Args:
        n: number of coordinates.
        context_dim: size of the context that :math:`v` may depend on (linearly); 0 for none.

    Cost: :math:`O(n)` a point in both directions. Starts at the identity.

    Reference: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428
    """

    def __init__(self, n: int, context_dim: int = 0) -> None:
        super().__init__(n, context_dim, n)

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return mobius(x, params)

    def _backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return mobius(y, -params)


class AxisFlow(_SphereTransform):
    r"""Moves points along their meridians: the height :math:`t = x^\top\mu` becomes :math:`g(t)`, the direction around the axis :math:`\mu` is kept.

    .. math:: y = g\,\mu + \sqrt{\tfrac{1 - g^2}{1 - t^2}}\,(x - t\mu), \qquad R = g'(t) \left(\frac{1 - g^2}{1 - t^2}\right)^{(n-3)/2}

    :math:`g` is a rational-quadratic spline of :math:`[-1, 1]` with free slopes at the ends, which are the limits of the fraction at the poles: the
    map is smooth there. Stacks have a free axis for each layer, at random at the start.

    Args:
        n: number of coordinates.
        context_dim: size of the context that axis and spline may depend on (linearly); 0 for none.
        bins: number of bins of the spline.
        antipodal: whether :math:`g` is odd, so that :math:`f(-x) = -f(x)`: for axes, and for rotations as points of the sphere of
            :math:`\mathbb{R}^4`.

    Cost: :math:`O(n + K)` a point in both directions, for :math:`K` bins. Starts at the identity.
    """

    def __init__(self, n: int, context_dim: int = 0, bins: int = 8, antipodal: bool = False) -> None:
        spline = IntervalSpline(bins)
        super().__init__(n, context_dim, spline.num_params + Sphere(n).n)
        self.spline, self.antipodal = spline, antipodal
        with torch.no_grad():
            self.params.bias[-n:] = unit(torch.randn(n))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.spline.bins}" + ", antipodal=True" * self.antipodal

    def _bend(self, t: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        apply = self.spline.inverse if inverse else self.spline.forward
        params = params.expand(*t.shape, -1)
        if not self.antipodal:
            return apply(t, params)
        size = torch.where(t < 0, -t, t)  # not abs, whose derivative at zero is zero
        g, log_slope = apply(2 * size - 1, params)  # a spline of [0, 1] and its mirror image: the slopes at 0 agree
        return torch.where(t < 0, -1.0, 1.0) * (g + 1) / 2, log_slope

    def _move(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        x, axis = unit(x), unit(params[..., -self.dim :])  # rounding of its length would be most of what a height lacks to 1 near a pole
        t = dot(x, axis)
        around = x - t * axis
        g, log_slope = self._bend(t.squeeze(-1), params[..., : -self.dim], inverse)
        log_fraction = log_widening(g, dot(around, around).squeeze(-1), log_slope)
        y = unit(g.unsqueeze(-1) * axis + (log_fraction / 2).exp().unsqueeze(-1) * around)
        return y, log_slope + (self.dim - 3) / 2 * log_fraction

    def _forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._move(x, params, inverse=False)

    def _backward(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._move(y, params, inverse=True)
