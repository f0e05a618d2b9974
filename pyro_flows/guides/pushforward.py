"""A site's draw as an automatic guide reports it: a point with a log density, which every ELBO must read in the same way."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from pyro.distributions.distribution import Distribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import register_kl

__all__ = ["Pushforward", "AsPushforward"]


class Pushforward(dist.Delta):
    """A ``Delta`` whose ``log_density`` is the Jacobian of a map that has no parameters, taken at the point.

    Where the point is a constant, so is the density: reweighted wake-sleep detaches the draws that it scores, and a plain ``Delta`` would let
    gradients through all the same. And the density counts in the Kullback-Leibler divergence, from which Pyro drops it for a plain ``Delta``:
    ``TraceMeanField_ELBO`` would be wrong by the sites' Jacobians.
    """

    def log_prob(self, x: Tensor) -> Tensor:
        log_prob = super().log_prob(x)
        return log_prob if x.requires_grad else log_prob.detach()


@register_kl(Pushforward, Distribution)
def _kl_pushforward(p: Pushforward, q: Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)


class AsPushforward(Messenger):
    """Makes a :class:`Pushforward` of every ``Delta`` that is sampled in its context."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if isinstance(fn, dist.Delta):
            msg["fn"] = Pushforward(fn.v, fn.log_density, fn.event_dim)
