"""The time of one optimiser step on centred eight schools, 128 particles, one thread, float64.

    python benchmarks/step.py

``stock`` is Pyro's ``SVI.step`` (``Trace_ELBO``, vectorised particles) on the very guide that FlowVI trains. The guide
is timed twice: its full-rank affine layer alone (``flow=None``) and with the default flow.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

import pyro_flows as pf
from benchmarks.baselines import float64
from benchmarks.models import Task, load

PARTICLES = 128
FLOWS = {"full-rank affine": None, "default flow": "auto"}


def milliseconds(step: Callable[[], object], repeats: int, warm_up: int = 20) -> float:
    """The median time of a call, after ``warm_up`` calls that do not count."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def stock(task: Task, flow: str | None, repeats: int) -> float:
    """Pyro's own SVI.step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with float64():
        guide = pf.AutoFlow(task.model, flow=flow)
        elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True)
        svi = SVI(task.model, guide, Adam({"lr": 1e-3}), elbo)
        return milliseconds(lambda: svi.step(*task.args, **task.kwargs), repeats)


# Name -> the time of a step in milliseconds from (task, flow, repeats). FlowVI's engines belong here.
ENGINES: dict[str, Callable[[Task, str | None, int], float]] = {"stock SVI.step": stock}


def main() -> None:
    """Time every engine on every guide and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--task", default="eight_schools_centered")
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = load(options.task)
    print("| engine | " + " | ".join(f"{name}, ms a step" for name in FLOWS) + " |")
    print("| --- |" + " --- |" * len(FLOWS))
    for name, engine in ENGINES.items():
        times = [engine(task, flow, options.repeats) for flow in FLOWS.values()]
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in times) + " |", flush=True)


if __name__ == "__main__":
    main()
