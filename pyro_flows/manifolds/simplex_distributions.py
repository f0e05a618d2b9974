"""Distributions of compositions beyond Dirichlet's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from ..errors import ShapeError
from .charts import ILR, positive_exp
from .distribution import ManifoldDistribution, check_lower, check_matrix, require, together
from .geometry import Simplex

__all__ = ["SimplicialGeneralizedBeta", "LogisticNormal", "GeneralizedDirichlet"]


class SimplicialGeneralizedBeta(ManifoldDistribution):
    r"""A Dirichlet variable, recalibrated: :math:`q = \mathrm{softmax}(a^{-1}\log p + c)` with :math:`p \sim \mathrm{Dir}(\alpha)`.

    .. math:: p(q) = |a|^{n-1} \frac{\Gamma(\sum_i \alpha_i)}{\prod_i \Gamma(\alpha_i)} \prod_i \frac{p_i^{\alpha_i}}{q_i}, \qquad
        p = \mathrm{softmax}(a(\log q - c))

    under Lebesgue measure of the first :math:`n - 1` parts. :math:`a = 1, c = 0` is Dirichlet's, and :math:`\alpha = 1, a < 0` the Concrete
    distribution of temperature :math:`-a`. Maximum likelihood is ill-posed: :math:`a \to \infty` with :math:`\alpha \to 0` collects density at single
    points, so give the parameters priors.

    Args:
        concentration: :math:`\alpha > 0`, ``(*batch, n)``.
        temperature: :math:`a`, ``(*batch,)``, not zero.
        shift: :math:`c`, ``(*batch, n)``; adding one number to all parts has no effect. Zero when omitted.

    Raises:
        OptionError: a concentration that is not positive, or a temperature of zero. ShapeError: shapes that do not broadcast.

    Reference: Simplicial generalized beta regression (Graf, 2017), https://doi.org/10.1007/978-3-319-44811-4
    """

    has_rsample = True
    arg_constraints = {"concentration": constraints.independent(constraints.positive, 1), "shift": constraints.real_vector}
    parameter_dims = {"concentration": 1, "temperature": 0, "shift": 1}

    def __init__(
        self, concentration: Tensor, temperature: Tensor | float = 1.0, shift: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        name = "SimplicialGeneralizedBeta"
        given = {"concentration": (concentration, 1), "temperature": (temperature, 0), "shift": (concentration * 0 if shift is None else shift, 1)}
        (self.concentration, self.temperature, self.shift), batch = together(name, given)
        if self.shift.shape != self.concentration.shape:
            raise ShapeError(f"{name}: concentration and shift have {self.concentration.shape[-1]} and {self.shift.shape[-1]} parts")
        super().__init__(Simplex(self.concentration.shape[-1]), batch, validate_args)
        if self._validate_args:
            require(self.concentration > 0, f"{name}: concentration must be positive")
            require(self.temperature != 0, f"{name}: temperature must not be zero")

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_q, alpha, a = value.log(), self.concentration, self.temperature
        log_p = (a.unsqueeze(-1) * (log_q - self.shift)).log_softmax(-1)
        norm = torch.lgamma(alpha.sum(-1)) - torch.lgamma(alpha).sum(-1) + (self.manifold.size - 1) * a.abs().log()
        return norm + (alpha * log_p).sum(-1) - log_q.sum(-1)

    def _draw(self, shape: torch.Size) -> Tensor:
        log_p = _log_gamma(self.concentration.expand(shape))  # up to what a softmax takes away
        return positive_exp((log_p / self.temperature.unsqueeze(-1) + self.shift).log_softmax(-1))


def _log_gamma(alpha: Tensor) -> Tensor:
    """Logarithms of gamma variables, which themselves underflow for small ``alpha``: one of ``alpha + 1``, times a uniform one to ``1 / alpha``."""
    more = torch.distributions.Gamma(alpha + 1, torch.ones_like(alpha), validate_args=False).rsample()
    return more.log() - torch.empty_like(more).exponential_() / alpha


class LogisticNormal(ManifoldDistribution):
    r"""A normal vector in isometric log-ratio coordinates: :math:`p = \mathrm{softmax}(Tz)`, :math:`z \sim N(m, LL^\top)`.

    .. math:: \log p(p) = \log N(T^\top\log p;\ m, LL^\top) - \tfrac12\log n - \sum_i \log p_i

    under Lebesgue measure of the first :math:`n - 1` parts. No part is special, unlike in torch's distribution of the same name, which breaks sticks.

    Args:
        loc: :math:`m`, ``(*batch, n - 1)``.
        scale_tril: the lower triangular :math:`L`, ``(*batch, n - 1, n - 1)``, with a positive diagonal.

    Raises:
        ShapeError: shapes that do not fit. OptionError: entries above the diagonal, or one on it that is not positive.

    Reference: The statistical analysis of compositional data (Aitchison, 1982), https://doi.org/10.1111/j.2517-6161.1982.tb01195.x
    """

    has_rsample = True
    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    parameter_dims = {"loc": 1, "scale_tril": 2}

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        (self.loc, self.scale_tril), batch = together("LogisticNormal", {"loc": (loc, 1), "scale_tril": (scale_tril, 2)})
        check_matrix("LogisticNormal", "scale_tril", self.scale_tril, self.loc.shape[-1])
        super().__init__(Simplex(self.loc.shape[-1] + 1), batch, validate_args)
        if self._validate_args:
            require(self.scale_tril.diagonal(dim1=-2, dim2=-1) > 0, "LogisticNormal: scale_tril must have a positive diagonal")
            check_lower("LogisticNormal", "scale_tril", self.scale_tril)

    @property
    def _normal(self) -> torch.distributions.MultivariateNormal:
        return torch.distributions.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_p = value.log()
        return self._normal.log_prob(ILR(self.manifold.size).coordinates(log_p)) - 0.5 * math.log(self.manifold.size) - log_p.sum(-1)

    def _draw(self, shape: torch.Size) -> Tensor:
        z = self._normal.rsample(shape[: len(shape) - self.loc.dim()])
        return ILR(self.manifold.size)(z)


class GeneralizedDirichlet(ManifoldDistribution):
    r"""Sticks broken off one after the other by independent beta variables: :math:`p_i = v_i \prod_{j<i}(1 - v_j)`.

    :math:`v_i \sim \mathrm{Beta}(a_i, b_i)`. Parts may be positively correlated, which Dirichlet's cannot
    (the case :math:`b_i = \sum_{j>i}\alpha_j`). Densities are under Lebesgue
    measure of the first :math:`n - 1` parts.

    Args:
        concentration1, concentration0: :math:`a` and :math:`b`, positive, ``(*batch, n - 1)``.

    Raises:
        OptionError: parameters that are not positive. ShapeError: shapes that do not broadcast.

    Reference: Concepts of independence for proportions with a generalization of the Dirichlet distribution (Connor & Mosimann, 1969),
    https://doi.org/10.1080/01621459.1969.10500963
    """

    has_rsample = True
    arg_constraints = {
        "concentration1": constraints.independent(constraints.positive, 1),
        "concentration0": constraints.independent(constraints.positive, 1),
    }
    parameter_dims = {"concentration1": 1, "concentration0": 1}

    def __init__(self, concentration1: Tensor, concentration0: Tensor, validate_args: bool | None = None) -> None:
        name = "GeneralizedDirichlet"
        given = {"concentration1": (concentration1, 1), "concentration0": (concentration0, 1)}
        (self.concentration1, self.concentration0), batch = together(name, given)
        if self.concentration1.shape != self.concentration0.shape:
            raise ShapeError(f"{name}: the concentrations have {self.concentration1.shape[-1]} and {self.concentration0.shape[-1]} entries")
        super().__init__(Simplex(self.concentration1.shape[-1] + 1), batch, validate_args)
        if self._validate_args:
            require((self.concentration1 > 0) & (self.concentration0 > 0), f"{name}: both concentrations must be positive")

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_p, a, b = value.log(), self.concentration1, self.concentration0
        rest = log_p.flip(-1).logcumsumexp(-1).flip(-1)  # of each part and all after it
        before, after = rest[..., :-1], rest[..., 1:]
        before = F.pad(before[..., 1:], (1, 0))  # all together are one
        norm = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return (norm + (a - 1) * (log_p[..., :-1] - before) + (b - 1) * (after - before) - before).sum(-1)

    def _draw(self, shape: torch.Size) -> Tensor:
        gammas = _log_gamma(torch.stack([self.concentration1, self.concentration0], -1).expand(*shape[:-1], -1, -1))
        log_v, log_rest = gammas.log_softmax(-1).unbind(-1)
        return positive_exp(F.pad(log_v, (0, 1)) + F.pad(log_rest.cumsum(-1), (1, 0)))
