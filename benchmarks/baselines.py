"""Pyro's stock guides, each at the best of its own grid of learning rates: what a flow guide has to beat.

Adam with a rate that decays to a tenth, vectorised particles, float64. The stock initial points sample the prior, which
an improper prior refuses: every guide starts at a small Gaussian in the unconstrained space instead.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.distributions import Normal
from pyro.distributions.transforms import block_autoregressive, iterated
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoGuide,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.optim import ClippedAdam
from torch import Tensor

from benchmarks.log_joint import LogJoint, init_small
from benchmarks.metrics import NUM_DRAWS, FitFailed
from benchmarks.models import Task

# The recipes of Pyro's documentation. The two flows ignore init_loc_fn: their model is wrapped instead.
GUIDES: dict[str, Callable[..., AutoGuide]] = {
    "autonormal": lambda model, init: AutoNormal(model, init_loc_fn=init),
    "automvn": lambda model, init: AutoMultivariateNormal(model, init_loc_fn=init),
    "autoiaf": lambda model, init: AutoIAFNormal(InitMessenger(init)(model), num_transforms=2),
    "autonf": lambda model, init: AutoNormalizingFlow(
        InitMessenger(init)(model), partial(iterated, 2, block_autoregressive)
    ),
}
LEARNING_RATES = {
    "autonormal": (0.01, 0.03, 0.1),
    "automvn": (0.01, 0.03, 0.1),
    "autoiaf": (0.001, 0.003, 0.01),
    "autonf": (0.001, 0.003, 0.01),
}


@dataclass(frozen=True)
class Fit:
    """Draws of a fitted guide, in the reference's columns and as the guide has them, their densities and their cost."""

    draws: Tensor
    unconstrained: Tensor
    log_p: Tensor
    log_q: Tensor
    seconds: float
    cpu_seconds: float
    evaluations: int
    settings: dict[str, Any]

    @property
    def elbo(self) -> float:
        value = float((self.log_p - self.log_q).mean())
        return value if math.isfinite(value) else -math.inf


@contextmanager
def float64() -> Iterator[None]:
    """Stock guides build parts of themselves in the default dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@dataclass(frozen=True)
class Budget:
    """What one fit may cost: steps of so many particles, and a limit in CPU seconds, after which it is scored as is."""

    steps: int = 3000
    particles: int = 32
    seconds: float = math.inf

    @property
    def pilot(self) -> Budget:
        """What is spent on a learning rate to see whether it is the best of its grid."""
        return Budget(max(1, self.steps // 4), self.particles, self.seconds / 4)


def train(task: Task, method: str, lr: float, seed: int, budget: Budget) -> tuple[AutoGuide, int]:
    """A stock guide trained by ``SVI.step``, and the number of steps that the budget allowed."""
    deadline = time.process_time() + budget.seconds
    pyro.clear_param_store()  # a second guide of the same class would silently keep the first one's parameters
    pyro.set_rng_seed(seed)
    init = init_small(0.1, torch.Generator().manual_seed(seed), torch.float64)
    guide = GUIDES[method](task.model, init)
    # Pyro's Adam with a decaying rate; the clipping is not wanted.
    optimizer = ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / budget.steps), "clip_norm": math.inf})
    svi = SVI(task.model, guide, optimizer, Trace_ELBO(num_particles=budget.particles, vectorize_particles=True))
    bad = 0
    for step in range(budget.steps):
        if time.process_time() > deadline:
            return guide, step
        bad = 0 if math.isfinite(svi.step(*task.args, **task.kwargs)) else bad + 1
        if bad == 20:
            raise FitFailed(f"the loss is not finite from step {step - 19} on")
    return guide, budget.steps


@torch.no_grad()
def draw(guide: AutoGuide, log_joint: LogJoint, num_draws: int) -> tuple[Tensor, Tensor]:
    """Draws in the unconstrained space (S, d), in the order of ``log_joint.sites``, and their log density (S,)."""
    if isinstance(guide, AutoNormal):
        locs, scales = zip(*(guide._get_loc_and_scale(name) for name, _, _ in log_joint.sites), strict=True)
        loc, scale = (torch.cat([part.reshape(-1) for part in parts]) for parts in (locs, scales))
        posterior = Normal(loc, scale).to_event(1)
    else:
        assert [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()] == [s[0] for s in log_joint.sites]
        posterior = guide.get_posterior()
    u = posterior.sample((num_draws,))
    return u, posterior.log_prob(u)  # at once: autoregressive flows score their last draw from its cache


def fit(task: Task, method: str, lr: float, seed: int, budget: Budget) -> Fit:
    """Train one stock guide at one learning rate and draw from it."""
    with float64():
        start, cpu_start = time.perf_counter(), time.process_time()
        guide, steps = train(task, method, lr, seed, budget)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        log_joint = LogJoint(task.model, task.args, task.kwargs)
        u, log_q = draw(guide, log_joint, NUM_DRAWS)
        with torch.no_grad():
            values, _ = log_joint.unpack(u)
            log_p = log_joint.batched(u)
    settings = {"lr": lr, "steps": steps, "particles": budget.particles}
    return Fit(task.flatten(values), u, log_p, log_q, seconds, cpu_seconds, steps * budget.particles, settings)


def best_fit(task: Task, method: str, seed: int, budget: Budget, lr: float | None = None) -> Fit:
    """``fit`` at ``lr``, or, without one, at the rate of the method's grid whose pilot, a quarter as long, ends with the best ELBO."""
    pilots, reasons = {}, []
    for rate in LEARNING_RATES[method] if lr is None else []:
        try:
            pilots[rate] = fit(task, method, rate, seed, budget.pilot).elbo
        except (FitFailed, RuntimeError, ValueError) as error:  # torch raises these two for NaN or singular matrices
            reasons.append(f"lr {rate:g}: {str(error).strip().splitlines()[0][:200]}")
    for rate in sorted(pilots, key=pilots.__getitem__, reverse=True) if lr is None else [lr]:
        try:
            return fit(task, method, rate, seed, budget)
        except (FitFailed, RuntimeError, ValueError) as error:
            reasons.append(f"lr {rate:g}: {str(error).strip().splitlines()[0][:200]}")
    raise FitFailed("; ".join(reasons))
