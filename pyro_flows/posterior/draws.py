"""What a posterior does with draws of its guide: judge them, resample them, score them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..diagnostics import Evaluation, evaluate, khat_limit, psis
from ..errors import ImportanceError, ShapeError
from ..guides import AutoFlow
from ..model.log_joint import LogJoint
from .missed_mass import missed_mass

__all__ = ["evaluate_guide", "latents_of_runs", "log_prob", "resample"]

Tensors = dict[str, Tensor]

_MAX_COLUMNS = 2000  # values of a draw that the evaluation looks at
_OVERSAMPLING = 10  # raw draws for each one that importance resampling keeps


@torch.no_grad()
def evaluate_guide(guide: AutoFlow, log_joint: LogJoint, num_samples: int, modes: Iterable[tuple[Tensor, Tensor]] = ()) -> Evaluation:
    """Judge a guide by fresh draws: constrained values, deterministic sites and unconstrained coordinates; and by looks where it may not draw.

    Args:
        guide: a guide, set up.
        log_joint: the model's log joint density over the guide's vector.
        num_samples: number of draws.
        modes: places and scales of modes that are known of.

    Cost: ``num_samples`` evaluations of the model and of the flow, and those of :func:`~pyro_flows.posterior.missed_mass.missed_mass`.
    """
    z, log_q = guide.sample_and_log_prob(num_samples)
    values = {**guide.unpack(z), **log_joint.deterministics(z)}
    for site in guide.sites:
        if site.manifold is not None:
            values[site.name] = site.unwrap(values[site.name])
            continue
        part = z[:, site.start : site.stop]
        value = values[site.name]
        if value.numel() != part.numel() or not torch.equal(value.reshape(part.shape), part):
            values[f"{site.name} (unconstrained)"] = site.unconstrained(z)
    evaluation = evaluate(log_joint(z), log_q, *_columns(values))
    return evaluation.doubted(*missed_mass(guide, log_joint, modes, evaluation.log_evidence.mean))


def _columns(values: Mapping[str, Tensor]) -> tuple[Tensor, list[str]]:
    """Values of a batch of draws as columns with names, such as ``theta[0, 2]``, up to a limit."""
    columns: list[Tensor] = []
    names: list[str] = []
    for name, value in values.items():
        flat = value.reshape(len(value), -1).double()
        if columns and len(names) + flat.shape[1] > _MAX_COLUMNS:
            continue
        columns.append(flat)
        names += [name + index for index in indices(value.shape[1:])]
    return torch.cat(columns, -1), names


def indices(shape: torch.Size) -> list[str]:
    """The entries of an array of that shape, in order, as one writes them: ``""``, ``"[2]"``, ``"[0, 1]"``."""
    if not shape:
        return [""]
    flat = torch.arange(shape.numel())
    return [str([int(i) for i in entry]) for entry in zip(*torch.unravel_index(flat, shape), strict=True)]


@torch.no_grad()
def resample(guide: AutoFlow, log_joint: LogJoint, num_samples: int, verdict: str) -> Tensor:
    """Unconstrained draws ``(num_samples, d)`` resampled from ten times as many by Pareto-smoothed importance weights.

    Raises:
        ImportanceError: k-hat is above its limit, or the density is random.
    """
    if log_joint.stochastic:
        raise ImportanceError(f"importance=True needs the model's exact density: {log_joint.reason}")
    total = max(_OVERSAMPLING * num_samples, 1000)
    z, log_q = guide.sample_and_log_prob(total)
    log_w = log_joint(z) - log_q
    kept = torch.isfinite(log_w)
    if not bool(kept.any()):
        raise ImportanceError("importance=True: no draw has a finite weight. Train the guide first")
    smoothed, khat = psis(log_w[kept])
    limit = khat_limit(total)
    if khat > limit:
        raw = "the raw draws are good as they are" if verdict == "good" else "train longer, or use a richer flow"
        raise ImportanceError(
            f"importance=True: k-hat is {khat:.2f}, above the limit of {limit:.2f} for {total} draws, so that a few draws "
            f"would stand for all the others. Leave importance=True out: {raw}"
        )
    return z[kept][torch.multinomial(smoothed.exp(), num_samples, replacement=True)]


def read_values(guide: AutoFlow, samples: Mapping[str, Tensor], caller: str) -> tuple[Tensors, torch.Size]:
    """The latent sites' values in ``samples``, each ``(*batch, *site_shape)``, and their common batch shape.

    Raises:
        ShapeError: a latent site is missing or has another shape.
    """
    like = guide.loc
    values: Tensors = {}
    batch: torch.Size | None = None
    for site in guide.sites:
        if site.name not in samples:
            raise ShapeError(f"{caller}: the latent site {site.name!r} is missing; got {sorted(samples)}")
        value = torch.as_tensor(samples[site.name], dtype=like.dtype, device=like.device)
        lead = value.dim() - len(site.shape)
        if batch is None:
            batch = value.shape[: max(lead, 0)]
        if lead < 0 or value.shape != batch + site.shape:
            wanted = f"{tuple(batch)} + {tuple(site.shape)}"
            raise ShapeError(f"{caller}: site {site.name!r} has shape {tuple(value.shape)}, expected {wanted}")
        values[site.name] = value
    return values, batch or torch.Size()


def latents_of_runs(guide: AutoFlow, samples: Mapping[str, Tensor]) -> tuple[Tensors, int]:
    """The latent values that a model is to be run from, and for how many runs.

    Raises:
        ShapeError: a latent site is missing, or its shape is not ``(runs, *site_shape)``.
    """
    values, batch = read_values(guide, samples, "predictive(samples=...)")
    if len(batch) != 1 or not batch[0]:
        raise ShapeError(f"predictive(samples=...): give values of shape (runs, *site_shape), as get_samples does; got batch shape {tuple(batch)}")
    return values, batch[0]


def log_prob(guide: AutoFlow, samples: Mapping[str, Tensor]) -> Tensor:
    """Log density of a guide at constrained values by site, each ``(*batch, *site_shape)``; see ``Posterior.log_prob``."""
    like = guide.loc
    values, batch = read_values(guide, samples, "log_prob")
    inside = torch.ones(batch, dtype=torch.bool, device=like.device)
    for site in guide.sites:
        checked = site.contains(values[site.name])
        inside = inside & checked.reshape(*inside.shape, -1).all(-1)
    z = torch.where(inside.unsqueeze(-1), guide.pack(values), like)
    log_q = guide.flow().log_prob(z) - guide.unpack_ladj(z)
    return torch.where(inside, log_q, torch.full_like(log_q, -torch.inf))  # a bijection's inverse would clamp a point outside
