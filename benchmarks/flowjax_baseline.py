"""flowjax's side of the speed benchmark, in its own process and its own environment.

It reads one JSON request a line and answers with one: ``{"flow", "dim", "batch", "job"}`` builds and jits, ``"run"`` does the job once and says how
many milliseconds it took. Imports nothing of pyro_flows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow, masked_autoregressive_flow

LAYERS, WIDTH, BINS, BOUND = 5, 128, 8, 5.0


def build(flow: str, dim: int, batch: int, job: str) -> Callable[[], object]:
    make = coupling_flow if flow in ("RealNVP", "NSF coupling") else masked_autoregressive_flow
    options = {"transformer": RationalQuadraticSpline(knots=BINS, interval=BOUND)} if flow.startswith("NSF") else {}
    dist = make(jr.key(0), base_dist=Normal(jnp.zeros(dim)), flow_layers=LAYERS, nn_width=WIDTH, nn_depth=2, **options)
    x = jr.normal(jr.key(1), (batch, dim))
    if job == "log_prob":
        log_prob = eqx.filter_jit(lambda d, x: d.log_prob(x))
        return lambda: log_prob(dist, x)
    if job == "sample":
        sample = eqx.filter_jit(lambda d, key: d.sample(key, (batch,)))
        return lambda: sample(dist, jr.key(2))
    optimizer = optax.adam(1e-4)
    state = [dist, optimizer.init(eqx.filter(dist, eqx.is_inexact_array))]

    @eqx.filter_jit
    def step(d, opt_state):
        grads = eqx.filter_grad(lambda d: -d.log_prob(x).mean())(d)
        updates, opt_state = optimizer.update(grads, opt_state, d)
        return eqx.apply_updates(d, updates), opt_state

    def train() -> object:
        state[:] = step(*state)
        return eqx.filter(state[0], eqx.is_inexact_array)

    return train


def main() -> None:
    clock = getattr(time, sys.argv[1])
    job = None
    for line in sys.stdin:
        request = json.loads(line)
        if request != "run":
            job = build(**request)
        start = clock()
        jax.block_until_ready(job())
        print(json.dumps(1e3 * (clock() - start)), flush=True)


if __name__ == "__main__":
    main()
