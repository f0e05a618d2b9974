"""The time of one optimiser step on centred eight schools, 128 particles, one thread, float64.

    python benchmarks/step.py --out docs/benchmarks/step.md

``stock`` is Pyro's ``SVI.step`` (``Trace_ELBO``, vectorised particles) on the very guide that FlowVI trains. The guide
is timed twice: its full-rank affine layer alone (``flow=None``) and with the default flow. The engines take turns, ten steps
each, so that a busy machine slows all of them; a FlowVI step includes the noise and Adam's update, as ``SVI.step`` does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
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
from pyro_flows.model import LogJoint
from pyro_flows.training.engine import prepare
from pyro_flows.vi.flat_flow import FlatFlow
from pyro_flows.vi.objectives import build_step, find_objective

PARTICLES = 128
FLOWS = {"full-rank affine": None, "default flow": "auto"}
ENGINES = ("eager", "captured", "compiled", "auto")
Step = Callable[[], object]


def stock(task: Task, flow: str | None) -> Step:
    """Pyro's own SVI.step."""
    pyro.clear_param_store()
    guide = pf.AutoFlow(task.model, flow=flow)
    svi = SVI(task.model, guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True))
    return lambda: svi.step(*task.args, **task.kwargs)


def flowvi(task: Task, flow: str | None, name: str, expected_steps: int) -> tuple[Step, str, float]:
    """A step of FlowVI: which engine it runs on, and the seconds that its preparation took."""
    guide = pf.AutoFlow(task.model, flow=flow).setup(*task.args, **task.kwargs)
    flat_flow, base = FlatFlow(guide.flow), guide.flow.base()
    step = build_step(find_objective("path"), flat_flow, LogJoint(task.model, guide, task.args, task.kwargs))
    flat, one = torch.nn.Parameter(flat_flow.read()), torch.ones(())
    engine = prepare(step, (flat.detach(), base.sample((PARTICLES,)), one), name, expected_steps)
    adam = torch.optim.Adam([flat], lr=1e-3, fused=True)

    def run() -> None:
        with torch.no_grad():
            flat.grad = engine(flat.detach(), base.sample((PARTICLES,)), one)[0]
        adam.step()

    return run, engine.name, engine.seconds


def in_turns(steps: dict[str, Step], rounds: int, batch: int = 10) -> dict[str, float]:
    """Median milliseconds a step, engine by engine, over batches that take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(batch):
                step()
            if i:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start) / batch)
    return {name: median(values) for name, values in times.items()}


def table(task: Task, rounds: int, expected_steps: int) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield "| guide | engine | ms a step | times faster than SVI.step | capture and compilation, s |"
    yield "| --- | --- | --- | --- | --- |"
    for label, flow in FLOWS.items():
        pyro.set_rng_seed(0)
        steps: dict[str, Step] = {"stock SVI.step": stock(task, flow)}
        prepared: dict[str, float] = {}
        for name in ENGINES:
            step, chosen, seconds = flowvi(task, flow, name, expected_steps)
            key = f"auto, which picks {chosen}" if name == "auto" else name
            steps[key], prepared[key] = step, seconds
        times = in_turns(steps, rounds)
        for name, value in times.items():
            yield f"| {label} | {name} | {value:.2f} | {times['stock SVI.step'] / value:.1f} | {prepared.get(name, 0.0):.1f} |"


def main() -> None:
    """Time every engine on every guide; print the table and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--expected-steps", type=int, default=2000)
    parser.add_argument("--task", default="eight_schools_centered")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with float64():
        lines = list(table(load(options.task), options.rounds, options.expected_steps))
    text = f"# The step\n\n{__doc__.split(chr(10))[0]}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
