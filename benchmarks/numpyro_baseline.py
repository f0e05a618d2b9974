"""NumPyro's AutoIAFNormal as a baseline: float64, compiled loop, at the best of the same learning rates as Pyro's.

Import this only where numpyro is installed.
"""

from __future__ import annotations

import time

import jax
import numpy as np
import numpyro
import torch
from jax import numpy as jnp
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoIAFNormal
from numpyro.infer.util import potential_energy

from benchmarks.baselines import LEARNING_RATES, Fit
from benchmarks.metrics import NUM_DRAWS
from benchmarks.models import Task
from benchmarks.numpyro_models import MODELS

numpyro.enable_x64()

STEPS, PARTICLES = 4000, 32


def to_jax(args: tuple) -> tuple:
    """The arguments of the Pyro model for its NumPyro twin."""
    return tuple(jnp.asarray(arg.numpy()) if isinstance(arg, torch.Tensor) else arg for arg in args)


def fit(task: Task, lr: float, seed: int) -> Fit:
    """Train AutoIAFNormal at one learning rate; the seconds contain the compilation."""
    model, args = MODELS[task.name], to_jax(task.args)
    train_key, draw_key = jax.random.split(jax.random.PRNGKey(seed))
    start, cpu_start = time.perf_counter(), time.process_time()
    guide = AutoIAFNormal(model)
    optimizer = numpyro.optim.Adam(lambda step: lr * 0.1 ** (step / STEPS))
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=PARTICLES))
    params = svi.run(train_key, STEPS, *args, progress_bar=False).params
    jax.block_until_ready(params)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start

    posterior = handlers.substitute(guide._get_posterior, params)()
    u, intermediates = posterior.sample_with_intermediates(draw_key, (NUM_DRAWS,))
    log_q = posterior.log_prob(u, intermediates)
    log_p = -jax.lax.map(lambda row: potential_energy(model, args, {}, guide._unpack_latent(row)), u, batch_size=500)
    sites = guide._unpack_and_constrain(u, params)
    draws = task.flatten({name: torch.from_numpy(np.array(value)) for name, value in sites.items()})
    u, log_p, log_q = (torch.from_numpy(np.array(value)) for value in (u, log_p, log_q))
    settings = {"lr": lr, "steps": STEPS, "particles": PARTICLES}
    return Fit(draws, u, log_p, log_q, seconds, cpu_seconds, STEPS * PARTICLES, settings)


def best_fit(task: Task, seed: int, lr: float | None = None) -> Fit:
    """``fit`` at ``lr``, or, without one, at the best of the grid by final ELBO."""
    rates = LEARNING_RATES["autoiaf"] if lr is None else [lr]
    return max((fit(task, rate, seed) for rate in rates), key=lambda candidate: candidate.elbo)
