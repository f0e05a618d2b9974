"""Distributions on the sphere with a shape: angular central Gaussian, its skewed relative, and Kent's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from ..errors import SupportError
from ..numerics.factors import log_abs_det
from .distribution import ManifoldDistribution, check_lower, check_matrix, require, together
from .geometry import Sphere
from .grids import gauss_legendre
from .manifold import can_look
from .sphere_maps import dot, pulled_back, stretch, unit
from .transform import widened

__all__ = ["AngularCentralGaussian", "AffineUniform", "Kent"]


class AngularCentralGaussian(ManifoldDistribution):
    r"""The direction of a normal vector of mean zero: log density :math:`-\log\Omega_n - \log|\det L| - n\log\|L^{-1}x\|` under surface measure.

    Its density is the same at :math:`x` and :math:`-x`: a distribution of axes, and on the sphere of :math:`\mathbb{R}^4` of rotations.

    Args:
        scale_tril: the lower triangular :math:`L` of the covariance :math:`LL^\top`, ``(*batch, n, n)``; its size has no effect.

    Raises:
        ShapeError: not square. OptionError: not finite, not lower triangular, or singular: a zero on the diagonal.

    Reference: Statistical analysis for the angular central Gaussian distribution on the sphere (Tyler, 1987),
    https://doi.org/10.1093/biomet/74.3.579
    """

    has_rsample = True
    arg_constraints = {"scale_tril": constraints.lower_triangular}
    parameter_dims = {"scale_tril": 2}

    def __init__(self, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        name = "AngularCentralGaussian"
        (self.scale_tril,), batch = together(name, {"scale_tril": (scale_tril, 2)})
        check_matrix(name, "scale_tril", self.scale_tril)
        super().__init__(Sphere(self.scale_tril.shape[-1]), batch, validate_args)
        if self._validate_args:
            require(self.scale_tril.diagonal(dim1=-2, dim2=-1) != 0, f"{name}: scale_tril is singular: a zero on its diagonal")
            check_lower(name, "scale_tril", self.scale_tril)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, tril = widened(value, self.scale_tril)
        z = torch.linalg.solve_triangular(tril, x.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = tril.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
        return (-self.manifold.log_volume - log_det - self.manifold.size * torch.linalg.vector_norm(z, dim=-1).log()).to(value)

    @property
    def mean(self) -> Tensor:
        return torch.zeros_like(self.scale_tril[..., 0])

    def _draw(self, shape: torch.Size) -> Tensor:
        tril = self.scale_tril
        return unit((tril @ torch.randn(shape, dtype=tril.dtype, device=tril.device).unsqueeze(-1)).squeeze(-1))


class AffineUniform(ManifoldDistribution):
    r"""The uniform distribution pushed through :math:`x \mapsto (Mx + c)/\|Mx + c\|`, with :math:`\|M^{-1}c\| < 1`.

    From an antipodal pair of modes (:math:`c = 0`, the angular central Gaussian) to one skewed mode, with density, draws and gradients in closed
    form: what Kent's distribution is used for, without its normalising constant. Log density under surface measure.

    Args:
        matrix: :math:`M`, ``(*batch, n, n)``, invertible; its size counts relative to that of :math:`c` only.
        shift: :math:`c`, ``(*batch, n)``.

    Raises:
        ShapeError: not square. OptionError: a singular ``matrix``, or entries that are not finite.
        SupportError: a ``shift`` with :math:`\|M^{-1}c\| \ge 1`, for which points would meet.
    """

    has_rsample = True
    arg_constraints = {"matrix": constraints.independent(constraints.real, 2), "shift": constraints.real_vector}
    parameter_dims = {"matrix": 2, "shift": 1}

    def __init__(self, matrix: Tensor, shift: Tensor, validate_args: bool | None = None) -> None:
        (self.matrix, self.shift), batch = together("AffineUniform", {"matrix": (matrix, 2), "shift": (shift, 1)})
        check_matrix("AffineUniform", "matrix", self.matrix, self.shift.shape[-1])
        super().__init__(Sphere(self.matrix.shape[-1]), batch, validate_args)
        if self._validate_args and can_look(self.matrix):
            values = torch.linalg.svdvals(self.matrix.detach().double())
            smallest = values[..., -1] / values[..., 0]
            message = f"AffineUniform: matrix is singular: its smallest singular value is {smallest.min().item():.3g} of the largest"
            require(smallest > 1e-12, message)
            size = torch.linalg.vector_norm(torch.linalg.solve(self.matrix, self.shift.unsqueeze(-1)).squeeze(-1), dim=-1)
            if not bool((size < 1).all()):
                raise SupportError(
                    f"AffineUniform: |M^-1 c| must be less than 1, got {size.max().item():.6g}: a longer shift maps two points to one: scale it down"
                )

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        y, matrix, shift = widened(value, self.matrix, self.shift)
        z, c = (torch.linalg.solve(matrix, t.unsqueeze(-1)).squeeze(-1) for t in (y, shift))
        one, first = pulled_back(z)
        ratio = log_abs_det(matrix) - first + stretch(one, c, 1 - dot(c, c))[1]
        return (-self.manifold.log_volume - ratio).to(value)

    def _draw(self, shape: torch.Size) -> Tensor:
        x = self.manifold.random_uniform(shape[:-1], self.matrix.dtype, self.matrix.device)
        return unit((self.matrix @ x.unsqueeze(-1)).squeeze(-1) + self.shift)


_NODES = 256


class Kent(ManifoldDistribution):
    r"""Kent's distribution on the sphere of :math:`\mathbb{R}^3`, with elliptic contours around a direction.

    .. math:: \log p(x) = \kappa\,\gamma_1^\top x + \beta\,[(\gamma_2^\top x)^2 - (\gamma_3^\top x)^2] - \log c(\kappa, \beta)

    under surface measure. The constant, :math:`c = 2\pi\int_{-1}^1 e^{\kappa t} I_0(\beta(1 - t^2))\,dt`, is a sum of 256 terms, exact to 1e-12.

    Args:
        frame: the rotation with columns :math:`\gamma_1` (the mean direction), :math:`\gamma_2` (the long axis) and :math:`\gamma_3`,
            ``(*batch, 3, 3)``.
        concentration: :math:`\kappa \ge 0`, ``(*batch,)``.
        ovalness: :math:`\beta`, ``(*batch,)``, with :math:`0 \le 2\beta \le \kappa`: otherwise there would be two modes.

    Draws are by rejection, and cannot be differentiated.

    Raises:
        ShapeError, OptionError: a frame that is not orthogonal of three directions, or an ovalness out of its range.

    References: The Fisher-Bingham distribution on the sphere (Kent, 1982), https://doi.org/10.1111/j.2517-6161.1982.tb01189.x
    """

    has_rsample = False
    arg_constraints = {
        "frame": constraints.independent(constraints.real, 2),
        "concentration": constraints.nonnegative,
        "ovalness": constraints.nonnegative,
    }
    parameter_dims = {"frame": 2, "concentration": 0, "ovalness": 0}

    def __init__(self, frame: Tensor, concentration: Tensor | float, ovalness: Tensor | float, validate_args: bool | None = None) -> None:
        given = {"frame": (frame, 2), "concentration": (concentration, 0), "ovalness": (ovalness, 0)}
        (self.frame, self.concentration, self.ovalness), batch = together("Kent", given)
        check_matrix("Kent", "frame", self.frame, 3)
        super().__init__(Sphere(3), batch, validate_args)
        if self._validate_args:
            off = (self.frame.mT @ self.frame - torch.eye(3).to(self.frame)).abs()
            require(off < 1e-4, "Kent: the columns of frame must be orthonormal")
            require(self.ovalness >= 0, "Kent: ovalness must not be negative: exchange the last two columns of frame instead")
            require(2 * self.ovalness <= self.concentration, "Kent: ovalness must be at most half of concentration")

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, frame, kappa, beta = widened(value, self.frame, self.concentration, self.ovalness)
        along = (frame.mT @ x.unsqueeze(-1)).squeeze(-1)
        away = x - frame[..., 0]
        oval = along[..., 1] ** 2 - along[..., 2] ** 2
        return (beta * oval - kappa / 2 * (away * away).sum(-1) - _log_kent(kappa, beta)).to(value)

    @torch.no_grad()
    def _draw(self, shape: torch.Size) -> Tensor:
        frame, kappa, beta = widened(self.frame, self.concentration, self.ovalness)
        kappa, beta = kappa.expand(shape[:-1]), beta.expand(shape[:-1])
        # With s = 1 - t: exp(-(kappa - 2 beta) s - beta s^2) lies below the exponential that touches it at s0, and the azimuth takes its share.
        slack = kappa - 2 * beta
        s0 = 2 / (slack + (slack * slack + 8 * beta).sqrt()).clamp(min=1)
        rate = (slack + 2 * beta * s0).clamp(min=1e-6)
        point, done = torch.zeros(shape, dtype=kappa.dtype, device=kappa.device), torch.zeros_like(kappa, dtype=torch.bool)
        while not bool(done.all()):
            s = -torch.log1p(torch.rand_like(rate) * torch.expm1(-2 * rate)) / rate
            azimuth = 2 * math.pi * torch.rand_like(rate)
            round_ = s * (2 - s)
            log_accept = -beta * (s - s0) ** 2 + beta * round_ * ((2 * azimuth).cos() - 1)
            width = round_.clamp(min=0).sqrt()
            new = torch.stack([1 - s, width * azimuth.cos(), width * azimuth.sin()], -1)
            point = torch.where(done.unsqueeze(-1), point, new)
            done = done | (torch.rand_like(rate).log() < log_accept) | log_accept.isnan()  # unchecked parameters may be infinite or NaN
        return unit((frame @ point.unsqueeze(-1)).squeeze(-1)).to(self.frame)


def _log_kent(kappa: Tensor, beta: Tensor) -> Tensor:
    """``log c - kappa``, by quadrature in ``s = 1 - t``, with nodes that crowd at zero as the mass does."""
    nodes, weights = (t.to(kappa) for t in gauss_legendre(_NODES))
    spread = (1 + kappa).log().unsqueeze(-1)
    u = (nodes + 1) / 2 * spread.clamp(min=1e-3)
    whole = torch.expm1(spread.clamp(min=1e-3))
    s = 2 * torch.expm1(u) / whole
    log_weight = (weights / 2 * spread.clamp(min=1e-3) * 2 * u.exp() / whole).log()
    slack, b = (kappa - 2 * beta).unsqueeze(-1), beta.unsqueeze(-1)
    inside = torch.special.i0e(b * s * (2 - s)).log()
    return math.log(2 * math.pi) + torch.logsumexp(log_weight - slack * s - b * s * s + inside, -1)
