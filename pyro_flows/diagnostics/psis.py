"""Importance weights: their effective sample size, Pareto smoothing and tail index."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ShapeError

__all__ = ["as_vector", "ess_fraction", "khat_limit", "psis"]


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
    """Pareto-smoothed importance weights and the tail index k-hat, by ArviZ (0.x and 1.x).

    Args:
        log_weights: ``(N,)``, nats, up to a constant; finite.

    Returns:
        Smoothed log weights ``(N,)`` whose exponentials sum to one, and k-hat. By convention k-hat is 0 where all
        weights are equal to rounding (there is no tail), and ``inf`` with fewer than 25 draws (no tail to fit).

    Cost: a sort. Needs ArviZ, imported on the first call.

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
    if len(plain) < 25:
        return plain, math.inf
    if (plain.max() - plain.min()).item() < 1e-6:
        return plain, 0.0
    try:
        with np.errstate(over="ignore"):  # weights that spread over more than a float's range, which k-hat will say
            smoothed, khat = _arviz_psislw()(plain.cpu().numpy().copy())
    except ValueError:  # arviz 1.x, where the whole tail is one value
        return plain, 0.0
    result = torch.as_tensor(np.asarray(smoothed), dtype=plain.dtype, device=plain.device)
    khat = float(khat)
    if math.isinf(khat):  # arviz 0.x: fewer than five weights stand out, of a level tail or of weights that vanish beside them
        khat = 0.0 if ess_fraction(plain) > 0.5 else math.inf
    return result - torch.logsumexp(result, 0), khat


def _arviz_psislw() -> Callable[[Any], tuple[Any, Any]]:
    """ArviZ's PSIS as a function of log weights, wherever this version keeps it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces its successor on import
        import arviz
    if hasattr(arviz, "psislw"):
        return arviz.psislw
    from arviz_stats.base import array_stats

    def psislw(log_weights: Any) -> tuple[Any, Any]:
        smoothed, khat = array_stats.psislw(-log_weights)  # 1.x negates its argument, a log likelihood
        if smoothed[log_weights.argmax()] < smoothed[log_weights.argmin()]:  # should a version not do so
            smoothed, khat = array_stats.psislw(log_weights)
        return smoothed, khat

    return psislw


def as_vector(name: str, value: Tensor) -> Tensor:
    """A detached float64 vector, or an error."""
    value = torch.as_tensor(value)
    if value.dim() != 1 or not len(value):
        raise ShapeError(f"{name} must be a vector of at least one draw, got shape {tuple(value.shape)}")
    return value.detach().to(torch.float64)
