"""A posterior in a file, and back."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..diagnostics import Estimate, Evaluation
from ..errors import CheckpointError, PyroFlowsError
from ..guides import AutoFlow, AutoManifoldFlow
from ..model.context import running
from ..model.inputs import converted, explained
from ..model.log_joint import LogJoint, without_init
from ..numerics.fingerprint import fingerprint, fingerprints_agree
from ..numerics.random import seeded

if TYPE_CHECKING:
    from .posterior import Posterior

__all__ = ["load", "save"]

_FORMAT = "pyro_flows.Posterior/1"
_DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
_FLOAT32 = 1e-6  # relative error of a copy in that precision
_GUIDES = {"AutoFlow": AutoFlow, "AutoManifoldFlow": AutoManifoldFlow}
_PLAIN = (str, int, float, bool, type(None))


def _sites(guide: AutoFlow) -> list[Any]:
    return [[site.name, list(site.shape), site.start, site.stop] for site in guide.sites]


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a file keeps of a record: numbers and words."""
    return {str(k): v if isinstance(v, _PLAIN) else str(v) for k, v in record.items()}


def save(posterior: Posterior, path: str | Path) -> None:
    """Write a posterior; see :meth:`Posterior.save`."""
    guide, path = posterior.guide, Path(path)
    # an option given as an object cannot be written down; the guide itself calls a function "custom" once it is set up
    named = type(guide) in _GUIDES.values() and all(isinstance(option, _PLAIN) and option != "custom" for option in guide.config.values())
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
        "data": _data(posterior.log_joint.model, posterior.log_joint.args, posterior.log_joint.kwargs),
    }
    scratch = path.with_name(path.name + ".part")
    try:
        torch.save(content, scratch)
        os.replace(scratch, path)  # at once: an interrupt never leaves half a file
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be written: {error}") from error


def load(
    cls: type[Posterior], path: str | Path, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Posterior:
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
    args, kwargs = converted(args, dtype), converted(dict(kwargs), dtype)
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
    return cls(guide, log_joint, evaluation, *rest)


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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {shown}") from error
    except Exception as error:
        raise CheckpointError(f"{shown} is damaged, or no file of pyro_flows ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{shown} was not written by Posterior.save")
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
        return _GUIDES[kind](model, **config)
    except (PyroFlowsError, TypeError, KeyError) as error:
        raise CheckpointError(f"{shown} has options that this version does not know: {error}") from error
