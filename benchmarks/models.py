"""The sixteen reference posteriors as tasks: ``load(name)`` pairs a model with its data and its reference.

The data are read from ``$PYRO_FLOWS_DATA`` (default: ``../shared/data`` beside this checkout); ``available()`` says
whether they are there.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pyro_models as m

Sites = dict[str, Tensor]
Data = Callable[[str], Tensor]


@dataclass(frozen=True)
class Task:
    """A posterior, ``model(*args, **kwargs)``, and its d reference columns in the constrained space.

    The summaries come from all the reference draws; ``draws`` are 2,000 of them.
    """

    name: str
    model: Callable[..., None]
    args: tuple
    names: tuple[str, ...]
    mean: Tensor
    sd: Tensor
    q05: Tensor
    q50: Tensor
    q95: Tensor
    draws: Tensor
    log_evidence: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    derive: Callable[[Sites], Sites] = lambda sites: {}

    def flatten(self, samples: Mapping[str, Tensor]) -> Tensor:
        """The reference columns ``(S, d)`` of ``samples``, a dict of site -> ``(S, *shape)``.

        A deterministic site that is not in ``samples`` is computed from the others.
        """
        rows = {name: value.reshape(len(value), -1) for name, value in samples.items()}
        blocks = dict.fromkeys(name.split("[")[0] for name in self.names)  # in the order of the columns
        if not blocks.keys() <= rows.keys():
            rows = {**self.derive(rows), **rows}
        columns = torch.cat([rows[block] for block in blocks], -1)
        if columns.shape[-1] != len(self.names):
            raise ValueError(f"{self.name}: {columns.shape[-1]} columns, the reference has {len(self.names)}")
        return columns


@dataclass(frozen=True)
class _Recipe:
    folder: str
    model: Callable[..., None]
    args: Callable[[Data], tuple]
    log_evidence: float | None = None
    derive: Callable[[Sites], Sites] = lambda sites: {}


def _one_hot_nes(get: Data) -> Tensor:
    age = get("age_discrete")
    dummies = [(age == k).to(age) for k in (2, 3, 4)]
    return torch.stack(
        [torch.ones_like(age), get("real_ideo"), get("race_adj"), *dummies, get("educ1"), get("gender"), get("income")],
        -1,
    )


def _kidiq(get: Data) -> Tensor:
    hs, iq = get("mom_hs"), get("mom_iq")
    return torch.stack([torch.ones_like(hs), hs, iq, hs * iq], -1)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def _lags(get: Data) -> tuple[Tensor, Tensor]:
    y, order = get("y"), int(get("K"))
    return y.unfold(0, order, 1)[:-1].flip(-1).contiguous(), y[order:]


_RECIPES = {
    "eight_schools": _Recipe(
        "eight_schools-eight_schools_noncentered",
        m.eight_schools,
        lambda get: (get("sigma"), get("y")),
        -31.311,
        lambda s: {"theta": s["mu"] + s["tau"] * s["eta"]},
    ),
    "eight_schools_centered": _Recipe(
        "eight_schools-eight_schools_centered", m.eight_schools_centered, lambda get: (get("sigma"), get("y")), -31.311
    ),
    "arK": _Recipe("arK-arK", m.ar, _lags, 58.588),
    "garch": _Recipe(
        "garch-garch11",
        m.garch,
        lambda get: (get("y"), float(get("sigma1"))),
        derive=lambda s: {"beta1": (1 - s["alpha1"]) * s["share"]},
    ),
    "gp_regr": _Recipe("gp_pois_regr-gp_regr", m.gp_regr, lambda get: (get("x"), get("y"))),
    "hmm_example": _Recipe("hmm_example-hmm_example", m.hmm_example, lambda get: (get("y"),)),
    "hmm_drive": _Recipe(
        "bball_drive_event_0-hmm_drive_0", m.hmm_drive, lambda get: (get("alpha"), get("u"), get("v"))
    ),
    "gauss_mix": _Recipe("low_dim_gauss_mix-low_dim_gauss_mix", m.gauss_mix, lambda get: (get("y"),)),
    "lotka_volterra": _Recipe(
        "hudson_lynx_hare-lotka_volterra", m.lotka_volterra, lambda get: (get("y_init"), get("y"))
    ),
    "diamonds": _Recipe("diamonds-diamonds", m.diamonds, lambda get: (_centred(get("X")[:, 1:]), get("Y"))),
    "kidiq": _Recipe("kidiq-kidscore_interaction", m.kidiq, lambda get: (_kidiq(get), get("kid_score")), -1872.815),
    "nes": _Recipe("nes2000-nes", m.nes, lambda get: (_one_hot_nes(get), get("partyid7"))),
    "seeds": _Recipe(
        "seeds_data-seeds_stanified_model",
        m.seeds,
        lambda get: (get("x1"), get("x2"), get("N"), get("n")),
        derive=lambda s: {"b": s["sigma"] * s["z"]},
    ),
    "radon": _Recipe(
        "radon_mn-radon_hierarchical_intercept_noncentered",
        m.radon,
        lambda get: (
            torch.stack([get("log_uppm"), get("floor_measure")], -1),
            get("county_idx").long() - 1,
            int(get("J")),
            get("log_radon"),
        ),
        derive=lambda s: {"alpha": s["mu_alpha"] + s["sigma_alpha"] * s["raw"]},
    ),
    "irt_2pl": _Recipe(
        "irt_2pl-irt_2pl",
        m.irt_2pl,
        lambda get: (get("y"),),
        derive=lambda s: {
            "theta": s["sigma_theta"] * s["z"],
            "a": (s["sigma_a"] * s["z_a"]).exp(),
            "b": s["mu_b"] + s["sigma_b"] * s["z_b"],
        },
    ),
    "ionosphere": _Recipe("logistic_ionosphere", m.ionosphere, lambda get: (get("X"), get("y"))),
}
NAMES = {name: recipe.folder for name, recipe in _RECIPES.items()}
LOG_EVIDENCE = {name: recipe.log_evidence for name, recipe in _RECIPES.items() if recipe.log_evidence is not None}


def folder() -> Path:
    """Where the posteriors are expected."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    return Path(os.environ.get("PYRO_FLOWS_DATA") or beside) / "posteriors"


def available() -> bool:
    """Whether the posteriors are on this machine."""
    return all((folder() / name / "ref.npz").exists() for name in NAMES.values())


def load(name: str, dtype: torch.dtype = torch.float64) -> Task:
    """One task by its short name (a key of ``NAMES``), its data in ``dtype``; the reference is always float64."""
    recipe = _RECIPES[name]
    with gzip.open(folder() / recipe.folder / "data.json.gz", "rt") as file:
        data = json.load(file)
    with np.load(folder() / recipe.folder / "ref.npz") as file:
        columns = tuple(str(column) for column in file["names"])
        reference = {
            key: torch.as_tensor(file[key], dtype=torch.float64) for key in ("mean", "sd", "q05", "q50", "q95", "draws")
        }
    return Task(
        name,
        recipe.model,
        recipe.args(lambda key: torch.tensor(data[key], dtype=dtype)),
        columns,
        **reference,
        log_evidence=recipe.log_evidence,
        derive=recipe.derive,
    )
