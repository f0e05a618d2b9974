"""The exponential-map flow of the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InversionError, OptionError
from ..nets import Hypernetwork
from ..numerics import batch_jacobian
from ..numerics.introspection import is_traced
from ..univariate import soft_clamp
from .geometry import Sphere
from .ratio import log_volume_ratio
from .sphere_maps import dot, unit
from .transform import ManifoldTransform, widened

__all__ = ["ExponentialMap"]

_STEPS, _TRACED_STEPS = 100, 12
_MAX_LOG_SHARPNESS = 3.0


def _shoot(x: Tensor, v: Tensor) -> Tensor:
    """The exponential map ``cos(r) x + sin(r)/r v`` for tangent vectors of length ``r`` below one, by power series: smooth at ``v = 0`` too."""
    square = dot(v, v)
    cosine, sine = torch.ones_like(square), torch.ones_like(square)
    for k in range(9, 0, -1):
        cosine = 1 - cosine * square / ((2 * k - 1) * 2 * k)
        sine = 1 - sine * square / (2 * k * (2 * k + 1))
    return cosine * x + sine * v


class ExponentialMap(ManifoldTransform):
    r"""Shoots each point along the gradient of a potential, :math:`y = \exp_x(\nabla\varphi(x))`, a sum of radial bumps.

    .. math:: \varphi(x) = \sum_k \frac{\alpha_k}{\beta_k} e^{\beta_k (x^\top\mu_k - 1)}, \qquad \sum_k |\alpha_k| < 1,\ \beta_k > 0

    A bump with :math:`\alpha_k > 0` draws points towards :math:`\mu_k`, one with :math:`\alpha_k < 0` drives them away; both keep the order along
    meridians for :math:`|\alpha_k| \le 1`, and so does any average of them, because potentials whose map is invertible form a convex set on the
    sphere. So signs are free, and :math:`\alpha = 0` is the identity.

    Args:
        n: number of coordinates.
        components: number of bumps :math:`K`.
        context_dim: size of the context that the bumps may depend on (linearly); 0 for none.

    Cost: forward :math:`O(nK)` and :math:`n` vector-Jacobian products for the ratio of volumes; the inverse is Newton's method, about ten times that.
    :math:`\beta_k` lies in :math:`(e^{-3}, e^3)`. Starts at the identity.

    Raises:
        InversionError: Newton's method did not converge.

    References: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428; A Jacobian inequality for gradient
    maps on the sphere and its application to directional statistics (Sei, 2013), https://arxiv.org/abs/0906.0874
    """

    def __init__(self, n: int, components: int = 8, context_dim: int = 0) -> None:
        super().__init__(Sphere(n), context_dim)
        if not isinstance(components, int) or components < 1:
            raise OptionError(f"ExponentialMap: components must be a positive integer, got {components!r}")
        self.components = components
        self.params = Hypernetwork((components, n + 2), context_dim)
        with torch.no_grad():
            self.params.bias[:, 2:] = unit(torch.randn(components, n))
        self.one_pass = "forward"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, components={self.components}"

    def _map(self, x: Tensor, params: Tensor) -> Tensor:
        size, sharpness, centre = params[..., 0], soft_clamp(params[..., 1], _MAX_LOG_SHARPNESS).exp(), unit(params[..., 2:])
        size = size / (1 + self.components * (size * size).sum(-1, keepdim=True)).sqrt()  # so that the absolute values sum to less than one
        pull = size * (sharpness * ((centre @ x.unsqueeze(-1)).squeeze(-1) - 1)).exp()
        gradient = (pull.unsqueeze(-2) @ centre).squeeze(-2)
        return unit(_shoot(x, gradient - dot(gradient, x) * x))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, params = widened(x, self.params(context))
        ladj = log_volume_ratio(lambda z: self._map(z, params), wide, self.manifold)
        return self._map(wide, params).to(x), ladj.to(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, params = widened(y, self.params(context))
        with torch.no_grad():
            root = self._solve(wide, params)
            slope = self._slope(root, params)
        # One more step, from the root, has the derivatives of the root.
        x = unit(root + torch.linalg.solve(slope, wide - self._map(root, params)))
        ladj = -log_volume_ratio(lambda z: self._map(z, params), x, self.manifold)
        return x.to(y), ladj.to(y)

    def _slope(self, x: Tensor, params: Tensor) -> Tensor:
        """The Jacobian of the homogeneous extension, an invertible matrix."""

        def extended(z: Tensor) -> Tensor:
            r = self.manifold.radius(z)
            return r * self._map(z / r, params)

        return batch_jacobian(extended, x)

    def _solve(self, y: Tensor, params: Tensor) -> Tensor:
        """Newton's method with a step that is halved where the residual grows: it has no other minimum than the root."""
        traced, tolerance = is_traced(), 16 * torch.finfo(y.dtype).eps
        x, share = y, torch.ones_like(y[..., :1])
        residual = y - self._map(x, params)
        size = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        direction = torch.linalg.solve(self._slope(x, params), residual)
        for _ in range(_TRACED_STEPS if traced else _STEPS):
            if not traced and bool((size <= tolerance).all()):
                break
            there = unit(x + share * direction)
            left = y - self._map(there, params)
            smaller = torch.linalg.vector_norm(left, dim=-1, keepdim=True)
            better = smaller < size
            x, residual, size = torch.where(better, there, x), torch.where(better, left, residual), torch.where(better, smaller, size)
            share = torch.where(better, (2 * share).clamp(max=1), share / 2)
            direction = torch.linalg.solve(self._slope(x, params), residual)
        if not traced and bool((~(size <= math.sqrt(tolerance))).any()):
            raise InversionError(
                f"ExponentialMap: Newton's method left {int((~(size <= math.sqrt(tolerance))).sum())} of {size.numel()} points with a residual up to "
                f"{size.max().item():.3g} after {_STEPS} steps: look for NaN in parameters or points"
            )
        return x
