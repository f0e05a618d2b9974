"""The guide and the log joint density of a model and its data, with a look at whether they can be fitted at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, PyroFlowsError, ShapeError, SupportError
from ..guides import AutoFlow, auto_guide
from ..manifolds.supports import complaint, contains
from ..model.inputs import explained, not_finite
from ..model.log_joint import LogJoint
from ..model.sites import init_near_zero

__all__ = ["set_up"]

_PROBES = 16  # draws of the guide at which the density must be finite
_RADII = (0.1, 1.0, 2.0)  # in unconstrained space, around zero: where to start if the density is not finite around the prior's median
_MASK = (
    "Remove those rows, make them latent sites, or hide them from the likelihood: obs=torch.where(ok, y, 0.0) inside poutine.mask(mask=ok), "
    "or obs_mask=ok"
)


def set_up(
    model: Callable[..., Any], guide: AutoFlow | dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[AutoFlow, LogJoint]:
    """Run the model once, make the guide's parameters and the log joint density, and look whether the start is possible.

    Where options are given instead of a guide, the guide that suits the model's supports is made with them, around the prior's median or, if the
    density is not finite there, around zero in unconstrained space.

    Raises:
        ModelError: the model fails, has nothing to infer, or has no finite density near the start.
        ShapeError: data that do not line up with their likelihood.
        SupportError: a site without a bijection from the reals.
        DtypeError: the model mixes dtypes or devices.
    """
    missing = not_finite(args, kwargs)
    starts = [{}] if isinstance(guide, AutoFlow) else [{}, *({"init_loc_fn": init_near_zero(radius)} for radius in _RADII)]
    try:
        for start in starts:
            with explained(dtype):
                made = guide if isinstance(guide, AutoFlow) else auto_guide(model, args, kwargs, **guide, **start)
                made = made.setup(*args, **kwargs).to(dtype)
                log_joint = LogJoint(model, made, args, kwargs)
                values, slopes = _values_and_slopes(log_joint, made.flow().sample((_PROBES,)))
            possible = bool((torch.isfinite(values) & torch.isfinite(slopes).all(-1)).any())
            if possible or missing:
                break
        _check_sites(made, log_joint)
        _check_observations(log_joint)
    except PyroFlowsError as error:
        if missing:
            raise ModelError(f"{missing}, and the model cannot be evaluated with them. {_MASK}") from error
        raise
    if not possible:
        if missing:
            raise ModelError(f"{missing}, and so is the model's log density or its gradient. {_MASK}")
        raise ModelError(
            f"the log joint density is not finite at {_PROBES} draws around the initial point{_culprits(log_joint)}: check the data against the "
            "likelihood's support, or start elsewhere with AutoFlow(model, init_loc_fn=...)"
        )
    return made, log_joint


def _values_and_slopes(log_joint: LogJoint, z: Tensor) -> tuple[Tensor, Tensor]:
    """The log joint density ``(N,)`` and its gradients ``(N, d)`` at some points."""
    values, pull = torch.func.vjp(log_joint, z.detach())  # type: ignore[misc]
    return values, pull(torch.ones_like(values))[0]


def _check_sites(guide: AutoFlow, log_joint: LogJoint) -> None:
    """Raise a ``ModelError`` that names sites of the guide that the model does not have: they would be fitted to nothing."""
    extra = [repr(site.name) for site in guide.sites if site.name not in log_joint.trace.nodes]
    if extra:
        raise ModelError(f"the guide has site(s) {', '.join(extra)}, which the model lacks: make the guide from the model that is fitted")


def _check_observations(log_joint: LogJoint) -> None:
    """Raise an error that names the site when data do not fit their likelihood: nothing checks it while a model is vmapped."""
    for name, site in log_joint.trace.nodes.items():
        if name in log_joint.likelihood_sites:
            _check_shape(name, site)
            try:
                inside = contains(site["fn"].support, site["value"])
                if bool(torch.isfinite(site["log_prob_sum"])):  # of data that are missing, for a distribution that knows what to do with them
                    missing = site["value"].isnan()
                    inside = inside | missing.reshape(*inside.shape, -1).any(-1)
            except (NotImplementedError, AttributeError):  # a distribution that does not say
                continue
            if not bool(inside.all()) and _is_fixed(log_joint, name):
                raise SupportError(f"site {name!r}, observed: {complaint(site['fn'].support, site['value'])}")


def _is_fixed(log_joint: LogJoint, name: str) -> bool:
    """Whether a site's support is the same at another point of the latent space."""
    other = log_joint.trace_at(log_joint.guide.flow().sample()).nodes[name]["fn"].support
    pairs = zip(vars(log_joint.trace.nodes[name]["fn"].support).values(), vars(other).values(), strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs if isinstance(a, (Tensor, float, int)))


def _check_shape(name: str, site: dict[str, Any]) -> None:
    """Raise a ``ShapeError`` where data broadcast against their distribution instead of lining up with it, or do not fit the plates."""
    shape, batch = site["log_prob"].shape, torch.Size(site["fn"].batch_shape)  # some of Pyro's distributions have a plain tuple
    value = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    fits = all(-dim <= len(shape) and shape[dim] in (1, size) for dim, size in sizes.items())
    inside = not sizes or all(shape[dim] == 1 or dim in sizes for dim in range(-len(shape), 0))
    if shape.numel() > max(batch.numel(), value.numel()) or not fits or not inside:
        plates = ", ".join(f"{f.name!r} of size {f.size}" for f in site["cond_indep_stack"] if f.vectorized)
        raise ShapeError(
            f"site {name!r}: values of shape {tuple(value)} under a distribution of shape {tuple(batch)}{f' in plate {plates}' if plates else ''} "
            f"give a log density of shape {tuple(shape)}: give the data the shape that the model expects"
        )


def _culprits(log_joint: LogJoint) -> str:
    """Names of the sites whose log density is not finite at the probe point."""
    names = [
        name
        for name, site in log_joint.trace.nodes.items()
        if site["type"] == "sample" and not bool(torch.isfinite(torch.as_tensor(site.get("log_prob_sum", 0.0))).all())
    ]
    return f" (sites {', '.join(map(repr, names))})" if names else ""
