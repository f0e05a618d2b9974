"""A posterior in a file, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..diagnostics import Estimate, Evaluation
from ..errors import CheckpointError, PyroFlowsError
from ..guides import GUIDES, AutoFlow
from ..model.context import running, without_init
from ..model.inputs import converted, explained
from ..model.log_joint import LogJoint
from ..numerics.fingerprint import fingerprint, fingerprints_agree
from ..numerics.random import seeded
from ..training.storage import read, write
from .core import PosteriorCore

__all__ = ["load", "save"]

P = TypeVar("P", bound=PosteriorCore)

_FORMAT = "pyro_flows.Posterior/2"
_DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
_FLOAT32 = 1e-6  # relative error of a copy in that precision
_POINTS = 16  # draws at which a file holds the model's log density
_SAME_DENSITY = 1e-4  # relative to the log density: data in single precision may change it by so much
_PLAIN = (str, int, float, bool, type(None))


def _sites(guide: AutoFlow) -> list[Any]:
    return [[site.name, list(site.shape), site.start, site.stop] for site in guide.sites]


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a file keeps of a record: numbers and words."""
    return {str(k): v if isinstance(v, _PLAIN) else str(v) for k, v in record.items()}


def save(posterior: PosteriorCore, path: str | Path) -> None:
    """Write a posterior; see :meth:`Posterior.save`."""
    guide, path = posterior.guide, Path(path)
    # an option given as an object cannot be written down; the guide itself calls a function "custom" once it is set up
    named = type(guide) in GUIDES.values() and all(isinstance(option, _PLAIN) and option != "custom" for option in guide.config.values())
    evaluation = asdict(posterior.evaluation)
    content = {
        "format": _FORMAT,
        "guide_class": type(guide).__name__,
        "config": dict(guide.config) if named else None,
        "dtype": str(guide.loc.dtype),
        "sites": _sites(guide),
        "guide": {k: v.detach().cpu() for k, v in guide.state_dict().items()},
        "evaluation": {k: list(v) if isinstance(v, tuple) else v for k, v in evaluation.items()},
        "history": [_plain(record) for record in posterior.history],
        "converged": bool(posterior.converged),
        "warnings": list(map(str, posterior.warnings)),
        "num_log_density_evaluations": int(posterior.num_log_density_evaluations),
        "timings": _plain(posterior.timings),
        "engines": _plain(posterior.engines),
        "seed": int(posterior.seed),
        "density": _density(posterior),
        "data": _data(posterior.log_joint.model, posterior.log_joint.args, posterior.log_joint.kwargs),
    }
    write(content, path)


def load(
    cls: type[P], path: str | Path, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> P:
    """Read a posterior; see :meth:`Posterior.load`."""
    shown = repr(str(path))
    content = _read(path, shown)
    try:
        dtype = _DTYPES[content["dtype"]]
        fields = dict(content["evaluation"])
        for name in ("elbo", "log_evidence"):
            fields[name] = Estimate(*fields[name])
        fields["reasons"] = tuple(fields["reasons"])
        evaluation = Evaluation(**fields)
        config, sites, state = content["config"], content["sites"], content["guide"]
        rest = [content[k] for k in ("history", "converged", "warnings", "num_log_density_evaluations")]
        rest += [content[k] for k in ("timings", "engines", "seed")]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{shown} is damaged, or of another version of pyro_flows: {error!r}") from error
    guide = _guide(model, content.get("guide_class", "AutoFlow"), config, shown)
    labels: list[list[str]] = []
    args, kwargs = converted(args, dict(kwargs), dtype, labels)
    other = _other_arguments(content.get("data", []), without_init(guide.model), args, kwargs)
    remedy = "give Posterior.load(path, model, ...) the arguments of the fit; new data go to posterior.predictive(...)"
    with seeded(0), running(dtype, validate=True):
        try:
            with explained(dtype):
                guide = guide.setup(*args, **kwargs).to(dtype)
        except PyroFlowsError as error:
            raise CheckpointError(f"{shown} cannot be read with these arguments: {remedy}. {error}") from error
        if _sites(guide) != sites:
            here, there = ({name: tuple(shape) for name, shape, *_ in s} for s in (_sites(guide), sites))
            what, end = (f"other arguments ({other}) or another model", f". {remedy[0].upper()}{remedy[1:]}") if other else ("another model", "")
            raise CheckpointError(f"{shown} belongs to {what}: it has sites {there}, this model {here}{end}")
        if other:
            raise CheckpointError(f"{shown} was fitted to other arguments ({other}): {remedy}")
        try:
            guide.load_state_dict(state)
        except (RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{shown} was written with another flow, or by another version: pass an AutoFlow made in the same way") from error
        log_joint = LogJoint(guide.model, guide, args, kwargs)
        log_joint.labels = labels
    _check_density(content["density"], log_joint, shown)
    return cls(guide, log_joint, evaluation, *rest)


@torch.no_grad()
def _density(posterior: PosteriorCore) -> list[Tensor]:
    """Some draws and the model's log density there; nothing where that is random."""
    if posterior.log_joint.stochastic:
        return []
    with seeded(0):
        z = posterior.guide.flow().sample((_POINTS,))
    return [z.cpu(), posterior.log_joint(z).cpu()]


@torch.no_grad()
def _check_density(saved: list[Tensor], log_joint: LogJoint, shown: str) -> None:
    """Raise a ``CheckpointError`` if the model's log density at the saved points is not what it was."""
    if not saved or log_joint.stochastic:
        return
    z, before = saved
    now = log_joint(z)
    off = ((now - before).abs() / before.abs().clamp(min=1.0)).nan_to_num(nan=0.0)  # -inf both times
    if float(off.max()) > _SAME_DENSITY:
        worst = int(off.argmax())
        raise CheckpointError(
            f"{shown} was fitted to another version of the model: its log density at a saved point was {float(before[worst]):.6g} and is now "
            f"{float(now[worst]):.6g}. Fit this model anew, or load the file with the model as it was"
        )


def _data(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What tells the arguments of a fit from others, by the names that they have in the model, however they were passed."""
    try:
        bound = inspect.signature(model).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return fingerprint(args, dict(kwargs))
    bound.apply_defaults()
    return fingerprint((), dict(bound.arguments))


def _other_arguments(saved: list[Any], model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Names of the arguments that are not those of the fit; a float32 copy of them will do."""
    here = {name: value for name, value in _data(model, args, kwargs)}
    return ", ".join(repr(name) for name, value in saved if name not in here or not fingerprints_agree(value, here[name], _FLOAT32))


def _read(path: str | Path, shown: str) -> dict[str, Any]:
    try:
        content = read(Path(path), _FORMAT, "written by Posterior.save")
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {shown}") from error
    if not all(bool(torch.isfinite(t).all()) for t in content["guide"].values() if t.is_floating_point()):
        raise CheckpointError(f"{shown} holds a guide with parameters that are NaN or infinite: fit again")
    return content


def _guide(model: Callable[..., Any], kind: str, config: dict[str, Any] | None, shown: str) -> AutoFlow:
    if isinstance(model, AutoFlow):
        return model
    if config is None:
        raise CheckpointError(
            f"{shown} was fitted with a flow or base given as an object, which a file cannot hold: pass an AutoFlow made in "
            "the same way instead of the model"
        )
    try:
        return GUIDES[kind](model, **config)
    except (PyroFlowsError, TypeError, KeyError) as error:
        raise CheckpointError(f"{shown} has options that this version does not know: {error}") from error
