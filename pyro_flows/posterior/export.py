"""A posterior as ArviZ data and as a table."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.distributions import Unit
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ..diagnostics import khat_limit
from ..errors import OptionError
from ..model.predictive import simulate
from ..model.sites import is_deterministic
from .core import PosteriorCore

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["arviz", "header", "summary", "to_arviz"]

Arrays = dict[str, np.ndarray]


def arviz() -> Any:
    """ArviZ, imported when first needed and without the notice that 0.23 gives of its successor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    return arviz


def _is_one(az: Any) -> bool:
    return int(az.__version__.split(".")[0]) >= 1


@torch.no_grad()
def to_arviz(posterior: PosteriorCore, predictive: bool | str | Sequence[str] = (), num_samples: int = 4000) -> Any:
    """Everything as ArviZ wants it; see :meth:`Posterior.to_arviz`."""
    wanted = _wanted(predictive)
    az, log_joint, guide = arviz(), posterior.log_joint, posterior.guide
    z, log_q = guide.sample_and_log_prob(num_samples)
    samples = {**guide.unpack(z), **log_joint.deterministics(z)}
    groups: dict[str, Arrays] = {"posterior": _chains(samples)}
    groups["sample_stats"] = _chains({"lp": log_joint(z), "log_q": log_q})
    likelihood = log_joint.log_likelihood(z)
    if likelihood:
        groups["log_likelihood"] = _chains(likelihood)
    model, args, kwargs = log_joint.model, log_joint.args, log_joint.kwargs
    observed = _observed(posterior)
    if "posterior" in wanted:
        latents = {site.name: samples[site.name] for site in guide.sites}
        drawn = simulate(model, args, kwargs, latents, num_samples, z.dtype)
        groups["posterior_predictive"] = _chains({k: v for k, v in drawn.items() if k in observed})
    if "prior" in wanted:
        drawn = simulate(model, args, kwargs, {}, num_samples, z.dtype)
        groups["prior"] = _chains({k: v for k, v in drawn.items() if k in samples})
        groups["prior_predictive"] = _chains({k: v for k, v in drawn.items() if k in observed})
    if observed:
        groups["observed_data"] = observed
    coords, dims = _labels(posterior, groups)
    attrs = _attributes(posterior)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _is_one(az):
            data = az.from_dict(groups, coords=coords, dims=dims)
            data["posterior"].attrs.update(attrs)
        else:
            data = az.from_dict(**groups, coords=coords, dims=dims)
            data.posterior.attrs.update(attrs)
    return data


def _wanted(predictive: bool | str | Sequence[str]) -> set[str]:
    if isinstance(predictive, bool):
        return {"posterior"} if predictive else set()
    wanted = {predictive} if isinstance(predictive, str) else set(predictive)
    if not wanted <= {"posterior", "prior"}:
        raise OptionError(f"predictive must name 'posterior', 'prior' or both, got {predictive!r}")
    return wanted


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _chains(values: Mapping[str, Tensor]) -> Arrays:
    """With the one chain that ArviZ expects in front: independent draws have no others."""
    return {k: _array(v)[None] for k, v in values.items()}


def _observed(posterior: PosteriorCore) -> Arrays:
    latents = {site.name for site in posterior.guide.sites}
    return {
        name: _array(site["value"])
        for name, site in posterior.log_joint.trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and name not in latents
        and not is_deterministic(site) and not isinstance(site["fn"], (Unit, _Subsample))
    }  # fmt: skip


def _labels(posterior: PosteriorCore, groups: Mapping[str, Arrays]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Coordinates and dimension names: those of plates where there are any, else ``site_dim_0`` as ArviZ does."""
    coords: dict[str, Any] = {}
    dims: dict[str, list[str]] = {}
    nodes = posterior.log_joint.trace.nodes
    taken = {name for arrays in groups.values() for name in arrays} | {"chain", "draw"}
    for name in sorted({name for arrays in groups.values() for name in arrays} & nodes.keys()):
        site = nodes[name]
        value, event_dim = site["value"], site["fn"].event_dim
        names = [f"{name}_dim_{i}" for i in range(value.dim())]
        for frame in site["cond_indep_stack"]:
            at = value.dim() - event_dim + frame.dim if frame.vectorized else -1
            if at < 0 and is_deterministic(site):  # pyro.deterministic counts every dimension as one of the event
                at = value.dim() + frame.dim if frame.vectorized and value.dim() + frame.dim >= 0 else -1
            if at >= 0 and value.shape[at] == frame.size:
                # a variable and a dimension may not share a name
                names[at] = frame.name if frame.name not in taken else f"{frame.name}_plate"
                coords[names[at]] = _plate_labels(posterior, frame.size)
        for label, size in zip(names, value.shape, strict=True):
            coords.setdefault(label, np.arange(size))
        dims[name] = names
    return coords, dims


def _plate_labels(posterior: PosteriorCore, size: int) -> Any:
    """The words behind a plate's members, where exactly one argument of the model has so many; otherwise numbers."""
    fitting = [labels for labels in posterior.log_joint.labels if len(labels) == size]
    return fitting[0] if len(fitting) == 1 else np.arange(size)


def _attributes(posterior: PosteriorCore) -> dict[str, Any]:
    """Diagnostics as attributes that a netCDF file can hold."""
    evaluation = posterior.evaluation
    return {
        "inference_library": "pyro_flows",
        "elbo": evaluation.elbo.mean,
        "elbo_se": evaluation.elbo.se,
        "log_evidence": evaluation.log_evidence.mean,
        "log_evidence_se": evaluation.log_evidence.se,
        "ess_fraction": evaluation.ess,
        "khat": evaluation.khat,
        "verdict": evaluation.verdict,
        "reasons": " ".join(evaluation.reasons),
    }


_WORDS = {
    "good": "These draws can be used as they are.",
    "usable": "Usable with care: read on.",
    "poor": "Do not use these draws.",
}


def header(posterior: PosteriorCore) -> str:
    """What stands above a summary: ELBO, log evidence, ESS, k-hat, and in words whether to trust it."""
    evaluation = posterior.evaluation
    limit = khat_limit(evaluation.num_samples)
    within = "importance weights can be used" if evaluation.khat <= limit else "importance weights cannot be used"
    lines = [
        f"ELBO          {evaluation.elbo} nats",
        f"log evidence  {evaluation.log_evidence} nats",
        f"ESS           {evaluation.ess:.1%} of {evaluation.num_samples:,} draws",
        f"k-hat         {evaluation.khat:.2f} ({within}; limit {limit:.2f})",
        f"Verdict: {evaluation.verdict}. {_WORDS[evaluation.verdict]}",
        *(f"  {reason}" for reason in evaluation.reasons),
        *(f"  Warning: {warning}" for warning in posterior.warnings),
    ]
    return "\n".join(lines)


def summary(posterior: PosteriorCore, num_samples: int = 4000, var_names: Sequence[str] | None = None) -> DataFrame:
    """ArviZ's table under a header; see :meth:`Posterior.summary`."""
    import pandas

    class Summary(pandas.DataFrame):
        """A table that prints its header. What is computed from it is an ordinary table."""

        @property
        def _constructor(self) -> type[DataFrame]:
            return pandas.DataFrame

        def __repr__(self) -> str:
            return f"{self.attrs['header']}\n\n{pandas.DataFrame(self).to_string()}"

        __str__ = __repr__

        def _repr_html_(self) -> str:
            return f"<pre>{escape(self.attrs['header'])}</pre>{pandas.DataFrame(self)._repr_html_()}"

    samples = posterior.get_samples(num_samples)
    samples |= {site.name: site.unwrap(samples[site.name]) for site in posterior.guide.sites}
    unknown = set(var_names or ()) - samples.keys()
    if unknown:
        raise OptionError(f"summary: no site {sorted(unknown)}; there are {sorted(samples)}")
    chosen = _chains({k: v for k, v in samples.items() if var_names is None or k in var_names})
    az = arviz()
    coords, dims = _labels(posterior, {"posterior": chosen})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _is_one(az):
            data = az.from_dict({"posterior": chosen}, coords=coords, dims=dims)
            table = az.summary(data, kind="stats", ci_kind="hdi", ci_prob=0.94)
        else:
            table = az.summary(az.from_dict(posterior=chosen, coords=coords, dims=dims), kind="stats", hdi_prob=0.94)
    result = Summary(table)
    result.attrs["header"] = header(posterior)
    return result
