"""Importance weights: their effective sample size, Pareto smoothing and tail index."""

from __future__ import annotations

import math

import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from ..errors import ShapeError

__all__ = ["as_vector", "ess_fraction", "khat_limit", "psis"]

_FEWEST_DRAWS = 25  # of which a tail can be told
_FEWEST_TAIL = 5  # weights above the cutoff that a tail is fitted to
_EQUAL_NATS = 1e-6  # log weights that differ by less are equal to rounding


def khat_limit(num_samples: int) -> float:
    """The k-hat above which importance-weighted averages of S draws cannot be trusted: ``min(1 - 1/log10 S, 0.7)``.

    Reference: Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry, 2024),
    https://arxiv.org/abs/1507.02646

    Example:
        >>> khat_limit(10_000), round(khat_limit(1000), 2)
        (0.7, 0.67)
    """
    return min(1 - 1 / math.log10(max(num_samples, 11)), 0.7)


def ess_fraction(log_weights: Tensor) -> float:
    r"""Effective fraction of weighted draws, :math:`(\sum w)^2 / (N \sum w^2)`.

    The means of raw draws are off by at most :math:`\sqrt{1/\text{ESS} - 1}` standard deviations of the guide
    (Cauchy-Schwarz), if the draws have seen all of the posterior.

    Args:
        log_weights: ``(N,)``, nats, up to a constant. Weights that are not finite count as zero.

    Returns:
        A number in ``[1/N, 1]``; 0 where no weight is finite.

    Example:
        >>> import torch
        >>> ess_fraction(torch.zeros(100)), round(ess_fraction(torch.tensor([0.0, -1e9])), 3)
        (1.0, 0.5)
    """
    log_weights = as_vector("log_weights", log_weights)
    finite = log_weights[torch.isfinite(log_weights)]
    if not len(finite):
        return 0.0
    log_ess = 2 * torch.logsumexp(finite, 0) - torch.logsumexp(2 * finite, 0)
    return min(1.0, log_ess.exp().item() / len(log_weights))


def psis(log_weights: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed importance weights and the tail index k-hat.

    The largest ``min(N / 5, 3 sqrt(N))`` weights are replaced by the expected order statistics of a generalized Pareto distribution fitted to them,
    and none exceeds the largest raw weight. Pyro fits the distribution; its k-hat has the paper's weak prior, worth ten draws at 0.5.

    Args:
        log_weights: ``(N,)``, nats, up to a constant; finite.

    Returns:
        Smoothed log weights ``(N,)`` whose exponentials sum to one, and k-hat. By convention k-hat is 0 where all
        weights are equal to rounding (there is no tail), and ``inf`` with fewer than 25 draws (no tail to fit).

    Cost: a sort, and ``(30 + sqrt(M)) M`` logarithms for the ``M`` largest weights.

    Reference: Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry, 2024),
    https://arxiv.org/abs/1507.02646

    Example:
        >>> import torch
        >>> smoothed, khat = psis(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
        >>> round(smoothed.exp().sum().item(), 6), khat < 0.7
        (1.0, True)
    """
    log_weights = as_vector("log_weights", log_weights)
    if not bool(torch.isfinite(log_weights).all()):
        raise ShapeError("psis: log_weights must be finite; drop the others first, as evaluate() does")
    plain = log_weights - torch.logsumexp(log_weights, 0)
    if len(plain) < _FEWEST_DRAWS:
        return plain, math.inf
    if (plain.max() - plain.min()).item() < _EQUAL_NATS:
        return plain, 0.0
    smoothed, khat = _smooth(plain - plain.max())
    if math.isinf(khat):  # fewer than five weights stand out, of a level tail or of weights that vanish beside them
        khat = 0.0 if ess_fraction(plain) > 0.5 else math.inf
    return smoothed - torch.logsumexp(smoothed, 0), khat


def _smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    """Log weights, of which the largest is 0, with their upper tail smoothed, and k-hat: ``inf`` where too few stand out to fit a tail."""
    count = math.ceil(min(len(log_weights) / 5, 3 * len(log_weights) ** 0.5))
    cutoff = log_weights.sort().values[-count - 1].clamp(min=math.log(torch.finfo(log_weights.dtype).tiny))
    tail = (log_weights > cutoff).nonzero()[:, 0]
    if len(tail) < _FEWEST_TAIL:
        return log_weights, math.inf
    tail = tail[log_weights[tail].argsort()]
    # Excesses over the cutoff in units of the cutoff: neither cancels, and both stay in a float's range.
    khat, sigma = fit_generalized_pareto((log_weights[tail] - cutoff).expm1().cpu())
    chance = (torch.arange(len(tail), dtype=cutoff.dtype, device=cutoff.device) + 0.5) / len(tail)
    excess = -torch.log1p(-chance) if abs(khat) < torch.finfo(cutoff.dtype).eps else (-khat * torch.log1p(-chance)).expm1() / khat
    smoothed = log_weights.clone()
    smoothed[tail] = (cutoff + (sigma * excess).log1p()).clamp(max=0.0)
    return smoothed, khat


def as_vector(name: str, value: Tensor) -> Tensor:
    """A detached float64 vector, or an error."""
    value = torch.as_tensor(value)
    if value.dim() != 1 or not len(value):
        raise ShapeError(f"{name} must be a vector of at least one draw, got shape {tuple(value.shape)}")
    return value.detach().to(torch.float64)
