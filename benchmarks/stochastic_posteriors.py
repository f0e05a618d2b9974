"""The other parts of benchmarks/stochastic.py: handwritten digits, and posteriors with separate modes."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.stochastic import LWTACoupling, StochasticFlow

__all__ = ["DIGIT_MODELS", "digits", "digits_file", "lattice", "two_orders"]

Record = dict[str, Any]
LATTICE = torch.cartesian_prod(torch.linspace(-2, 2, 3), torch.linspace(-2, 2, 3)).double()
SIDE, LEVELS, MARGIN = 8, 17, 0.05
DIGIT_PARAMETERS, DIGIT_STEPS, DIGIT_BATCH = 100_000, 1200, 128


# --- posteriors


def lattice_density(x: Tensor) -> Tensor:
    """Nine normals on a square lattice, each of standard deviation a quarter: normalised."""
    return dist.Normal(LATTICE.to(x), 0.25, validate_args=False).to_event(1).log_prob(x.unsqueeze(-2)).logsumexp(-1) - float(np.log(9))


def lattice_model() -> None:
    """The lattice as a posterior: the evidence is 1."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1))
    pyro.factor("lattice", lattice_density(x))


def _guide(name: str, model: Any) -> Any:
    if name == "LWTA":
        return pf.AutoStochasticFlow(model, lambda dim: pf.flows.lwta(dim, units=4, transforms=2, hidden_features=(32, 32)))
    return pf.AutoFlow(model, flow=lambda dim: pf.flows.realnvp(dim, transforms=8, hidden_features=(40, 40)))


def _fit(name: str, model: Any, seed: int, *args: Any) -> tuple[Any, float]:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.errors.ConvergenceWarning)
        options = {"max_steps": 900, "num_particles": 64, "progress": False, "seed": seed, "engine": "captured"}
        posterior = pf.FlowVI(model, _guide(name, model), **options).run(*args)
    return posterior, time.process_time() - start


def _record(kind: str, model: str, seed: int, posterior: Any, seconds: float) -> Record:
    found = {"elbo": posterior.elbo.mean, "ess": posterior.ess, "khat": posterior.khat, "verdict": posterior.verdict, "seconds": seconds}
    return {"kind": kind, "name": kind, "model": model, "seed": seed, **found}


def lattice(model: str, seed: int) -> Record:
    """A guide of the lattice: the best ELBO is 0, each mode has a ninth."""
    posterior, seconds = _fit(model, lattice_model, seed)
    torch.manual_seed(seed)
    place = torch.cdist(posterior.get_samples(20_000)["x"], LATTICE).argmin(-1)
    return {**_record("lattice", model, seed, posterior, seconds), "mode": float(place.bincount(minlength=9).min()) / 20_000}


def mixture_model(y: Tensor) -> None:
    """Two clusters whose means have no order: the posterior has two modes of half the mass each, by symmetry."""
    with pyro.plate("clusters", 2):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).to(y), 2.0))
    with pyro.plate("rows", len(y)):
        weight = dist.Categorical(torch.full((2,), 0.5).to(y))
        pyro.sample("y", dist.MixtureSameFamily(weight, dist.Normal(mu, 0.6)), obs=y)


def two_orders(model: str, seed: int) -> Record:
    """A guide of the mixture model's means: how much mass the first order of the two has."""
    generator = torch.Generator().manual_seed(100 + seed)
    centre = torch.tensor([-1.0, 1.2])[(torch.rand(60, generator=generator) < 0.4).long()]
    y = (centre + 0.6 * torch.randn(60, generator=generator)).double()
    posterior, seconds = _fit(model, mixture_model, seed, y)
    torch.manual_seed(seed)
    mu = posterior.get_samples(20_000)["mu"]
    return {**_record("two orders", model, seed, posterior, seconds), "mode": float((mu[:, 0] < mu[:, 1]).double().mean())}


# --- digits


def digits_file() -> Path:
    """Where the images are expected."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("PYRO_FLOWS_DATA", default)) / "density" / "mnist.npz"


def _pooled(images: np.ndarray) -> Tensor:
    """Images of 28 x 28 bytes as 8 x 8 levels 0 .. 16: the middle 24 x 24, averaged three by three."""
    middle = torch.as_tensor(images.reshape(-1, 28, 28)[:, 2:26, 2:26]).float()
    return (middle.unflatten(1, (SIDE, 3)).unflatten(3, (SIDE, 3)).mean((2, 4)) / 255 * (LEVELS - 1)).round().flatten(1)


def _dequantised(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Points of all of space, and what their log density misses of the bits of the levels."""
    u = MARGIN + (1 - 2 * MARGIN) * (levels + torch.rand_like(levels)) / LEVELS
    slope = (1 - 2 * MARGIN) / (u * (1 - u)) / LEVELS
    return u.logit(), slope.log().sum(-1)


def _lwta(width: int) -> nn.Module:
    dim = SIDE * SIDE
    hidden = {"hidden_features": (width, width)}
    first = torch.arange(dim) < dim // 2
    blocks = [LWTACoupling(dim, 4, moved=first, groups=8, spread=1.0, **hidden), LWTACoupling(dim, 4, moved=~first, spread=1.0, **hidden)]
    couplings = pf.flows.realnvp(dim, transforms=6, **hidden).transform.parts
    return StochasticFlow(dim, [*blocks, *couplings])


DIGIT_MODELS = {
    "RealNVP": lambda h: pf.flows.realnvp(SIDE * SIDE, transforms=8, hidden_features=(h, h)),
    "CIF": lambda h: pf.flows.cif(SIDE * SIDE, transforms=8, hidden_features=(h, h), index_dim=2),
    "LWTA": _lwta,
}


def digits(model: str, seed: int) -> Record:
    """Bits a dimension of 8 x 8 digits, of a bound where the flow has one, and of uniform dequantisation in any case."""
    torch.manual_seed(seed)
    data = np.load(digits_file())
    train, test = _pooled(data["x_train"]), _pooled(data["x_test"][:2000])
    x, held_out = _dequantised(train)[0], [_dequantised(test) for _ in range(3)]
    make = DIGIT_MODELS[model]
    width = min(range(8, 160, 2), key=lambda h: abs(sum(p.numel() for p in make(h).parameters()) - DIGIT_PARAMETERS))
    flow = make(width).standardized(x)
    start = time.process_time()
    options = {"max_steps": DIGIT_STEPS, "batch_size": DIGIT_BATCH, "lr": 3e-3, "validation": 0.03, "seed": seed, "progress": False}
    pf.fit_density(flow, x, objective="elbo" if model == "CIF" else "auto", **options)
    seconds = time.process_time() - start
    nats = []
    with torch.no_grad():
        for points, missing in held_out:
            d = flow()
            parts = [d.log_prob_bound(p, 50) if model == "CIF" else d.log_prob(p) for p in points.split(200)]
            nats.append(torch.cat(parts) + missing)
    bits = -torch.stack(nats).mean(0) / (SIDE * SIDE * np.log(2))
    found = {"bits": float(bits.mean()), "se": float(bits.std()) / len(bits) ** 0.5, "seconds": seconds}
    return {"kind": "digits", "name": "digits", "model": model, "seed": seed, "parameters": sum(p.numel() for p in flow.parameters()), **found}
