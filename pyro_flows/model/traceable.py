"""What a model does that ``vmap`` or a captured graph refuses, done in another way: the same numbers from operations that both take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.utils import broadcast_all
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.overrides import TorchFunctionMode

__all__ = ["Traceable", "traceable"]


@contextmanager
def traceable(z: Tensor, fills: bool) -> Iterator[None]:
    """What a model runs in while it is vmapped over particles ``z``, and while its operations are recorded; nothing at other times.

    Args:
        z: a particle.
        fills: whether tensors that the model makes and fills in place must be made for all particles.
    """
    with ExitStack() as stack:
        if torch._C._functorch.is_functorch_wrapped_tensor(z):
            if get_proxy_mode() is not None:
                stack.enter_context(_DataApart())
            if fills:
                stack.enter_context(_MadeForAll(z))
        yield


class _DataApart(TorchFunctionMode):
    """Keeps what depends on data alone out of the graph: it is computed once, as it is recorded, so that ``if censored[i]:`` can branch on it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in _tensors((args, kwargs))):
            return func(*args, **kwargs)
        with torch._C._DisableFuncTorch(), disable_proxy_modes_tracing():  # a plain result of plain tensors
            return func(*args, **kwargs)


_MAKERS = {
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.clone),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.clone),
}


class _MadeForAll(TorchFunctionMode):
    """Makes a tensor for all particles at once, so that values that differ between them can be written into it."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.particle = z.reshape(-1)[0].detach()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _MAKERS or not isinstance(made, Tensor):
            return made
        nothing = torch.zeros_like(self.particle, dtype=made.dtype, device=made.device)
        return made | nothing if made.dtype == torch.bool else made + nothing


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


class _Multinomial(dist.Multinomial):
    """torch's, number for number, without the mask of booleans that ``vmap`` refuses."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits, value = broadcast_all(self.logits, value)
        logits = torch.where((value == 0) & (logits == -torch.inf), 0.0, logits)
        return torch.lgamma(value.sum(-1) + 1) - torch.lgamma(value + 1).sum(-1) + (logits * value).sum(-1)


class Traceable(Messenger):
    """Gives a model's sites distributions that can be traced, under whatever they are wrapped in.

    ``Multinomial`` computes without masks; a distribution that was made before the fit loses the checks of values that it brings along, which branch
    on them (``expand`` copies the setting of its time into the distribution). Missing data behind a mask are filled by data that are not missing: the
    mask removes their density, but not the NaN of its slope.
    """

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = fn = _traceable(msg["fn"])
        if msg["is_observed"] and isinstance(msg["value"], Tensor) and not msg["value"].is_floating_point() and _is_discrete(fn):
            msg["value"] = msg["value"].to(torch.get_default_dtype())  # whole numbers of any dtype are outcomes of a Bernoulli
        if msg["is_observed"] and isinstance(msg["mask"], Tensor) and isinstance(msg["value"], Tensor) and msg["value"].is_floating_point():
            msg["value"] = _without_missing(msg["value"], msg["mask"], msg["fn"].event_dim)


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):  # a distribution that does not say
        return False


def _without_missing(value: Tensor, mask: Tensor, event_dim: int) -> Tensor:
    """Observed values with what is not finite behind the mask replaced by the first observation that is; no branch on any of them."""
    rows = value.reshape(-1, *value.shape[value.dim() - event_dim :])
    sound = torch.isfinite(rows).reshape(len(rows), -1).all(-1)
    filler = rows.index_select(0, sound.to(torch.uint8).argmax().reshape(1)).squeeze(0)
    shown = mask.reshape(mask.shape + (1,) * event_dim)
    return torch.where(shown | torch.isfinite(value), value, filler)


def _traceable(fn: Any) -> Any:
    changed: dict[str, Any] = {"__class__": _Multinomial} if type(fn) is dist.Multinomial else {}
    if vars(fn).get("_validate_args", False) and not torch.distributions.Distribution._validate_args:
        changed["_validate_args"] = False
    base = getattr(fn, "base_dist", None)
    inner = base if base is None else _traceable(base)
    if inner is not base:
        changed["base_dist"] = inner
    if not changed:
        return fn
    new = copy.copy(fn)
    for name, value in changed.items():
        setattr(new, name, value)
    return new
