"""Likelihoods whose log density picks entries by a mask of booleans, which ``vmap`` refuses, with one that does not."""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.utils import broadcast_all

__all__ = ["WithoutMasks"]


class _Multinomial(dist.Multinomial):
    """torch's, number for number."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        logits = torch.where((value == 0) & (logits == -torch.inf), 0.0, logits)
        return torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1) + (logits * value).sum(-1)


class WithoutMasks(Messenger):
    """Lets a model's ``Multinomial`` sites compute without masks, under whatever they are wrapped in."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _without_masks(msg["fn"])


def _without_masks(fn: Any) -> Any:
    if type(fn) is dist.Multinomial:
        return _with(fn, __class__=_Multinomial)
    base = getattr(fn, "base_dist", None)
    inner = base if base is None else _without_masks(base)
    return fn if inner is base else _with(fn, base_dist=inner)


def _with(fn: Any, **changed: Any) -> Any:
    new = copy.copy(fn)
    for name, value in changed.items():
        setattr(new, name, value)
    return new
