"""Lower and upper bounds of a log density from weighted paths, and the gradients that suit them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import OptionError
from .layer import log_total
from .path_model import PathModel

__all__ = ["GRADIENTS", "log_mean_exp", "lower_bound", "upper_bound"]

GRADIENTS = ("total", "stl", "dreg", "rws")
_REPARAMETERIZED = ("stl", "dreg")  # those that go through the draws of indices


def log_mean_exp(log_weight: Tensor) -> Tensor:
    """``log mean_i w_i`` over the first dimension; where all are zero it has no gradient, rather than one that is not a number."""
    return log_total(log_weight.movedim(0, -1)) - math.log(log_weight.shape[0])


def _others(values: Tensor, scan: Callable[[Tensor, int], Tensor], join: Callable[[Tensor, Tensor], Tensor], nothing: float) -> Tensor:
    """For each entry along the first dimension the sum of all others: a running sum from below, joined to one from above."""
    edge = torch.full_like(values[:1], nothing)
    below, above = torch.cat([edge, scan(values[:-1], 0)]), torch.cat([scan(values[1:].flip(0), 0).flip(0), edge])
    return join(below, above)


def _leave_one_out(log_weight: Tensor) -> Tensor:
    """What each path adds to the bound, against its replacement by the geometric mean of the others; the log weight itself for a single path.

    The sum of the others is made without the path, not as a difference: a baseline that saw the path it is for would bias the gradient.
    """
    count = log_weight.shape[0]
    if count == 1:
        return log_weight
    mean = _others(log_weight, torch.cumsum, torch.add, 0.0) / (count - 1)
    baseline = torch.logaddexp(_others(log_weight, torch.logcumsumexp, torch.logaddexp, -torch.inf), mean)
    baseline = torch.where(baseline > -torch.inf, baseline, torch.zeros_like(baseline))  # no other path is possible: any constant will do
    return log_weight.logsumexp(0) - baseline


class _Call(nn.Module):
    """``PathModel.log_weight`` as a module call, for ``functional_call``."""

    def __init__(self, flow: PathModel) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Any]:
        return self.flow.log_weight(*args)


def _constant(flow: PathModel, *args: Any) -> tuple[Tensor, Tensor]:
    """``log p(x, u)`` and ``log q(u | x)`` with all parameters held fixed."""
    fixed: Mapping[str, Tensor] = {f"flow.{name}": t.detach() for name, t in flow.named_parameters()}
    return functional_call(_Call(flow), dict(fixed), args)[:2]


def lower_bound(flow: PathModel, x: Tensor, context: Tensor | None = None, num_particles: int = 1, gradient: str = "total") -> Tensor:
    r"""The importance-weighted bound :math:`\log \frac1m \sum_i p(x, u_i) / q(u_i \mid x)`, ``(*batch,)``; the ELBO for one particle.

    Its mean is at most :math:`\log p(x)`, rises with ``num_particles`` and tends to it. The value does not depend on ``gradient``:

    - ``"total"``: that of the bound itself; through continuous indices by reparameterisation, for discrete ones by the score function with the
      leave-one-out baseline of VIMCO. Unbiased, noisy for discrete indices.
    - ``"stl"``: sticking the landing, that of the ELBO without the score of ``q``; continuous indices and one particle only, where it is unbiased.
    - ``"dreg"``: doubly reparameterised; unbiased for any number of particles, and its signal does not drown in noise as they increase.
      Continuous indices only.
    - ``"rws"``: that of the joint density under the normalised weights, :math:`\sum_i \tilde w_i \nabla \log p(x, u_i)`; ``q`` is not trained. It
      tends to the gradient of the log density itself as the particles increase.

    Raises:
        OptionError: a gradient that is not known, or that does not suit the flow's indices.

    References: Importance weighted autoencoders (Burda et al., 2015), https://arxiv.org/abs/1509.00519; Variational inference for Monte Carlo
    objectives (Mnih & Rezende, 2016), https://arxiv.org/abs/1602.06725; Sticking the landing (Roeder et al., 2017), https://arxiv.org/abs/1703.09194;
    Doubly reparameterized gradient estimators (Tucker et al., 2018), https://arxiv.org/abs/1810.04152
    """
    _check_options(flow, num_particles, gradient)
    if flow.exact:
        return flow.log_lower(x, context)
    x = x.expand(num_particles, *x.shape)
    context = None if context is None else context.expand(num_particles, *context.shape)
    log_p, log_q, path = flow.log_weight(x, context)
    bound = log_mean_exp(log_p - log_q)
    if not bound.requires_grad or not torch.is_grad_enabled() or (gradient == "total" and True not in flow.inferred_kinds):
        return bound
    if gradient == "total":
        if False in flow.inferred_kinds:
            raise OptionError("gradient='total' needs indices of one kind, and this flow infers discrete and continuous ones: use 'rws'")
        surrogate = _score(log_p, log_q)
        return bound + (surrogate - surrogate.detach())
    surrogate = _weighted(flow, x, context, path.indices, (log_p - log_q).detach(), gradient)
    return bound.detach() + (surrogate - surrogate.detach())


def _check_options(flow: PathModel, num_particles: int, gradient: str) -> None:
    """Raise an ``OptionError`` for what is not known, or would give this flow a biased gradient."""
    if gradient not in GRADIENTS:
        raise OptionError(f"gradient={gradient!r} is not known: choose one of {', '.join(GRADIENTS)}")
    if not isinstance(num_particles, int) or num_particles < 1:
        raise OptionError(f"num_particles must be a positive integer, got {num_particles!r}")
    if flow.exact:
        return
    if gradient in _REPARAMETERIZED and True in flow.inferred_kinds:
        raise OptionError(f"gradient={gradient!r} needs continuous indices, and this flow infers discrete ones: use 'rws' or 'total'")
    stopped = any(not layer.reparameterized and not layer.discrete for layer in flow.stochastic)
    if gradient != "rws" and stopped and torch.is_grad_enabled():
        raise OptionError(f"gradient={gradient!r} would leave out what a Metropolis chain accepts, and be biased: use 'rws'")
    if gradient == "stl" and num_particles > 1:
        raise OptionError("gradient='stl' is unbiased for one particle only: use 'dreg'")


def _score(log_p: Tensor, log_q: Tensor) -> Tensor:
    """What has the score-function gradient of the bound as its own, for discrete indices."""
    signal = _leave_one_out((log_p - log_q).detach())
    return (torch.where(signal.isfinite(), signal, torch.zeros_like(signal)) * log_q).sum(0)  # nothing to learn where no path is possible


def _weighted(
    flow: PathModel, x: Tensor, context: Tensor | None, indices: tuple[Tensor, ...], log_weight: Tensor, gradient: str
) -> Tensor:
    """What has the gradient under the normalised weights as its own: that of the joint density and, but for ``"rws"``, of the draws of indices."""
    share = log_weight.softmax(0).nan_to_num(0.0)  # where no path is possible
    joint = flow.log_weight(x, context, tuple(u.detach() for u in indices))[0]  # of constant indices
    surrogate = (share * torch.where(share > 0, joint, torch.zeros_like(joint))).sum(0)  # an impossible path weighs nothing
    if gradient in _REPARAMETERIZED:
        p, q = _constant(flow, x.detach(), None if context is None else context.detach(), indices)  # the path through the indices alone
        surrogate = surrogate + (share**2 * (p - q)).sum(0)
    return surrogate


def upper_bound(flow: PathModel, x: Tensor, indices: Sequence[Tensor], num_particles: int = 16, context: Tensor | None = None) -> Tensor:
    r"""The hierarchical importance-weighted upper bound of the log density at the flow's own draws, ``(*batch,)``.

    .. math:: \log p(x) \le E \log \frac{1}{M+1} \sum_{m=0}^{M} \frac{p(x, u_m)}{q(u_m \mid x)}, \qquad u_0 \text{ the path of the draw}, \quad
        u_{1:M} \sim q(u \mid x)

    With fresh paths alone the estimate is too low on average, and an evidence bound from it too high; the draw's own path turns that around. The
    reciprocal averages to :math:`1/p(x)` exactly, so weights of importance sampling that are made of it stay unbiased.

    Args:
        flow: the flow.
        x: its draws, ``(*batch, D)``.
        indices: the inferred layers' indices of the paths that the draws took, base to target.
        num_particles: fresh paths :math:`M`; with 0 it is the bound of the auxiliary variables alone.

    Reference: Importance weighted hierarchical variational inference (Sobolev & Vetrov, 2019), https://arxiv.org/abs/1905.03290
    """
    log_p, log_q, _ = flow.log_weight(x, context, indices)
    weights = (log_p - log_q).unsqueeze(0)
    if num_particles:
        again = x.expand(num_particles, *x.shape)
        log_p, log_q, _ = flow.log_weight(again, None if context is None else context.expand(num_particles, *context.shape))
        weights = torch.cat([weights, log_p - log_q])
    return log_mean_exp(weights)
