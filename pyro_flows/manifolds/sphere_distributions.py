"""Distributions around a direction: uniform, von Mises-Fisher, power spherical."""

from __future__ import annotations

import math

import torch
from pyro.distributions import constraints
from torch import Tensor

from ..numerics import log_bessel
from .distribution import ManifoldDistribution, UniformOn, require, together
from .geometry import Sphere
from .sphere_maps import dot, unit
from .transform import widened

__all__ = ["UniformSphere", "VonMisesFisher", "PowerSpherical"]


class UniformSphere(UniformOn):
    r"""The uniform distribution on the sphere :math:`S^{n-1}`: log density :math:`-\log\Omega_n` under surface measure.

    Args:
        n: number of coordinates.
        dtype, device: of the draws and densities.

    Example:
        >>> round(UniformSphere(3).log_prob(torch.tensor([0.0, 0.0, 1.0])).exp().item() * 4 * math.pi, 6)
        1.0
    """

    def __init__(self, n: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None, validate_args: bool | None = None) -> None:
        super().__init__(Sphere(n), dtype, device, validate_args)

    @property
    def mean(self) -> Tensor:
        return self.zero


class _Around(ManifoldDistribution):
    """A density that depends on the angle to a direction ``loc`` alone. Subclasses draw ``1 - t`` for the height ``t`` over it."""

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}
    parameter_dims = {"loc": 1, "concentration": 0}
    loc: Tensor
    concentration: Tensor

    def __init__(self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = None) -> None:
        name = type(self).__name__
        (self.loc, self.concentration), batch = together(name, {"loc": (loc, 1), "concentration": (concentration, 0)})
        super().__init__(Sphere(self.loc.shape[-1]), batch, validate_args)
        if self._validate_args:
            self.manifold.check(self.loc, f"{name}: loc")
            require(self.concentration >= 0, f"{name}: concentration must not be negative")

    def _gap(self, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def _draw(self, shape: torch.Size) -> Tensor:
        loc, gap = widened(self.loc, self._gap(shape[:-1]))
        around = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        around = unit(around - dot(around, loc) * loc)
        gap = gap.unsqueeze(-1)
        return unit((1 - gap) * loc + (gap * (2 - gap)).clamp(min=torch.finfo(gap.dtype).tiny).sqrt() * around).to(self.loc)


_NEARLY_UNIFORM = 1e-5  # concentration below which two terms of a power series are exact enough


class VonMisesFisher(_Around):
    r"""The von Mises-Fisher distribution: log density :math:`\kappa\,\mu^\top x - \log C(\kappa)` under surface measure.

    .. math:: \log C = \tfrac n2\log 2\pi + \log I_{n/2-1}(\kappa) - (\tfrac n2 - 1)\log\kappa

    For any concentration, zero (the uniform distribution) and tens of thousands included, and any dimension. For :math:`n = 3` draws are a formula
    of uniform numbers and can be differentiated; otherwise they are drawn by rejection (Wood's method), whose gradient would be biased, and
    ``has_rsample`` is false: :class:`PowerSpherical` can be differentiated for every :math:`n`.

    Args:
        loc: the mean direction :math:`\mu`, ``(*batch, n)``, of length one.
        concentration: :math:`\kappa \ge 0`, ``(*batch,)``.

    Raises:
        SupportError: ``loc`` is not of length one. OptionError: a concentration that is negative or not finite.

    Example:
        >>> d = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 2.0)
        >>> d.mean  # coth(2) - 1/2 along loc
        tensor([0.0000, 0.0000, 0.5373])

    References: Directional statistics (Mardia & Jupp, 2000), https://doi.org/10.1002/9780470316979;
    Simulation of the von Mises Fisher distribution (Wood, 1994), https://doi.org/10.1080/03610919408813161
    """

    @property
    def has_rsample(self) -> bool:
        """Only for ``n = 3``."""
        return self.loc.shape[-1] == 3

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, loc, kappa = widened(value, self.loc, self.concentration)
        away = x - loc
        log_density = -self.manifold.log_volume - log_bessel(self.manifold.size / 2 - 1, kappa) - kappa / 2 * (away * away).sum(-1)
        return log_density.to(value)

    @property
    def mean(self) -> Tensor:
        n, (kappa,) = self.manifold.size, widened(self.concentration)
        length = kappa / n * (log_bessel(n / 2, kappa) - log_bessel(n / 2 - 1, kappa)).exp()
        return length.to(self.loc).unsqueeze(-1) * self.loc

    def _gap(self, shape: torch.Size) -> Tensor:
        (kappa,) = widened(self.concentration)
        if self.manifold.size == 3:
            u = torch.rand(shape, dtype=kappa.dtype, device=kappa.device)
            some = kappa.clamp(min=_NEARLY_UNIFORM)
            gap = -torch.log1p(u * torch.expm1(-2 * some)) / some
            return torch.where(kappa < _NEARLY_UNIFORM, 2 * u * (1 - (1 - u) * kappa), gap)
        return _wood(kappa.expand(shape), self.manifold.size)


@torch.no_grad()
def _wood(kappa: Tensor, n: int) -> Tensor:
    """``1 - t`` for the height ``t`` of von Mises-Fisher draws, by rejection from a Moebius image of the uniform distribution."""
    b = (n - 1) / (2 * kappa + (4 * kappa * kappa + (n - 1) ** 2).sqrt())
    x0 = (1 - b) / (1 + b)
    log_top = torch.log(4 * b / (1 + b) ** 2)  # of 1 - x0^2
    beta = torch.distributions.Beta(torch.full_like(kappa, (n - 1) / 2), torch.full_like(kappa, (n - 1) / 2), validate_args=False)
    gap, done = torch.zeros_like(kappa), torch.zeros_like(kappa, dtype=torch.bool)
    while not bool(done.all()):
        z = beta.sample()
        new = 2 * b * z / (1 - (1 - b) * z)
        # kappa (t - x0) + (n - 1) (log(1 - x0 t) - log(1 - x0^2)), with 1 - x0 = 2 b / (1 + b) and 1 - x0 t = 1 - x0 + x0 (1 - t)
        low = 2 * b / (1 + b)
        log_accept = kappa * (low - new) + (n - 1) * ((low + x0 * new).log() - log_top)
        fits = torch.rand_like(z).log() < log_accept
        gap, done = torch.where(done, gap, new), done | fits | log_accept.isnan()  # unchecked concentrations may be infinite or NaN
    return gap


class PowerSpherical(_Around):
    r"""The power spherical distribution: density proportional to :math:`(1 + \mu^\top x)^\kappa` under surface measure.

    Like von Mises and Fisher's, but its draws are a formula of a beta variable for every :math:`n`, and can be differentiated: the base or the
    guide to choose when a concentration is learned. The density is zero opposite to :math:`\mu`.

    Args:
        loc: the mean direction :math:`\mu`, ``(*batch, n)``, of length one.
        concentration: :math:`\kappa \ge 0`, ``(*batch,)``; zero is the uniform distribution.

    Raises:
        SupportError: ``loc`` is not of length one. OptionError: a concentration that is negative or not finite.

    Reference: The power spherical distribution (De Cao & Aziz, 2020), https://arxiv.org/abs/2006.04437
    """

    has_rsample = True

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, loc, kappa = widened(value, self.loc, self.concentration)
        b = (self.manifold.size - 1) / 2
        towards = ((x + loc) * (x + loc)).sum(-1) / 2  # 1 + loc . x, accurate at its zero
        norm = (2 * b + kappa) * math.log(2) + b * math.log(math.pi) + torch.lgamma(b + kappa) - torch.lgamma(2 * b + kappa)
        return (torch.xlogy(kappa, towards) - norm).to(value)

    @property
    def mean(self) -> Tensor:
        kappa = self.concentration
        return (kappa / (self.manifold.size - 1 + kappa)).unsqueeze(-1) * self.loc

    def _gap(self, shape: torch.Size) -> Tensor:
        (kappa,) = widened(self.concentration.expand(shape))
        b = torch.full_like(kappa, (self.manifold.size - 1) / 2)
        return 2 * torch.distributions.Beta(b, b + kappa, validate_args=False).rsample()
