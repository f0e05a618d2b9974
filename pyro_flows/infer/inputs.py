"""Checks and conversions of a model and its arguments, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DtypeError, ModelError, PyroFlowsError, ShapeError, SupportError
from ..guides import AutoFlow, auto_guide
from ..manifolds.supports import complaint, contains
from .failures import in_a_line
from .log_joint import LogJoint

__all__ = ["alike", "check_inputs", "converted", "explained", "fingerprint", "set_up"]


def _walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _walk(item, f"{name}[{i}]")
    else:
        yield name, value


def check_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise a ``ModelError`` that names the argument when a tensor, an array or a number in the arguments is NaN or infinite."""
    named = [*((f"argument {i}", v) for i, v in enumerate(args)), *((f"argument {k!r}", v) for k, v in kwargs.items())]
    for name, value in (leaf for n, v in named for leaf in _walk(v, n)):
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            value = torch.from_numpy(value)
        if isinstance(value, (float, np.floating)):
            value = torch.tensor(value)
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = ~torch.isfinite(value)
            count = int(bad.sum())
            if count:
                where = [tuple(i) for i in bad.nonzero()[:3].tolist()]
                raise ModelError(
                    f"{name} has {count} NaN or infinite value(s), the first at {where}: remove those rows, or impute them as latent sites"
                )


def fingerprint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Plain values that tell one set of arguments from another: shapes, norms, and sums of entries weighted by their places. See :func:`alike`."""
    found: list[Any] = []
    for name, value in (leaf for n, v in [*enumerate(args), *kwargs.items()] for leaf in _walk(v, str(n))):
        if isinstance(value, Tensor):
            flat = value.detach().double().reshape(-1).nan_to_num(0.0, 0.0, 0.0)
            weights = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
            value = {"shape": list(value.shape), "norm": float(flat.norm()), "sums": [float(flat.sum()), float(flat @ weights)]}
        found.append([name, value if isinstance(value, (dict, int, float, str, bool, type(None))) else type(value).__name__])
    return found


def alike(a: Any, b: Any, rounding: float) -> bool:
    """Whether two fingerprints, or lists that hold some, agree up to a relative ``rounding`` of the entries: sums depend on the number of threads."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(alike(u, v, rounding) for u, v in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        allowed = rounding * a["norm"] * math.prod(a["shape"]) ** 0.5
        numbers = zip((a["norm"], *a["sums"]), (b["norm"], *b["sums"]), strict=True)
        return a["shape"] == b["shape"] and all(abs(u - v) <= allowed for u, v in numbers)
    return a == b


def converted(value: Any, dtype: torch.dtype) -> Any:
    """The same arguments with floating-point tensors and arrays as tensors of ``dtype``; integers stay integers."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, np.ndarray):
        return converted(torch.from_numpy(value), dtype) if value.dtype.kind in "fiub" else value
    if isinstance(value, dict):
        return {k: converted(v, dtype) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(converted(v, dtype) for v in value)
    return value


@contextmanager
def explained(dtype: torch.dtype) -> Iterator[None]:
    """Turn whatever a model raises into an error that says what to do."""
    try:
        yield
    except PyroFlowsError as error:
        cause = error.__cause__
        if cause is not None and "dtype" in str(cause):
            raise _dtype_error(cause, dtype) from cause
        raise
    except Exception as error:
        text, remedy = in_a_line(error, 500), "check the arguments, or call model(...) with them to see where it fails"
        if "unexpected keyword" in text:
            remedy = "options of the fit go to FlowVI: pf.FlowVI(model, flow=...).run(...)"
        if "dtype" in text or "same device" in text:
            raise _dtype_error(error, dtype) from error
        raise ModelError(f"the model failed when it was run with these arguments: {text}. {remedy[0].upper()}{remedy[1:]}") from error


def _dtype_error(error: BaseException, dtype: torch.dtype) -> DtypeError:
    text = in_a_line(error)
    if "Long" in text or "Int" in text:
        remedy = "integers stay integers: pass those that are quantities as floating point, x.float() (--as-float x on the command line)"
    else:
        remedy = (
            "pass the data as arguments of the model (they are converted), convert what the model closes over, a flow by "
            f"flow.{'double' if dtype == torch.float64 else 'float'}(), or choose FlowVI(model, dtype=torch.float32)"
        )
    return DtypeError(f"the model mixes dtypes or devices while it runs in {dtype}: {text}. {remedy[0].upper()}{remedy[1:]}")


def set_up(
    model: Callable[..., Any], guide: AutoFlow | dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[AutoFlow, LogJoint]:
    """Run the model once, make the guide's parameters and the log joint density, and look whether the start is possible.

    Where options are given instead of a guide, the guide that suits the model's supports is made with them.

    Raises:
        ModelError: the model fails, has nothing to infer, or has no finite density near the start.
        ShapeError: data that do not line up with their likelihood.
        SupportError: a site without a bijection from the reals.
        DtypeError: the model mixes dtypes or devices.
    """
    with explained(dtype):
        made = guide if isinstance(guide, AutoFlow) else auto_guide(model, args, kwargs, **guide)
        made = made.setup(*args, **kwargs).to(dtype)
        log_joint = LogJoint(model, made, args, kwargs)
        with torch.no_grad():
            values = log_joint(made.flow().sample((16,)))
    _check_observations(log_joint)
    if not bool(torch.isfinite(values).any()):
        raise ModelError(
            f"the log joint density is not finite at 16 draws around the initial point{_culprits(log_joint)}: check the data against the "
            "likelihood's support, or start elsewhere with AutoFlow(model, init_loc_fn=...)"
        )
    return made, log_joint


def _check_observations(log_joint: LogJoint) -> None:
    """Raise an error that names the site when data do not fit their likelihood: nothing checks it while a model is vmapped."""
    for name, site in log_joint.trace.nodes.items():
        if name in log_joint.likelihood_sites:
            _check_shape(name, site)
            try:
                inside = contains(site["fn"].support, site["value"])
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
    shape, batch = site["log_prob"].shape, site["fn"].batch_shape
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
