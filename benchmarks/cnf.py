"""Continuous flows: divergences by training, function evaluations by penalty, a posterior, and time beside zuko's CNF.

    taskset -c 1 python benchmarks/cnf.py --out docs/benchmarks/cnf.json
    python benchmarks/cnf.py --render docs/benchmarks/cnf.json

Seconds are the process's CPU time on one thread. Records are added to the file as they come, and those that it has are not made again. zuko is left
out where it is not installed; the posterior where its data are not (``$PYRO_FLOWS_DATA``).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

import pyro_flows as pf
from benchmarks.records import Record, complete, rerender
from benchmarks.report import table
from benchmarks.speed import in_turns
from benchmarks.toys import TOYS

TARGET = TOYS["8gaussians"]
TRAININGS: dict[str, dict[str, Any]] = {
    "maximum likelihood": {"max_steps": 600, "lr": 1e-2},
    "flow matching": {"objective": "flow_matching", "max_steps": 15_000, "lr": 5e-3},
    "flow matching, paired": {"objective": "flow_matching", "coupling": "ot", "max_steps": 4000, "batch_size": 256, "lr": 5e-3},
}
PENALTIES = (0.0, 0.02, 0.03, 0.05)
RNODE = {"max_steps": 600, "batch_size": 256, "lr": 5e-3}
TIMED = {"rtol": 1e-5, "atol": 1e-6}
BATCH = 512


def trained(seed: int, solver: dict[str, Any], options: dict[str, Any]) -> tuple[pf.Flow, float]:
    """A flow fitted to the target, and the CPU-seconds that took."""
    torch.manual_seed(seed)
    x, flow = TARGET.sample(100_000), pf.flows.cnf(2, **solver)
    start = time.process_time()
    pf.fit_density(flow, x, validation=0.005, seed=seed, progress=False, **({"batch_size": BATCH} | options))
    return flow, time.process_time() - start


@torch.no_grad()
def judged(flow: pf.Flow, seed: int) -> Record:
    """Divergence and evaluations, both by dopri5 at 1e-5; and the penalties' integrals."""
    torch.manual_seed(1000 + seed)
    test = TARGET.sample(40_000)
    layer = flow.transform[0]
    layer.solver = pf.numerics.Solver("dopri5", rtol=1e-5, atol=1e-5)
    log_prob = torch.cat([flow().log_prob(part) for part in test.split(4000)])
    found = layer.regularization(test[:2000])
    plain = layer.solve(test[:2000], inverse=True)
    paths = {"kinetic": float(found.kinetic.mean()), "jacobian": float(found.jacobian.mean()), "evaluations": plain.evaluations}
    return {"kl": -float(log_prob.mean()) - TARGET.entropy, "se": float(log_prob.std()) / len(test) ** 0.5, **paths}


def toy(name: str, seed: int) -> Record:
    flow, seconds = trained(seed, {"solver": "rk4", "steps": 8}, TRAININGS[name])
    return {"seconds": seconds, **judged(flow, seed)}


def rnode(weight: float, seed: int) -> Record:
    """Maximum likelihood from the same flow, fitted by flow matching: its paths are longer than they need be."""
    flow, seconds = trained(seed, {"rtol": 1e-4, "atol": 1e-4}, TRAININGS["flow matching"] | {"max_steps": 3000})
    torch.manual_seed(seed)
    x, start = TARGET.sample(100_000), time.process_time()
    pf.fit_density(flow, x, validation=0.005, seed=seed, progress=False, kinetic=weight, jacobian=weight, **RNODE)
    return {"seconds": seconds + time.process_time() - start, **judged(flow, seed)}


def posterior(seed: int) -> Record:
    """Eight schools, with a continuous flow as guide."""
    from benchmarks.metrics import NUM_DRAWS, score
    from benchmarks.models import load

    task = load("eight_schools")
    start = time.process_time()
    fit = pf.FlowVI(task.model, flow="cnf", max_steps=1500, seed=seed, progress=False).run(*task.args, **task.kwargs)
    seconds = time.process_time() - start
    errors = score(task, task.flatten(fit.get_samples(NUM_DRAWS)))
    return {
        "seconds": seconds,
        **errors,
        "ess": fit.ess,
        "khat": fit.khat,
        "elbo": fit.elbo.mean,
        "verdict": fit.verdict,
        "engine": fit.engines["flow"],
    }


# --- beside zuko


class _Ours:
    def __init__(self) -> None:
        self.module: nn.Module = pf.flows.cnf(2, hidden_features=(64, 64), **TIMED)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.module().log_prob(x)

    def tight(self) -> _Ours:
        other = copy.deepcopy(self)
        other.module.double()
        other.module.transform[0].solver = pf.numerics.Solver("dopri5", rtol=1e-8, atol=1e-9)
        return other


class _Zuko(_Ours):
    def __init__(self) -> None:
        import zuko

        self.module = zuko.flows.CNF(2, hidden_features=(64, 64), **TIMED)

    def tight(self) -> _Zuko:
        other = copy.deepcopy(self)
        other.module.double()
        for m in other.module.modules():
            if hasattr(m, "rtol"):
                m.rtol, m.atol = 1e-8, 1e-11  # of the log-det it takes a hundredth as the state
        return other


def peers(steps: int) -> Record:
    """Both fitted to the same batches for as many steps, then timed in turns; and how far each log density is from its own finer solve."""
    torch.manual_seed(0)
    found = {"pyro_flows": _Ours(), "zuko": _Zuko()}
    runs: dict[str, dict[str, Callable[[], float]]] = {"log_prob": {}, "training step": {}}
    errors, losses = {}, {}
    for name, peer in found.items():
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(peer.module.parameters(), 5e-3)

        def step(peer: _Ours = peer, optimizer: torch.optim.Optimizer = optimizer, x: Tensor | None = None) -> Tensor:
            optimizer.zero_grad()
            loss = -peer.log_prob(TARGET.sample(BATCH) if x is None else x).mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        for _ in range(steps):
            step()
        x = TARGET.sample(BATCH)
        with torch.no_grad():
            test = TARGET.sample(10_000)
            losses[name] = -float(peer.log_prob(test).mean()) - TARGET.entropy
            error = (peer.log_prob(x) - peer.tight().log_prob(x.double())).abs()
        errors[name] = [float(error.median()), float(error.max())]

        def scored(peer: _Ours = peer, x: Tensor = x) -> None:
            with torch.no_grad():
                peer.log_prob(x)

        for job, work in (("log_prob", scored), ("training step", lambda step=step, x=x: step(x=x))):
            runs[job][name] = lambda work=work: _milliseconds(work)
    times = {job: in_turns(of, 15, 20.0) for job, of in runs.items()}
    return {"times": times, "errors": errors, "kl": losses, "steps": steps}


def _milliseconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


# --- all


def jobs(seeds: int) -> Iterator[tuple[Record, Callable[[], Record]]]:
    yield {"kind": "peers", "name": "zuko", "seed": 0}, lambda: peers(200)
    for seed in range(seeds):
        for name in TRAININGS:
            yield {"kind": "toy", "name": name, "seed": seed}, lambda name=name, seed=seed: toy(name, seed)
        for weight in PENALTIES:
            yield {"kind": "rnode", "name": weight, "seed": seed}, lambda weight=weight, seed=seed: rnode(weight, seed)
        yield {"kind": "posterior", "name": "eight schools", "seed": seed}, lambda seed=seed: posterior(seed)


def _cells(records: list[Record], key: str, digits: int) -> str:
    values = [r[key] for r in records]
    return f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})"


def _named(records: list[Record]) -> dict[Any, list[Record]]:
    return {name: [r for r in records if r["name"] == name] for name in dict.fromkeys(r["name"] for r in records)}


def render(records: list[Record]) -> str:
    """The page."""
    of = {kind: [r for r in records if r["kind"] == kind] for kind in ("toy", "rnode", "posterior", "peers")}
    toys = [
        [n, _cells(r, "kl", 3), _cells(r, "seconds", 0), _cells(r, "evaluations", 0), _cells(r, "kinetic", 1), str(len(r))]
        for n, r in _named(of["toy"]).items()
    ]
    free = {r["seed"]: r["evaluations"] for r in of["rnode"] if r["name"] == 0}
    penalties = [
        [
            f"{n:g}",
            _cells(r, "kl", 3),
            _cells(r, "evaluations", 0),
            ", ".join(f"{100 * (1 - x['evaluations'] / free[x['seed']]):.0f} %" for x in sorted(r, key=lambda x: x["seed"])),
            _cells(r, "kinetic", 1),
            _cells(r, "jacobian", 1),
            _cells(r, "seconds", 0),
            str(len(r)),
        ]
        for n, r in sorted(_named(of["rnode"]).items())
    ]
    fits = [
        [str(r["seed"]), *(f"{r[k]:.3f}" for k in ("e_mean", "e_sd", "ess", "khat", "elbo")), r["verdict"], r["engine"], f"{r['seconds']:.0f}"]
        for r in of["posterior"]
    ]
    rows = []
    for r in of["peers"]:
        for name, (middle, worst) in r["errors"].items():
            rows.append([name, *(f"{r['times'][job][name]:.1f}" for job in r["times"]), f"{middle:.1e}", f"{worst:.1e}", f"{r['kl'][name]:.3f}"])
    return PAGE.format(
        toys=table(["training", "KL", "CPU-seconds", "evaluations", "kinetic", "seeds"], toys),
        penalties=table(["weight of both", "KL", "evaluations", "fewer, by seed", "kinetic", "Jacobian", "CPU-seconds", "seeds"], penalties),
        fits=table(["seed", "e_mean", "e_sd", "ESS", "k-hat", "ELBO", "verdict", "engine", "CPU-seconds"], fits),
        peers=table(["library", "log_prob, ms", "training step, ms", "error, median", "error, largest", "KL"], rows),
        batch=BATCH,
        steps=of["peers"][0]["steps"] if of["peers"] else 0,
    )


PAGE = """# Continuous flows

Made by `benchmarks/cnf.py`. The target is *8gaussians*, whose entropy is known; the net has two hidden layers of 64, and the trace is exact.
Where there are several seeds, cells are the median and, in brackets, the worst.

## Two ways to train

Maximum likelihood by 600 steps of {batch} points through eight steps of RK4; flow matching by 15,000 steps of {batch}, and with pairs by optimal
transport by 4,000 steps of 256. Divergences come from 40,000 fresh points with `dopri5` at tolerances of 1e-5, and so do the evaluations of the net
that one solve takes for 2,000 points. *Kinetic* is the mean of ∫‖f‖² dt along the paths.

{toys}
## Penalties on the paths

From one flow that 3,000 steps of flow matching have made, 600 steps of maximum likelihood through `dopri5` at 1e-4, with `kinetic=` and `jacobian=`
both at the weight. Likelihood alone does not care how a point arrives, and leaves the paths as they are. (A flow that likelihood trains from its zero
start has short paths without any penalty, see the first table.) A step of `dopri5` takes six evaluations, so their number comes in sixes.

{penalties}
## Beside zuko

The same target, width and tolerances (rtol 1e-5, atol 1e-6), float32, one thread, {batch} points, in turns in one
process, after {steps} steps of training each. zuko controls its log-det a hundred times less tightly than its state; the errors are those of the log
density against a float64 solve of the same net with tolerances a thousand times smaller. KL is what these few steps reached. Neither normflows nor
nflows has a continuous flow; torchflows could not be installed.

{peers}
## A posterior

Eight schools, noncentred, by `FlowVI(model, flow="cnf", max_steps=1500)`: four steps of RK4, the path gradient through the equation. Below
.10 and .15 a fit passes; see {{doc}}`index`.

{fits}"""


def main() -> None:
    """Measure what is missing, or render what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="a kind or a name")
    parser.add_argument("--out", type=Path, default=Path("cnf.json"))
    parser.add_argument("--render", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.render:
        return rerender(options.render, render)
    complete(options.out, (job for job in jobs(options.seeds) if options.only in ("", job[0]["kind"], str(job[0]["name"]))))


if __name__ == "__main__":
    main()
