"""Stochastic flows against bijections: two-dimensional targets with gaps and holes, handwritten digits, and a lattice of modes as a posterior.

    taskset -c 0 python benchmarks/stochastic.py --out docs/benchmarks/stochastic.json
    python benchmarks/stochastic.py --render docs/benchmarks/stochastic.json

Seconds are the process's CPU time on one thread. Records are added to the file as they come, and those that it has are not made again; the order is
that of importance.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

import pyro_flows as pf
from benchmarks.records import Record, complete, rerender
from benchmarks.report import table
from benchmarks.stochastic_posteriors import DIGIT_MODELS, digits, digits_file, lattice, two_orders
from benchmarks.toys import TOYS, Toy
from pyro_flows.distributions import GaussianMixture, Resampled
from pyro_flows.stochastic import StochasticFlow

TARGETS = {"ring8": "8gaussians", "checkerboard": "checkerboard", "annulus": "annulus", "two squares": "two squares"}
PARAMETERS, STEPS, BATCH = 20_000, 2500, 512
LR = {"checkerboard": 1e-2}  # for every model; 5e-3 elsewhere
EQUAL_SECONDS = 45.0  # what the equal-time runs may spend, about the LWTA flows' cost
TEST, PARTICLES = 20_000, 100


# --- models of about as many parameters


def _resampled(width: int) -> nn.Module:
    return Resampled(2, truncation=100, hidden_features=(width, width), num_nodes=1024)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "RealNVP": lambda h: pf.flows.realnvp(2, transforms=8, hidden_features=(h, h)),
    "NSF": lambda h: pf.flows.nsf(2, transforms=4, hidden_features=(h, h), bins=8),
    "RealNVP, GMM base": lambda h: pf.flows.realnvp(2, transforms=8, hidden_features=(h, h), base=GaussianMixture(2, 16)),
    "RealNVP, resampled base": lambda h: pf.flows.realnvp(2, transforms=6, hidden_features=(h, h), base=_resampled(h)),
    "CIF": lambda h: pf.flows.cif(2, transforms=6, hidden_features=(h, h)),
    "LWTA, base": lambda h: pf.flows.lwta(2, transforms=6, hidden_features=(h, h), units=8, blocks=2),
    "LWTA, interleaved": lambda h: pf.flows.lwta(2, transforms=5, hidden_features=(h, h), units=4, blocks=3, placement="interleaved"),
    "ARLWTA": lambda h: pf.flows.ar_lwta(2, transforms=3, hidden_features=(h, h), units=8),
}


def size(flow: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in flow.parameters())


def build(name: str) -> nn.Module:
    """The model with the width that brings it nearest to the wanted number of parameters."""
    width = min(range(8, 160, 2), key=lambda h: abs(size(MODELS[name](h)) - PARAMETERS))
    return MODELS[name](width)


# --- two-dimensional targets


def log_density(target: Toy, x: Tensor) -> Tensor:
    """The target's own: closed for the ring of normals and for uniform targets."""
    if target.noise == 0:
        return torch.full(x.shape[:-1], -target.entropy)
    centres = target.centre((torch.arange(8) + 0.5)[:, None].expand(8, 4) / 8)
    scores = -(torch.cdist(x, centres) ** 2) / (2 * target.noise**2)
    return scores.logsumexp(-1) - math.log(8) - math.log(2 * math.pi * target.noise**2)


def mode_of(name: str, x: Tensor) -> tuple[Tensor, int] | None:
    """The mode that each point belongs to, -1 for none, and the number of modes."""
    if name == "ring8":
        return ((torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round() % 8).long(), 8
    if name == "two squares":
        inside = (x[:, 0].abs() - 2).abs().lt(1) & x[:, 1].abs().lt(1)
        return torch.where(inside, (x[:, 0] > 0).long(), -1), 2
    if name == "checkerboard":
        cell = (x / 2).floor().long() + 2
        inside = ((cell >= 0) & (cell < 4)).all(-1) & (cell.sum(-1) % 2 == 0)
        return torch.where(inside, 2 * cell[:, 0] + cell[:, 1] // 2, -1), 8
    return None


@torch.no_grad()
def score(flow: Any, x: Tensor) -> Tensor:
    """Log density; its bound where there is no density."""
    d = flow()
    bound = isinstance(flow, StochasticFlow) and not flow.exact
    return torch.cat([d.log_prob_bound(part, PARTICLES) if bound else d.log_prob(part) for part in x.split(1000)])


def singular_values(flow: Any, count: int = 2000) -> tuple[float, float]:
    """Largest and smallest singular value of the generator over draws of the base, indices held fixed."""
    z = flow.base().sample((count,)).requires_grad_()
    if isinstance(flow, StochasticFlow):
        indices = flow.simulate(z.detach())[1].indices
        x = flow.push(z, indices)[0]
    else:
        x = flow.transform.forward_and_ladj(z)[0]
    rows = [torch.autograd.grad(x[:, i].sum(), z, retain_graph=True)[0] for i in range(x.shape[-1])]
    values = torch.linalg.svdvals(torch.stack(rows, 1).detach())
    return float(values.max()), float(values.min())


def toy(name: str, model: str, seed: int, equal_time: bool = False) -> Record:
    """KL divergence from a target to a model trained on its draws, and what the model is like."""
    torch.manual_seed(seed)
    target = TOYS[TARGETS[name]]
    x, test = target.sample(200_000), target.sample(TEST)
    flow, steps = build(model), STEPS
    options = {"batch_size": BATCH, "lr": LR.get(name, 5e-3), "validation": 0.005, "seed": seed, "progress": False}
    if model == "CIF":
        options["objective"] = "elbo"
    if equal_time:
        start = time.process_time()
        pf.fit_density(build(model), x, max_steps=100, **options)
        steps = int(100 * EQUAL_SECONDS / (time.process_time() - start))
    start = time.process_time()
    pf.fit_density(flow, x, max_steps=steps, **options)
    seconds = time.process_time() - start
    gap = log_density(target, test) - score(flow, test)
    record = {"kind": "equal time" if equal_time else "toy", "name": name, "model": model, "seed": seed, "parameters": size(flow)}
    record |= {"kl": float(gap.mean()), "se": float(gap.std()) / TEST**0.5, "seconds": seconds, "steps": steps}
    record["largest"], record["smallest"] = singular_values(flow)
    with torch.no_grad():
        modes = mode_of(name, flow().sample((TEST,)))
    if modes is not None:
        shares = torch.bincount(modes[0][modes[0] >= 0], minlength=modes[1]) / TEST
        record |= {"mode": float(shares.min()) * modes[1], "stray": float((modes[0] < 0).float().mean())}
    return record


def _of(records: list[Record], key: str, digits: int = 3, worst: Callable[..., float] = max) -> str:
    """Median of the seeds, and the worst in brackets."""
    values = [r[key] for r in records if r.get(key) is not None]
    if not values:
        return ""
    return f"{statistics.median(values):.{digits}f}" + (f" ({worst(values):.{digits}f})" if len(values) > 1 else "")


def _groups(records: list[Record], *kinds: str) -> Iterator[tuple[str, str, list[Record]]]:
    found = [r for r in records if r["kind"] in kinds]
    for name in [n for n in (*TARGETS, "lattice", "two orders", "digits") if any(r["name"] == n for r in found)]:
        for model in dict.fromkeys([*MODELS, *(r["model"] for r in found)]):
            group = [r for r in found if r["name"] == name and r["model"] == model]
            if group:
                yield name, model, group


def toy_table(records: list[Record], kind: str) -> str:
    """One row a target and model."""
    header = ["target", "model", "parameters", "seeds", "KL", "standard error", "largest singular value", "smallest mode", "stray", "CPU-seconds"]
    rows = [
        [name, model, str(g[0]["parameters"]), str(len(g)), _of(g, "kl", 4), _of(g, "se", 4), _of(g, "largest", 1), _of(g, "mode", 2, min)]
        + [_of(g, "stray", 3), _of(g, "seconds", 0)]
        for name, model, g in _groups(records, kind)
    ]
    return table(header, rows)


def posterior_table(records: list[Record]) -> str:
    """One row a posterior and guide."""
    rows = [
        [name, model, str(len(g)), _of(g, "elbo", 4, min), _of(g, "mode", 3, min), _of(g, "ess", 3, min), _of(g, "seconds", 0)]
        for name, model, g in _groups(records, "lattice", "two orders")
    ]
    return table(["posterior", "guide", "seeds", "ELBO", "mode", "ESS", "CPU-seconds"], rows)


def digit_table(records: list[Record]) -> str:
    """One row a model."""
    rows = [
        [model, str(g[0]["parameters"]), str(len(g)), _of(g, "bits", 4), _of(g, "se", 4), _of(g, "seconds", 0)]
        for _, model, g in _groups(records, "digits")
    ]
    return table(["model", "parameters", "seeds", "bits a dimension", "standard error", "CPU-seconds"], rows)


def render(records: list[Record]) -> str:
    """The page."""
    equal = toy_table(records, "equal time") if any(r["kind"] == "equal time" for r in records) else "Not measured yet.\n"
    parts = {"toys": toy_table(records, "toy"), "equal": equal, "posteriors": posterior_table(records), "digits": digit_table(records)}
    groups = [g for kind in ("toy", "equal time", "lattice", "two orders", "digits") for *_, g in _groups(records, kind)]
    whole = len(groups) >= 2 * len(TARGETS) * len(MODELS) + 7 and all(len(g) >= 3 for g in groups)
    state = "" if whole else "**State:** unfinished; the columns of seeds say how much is measured.\n\n"
    numbers = {"parameters": PARAMETERS, "steps": STEPS, "batch": BATCH, "equal_seconds": EQUAL_SECONDS, "test": TEST, "particles": PARTICLES}
    return PAGE.format(state=state, **numbers, **parts)


PAGE = """# Stochastic flows

Made by `benchmarks/stochastic.py`. Medians over the seeds that the tables count, the worst of them in brackets; the machine was busy with other
work, which processor seconds feel a little.

{state}## Targets with gaps and holes

About {parameters} parameters each, {steps} steps of {batch} rows out of 200,000, one learning rate for all models of a target (.01 on the
checkerboard, .005 elsewhere). The divergence is the mean of log p - log q over {test} new points, with its standard error; CIF is trained by
its ELBO and scored by the bound of {particles} particles. *Largest singular value* is that of the generator's Jacobian over 2000 draws of the
base, the path held fixed: what a map must stretch to tear its base apart. *Smallest mode* is the mass of the mode with the fewest draws, over
what it should have; *stray* is the share of draws outside the support.

{toys}
At equal time, about {equal_seconds:.0f} CPU-seconds each:

{equal}
What the tables say. A map that tears the base stretches it, by a factor of a hundred and more, and the more the better it fits; flows whose
units compete come as near with factors of one to six. Where a target has sharp edges, splines that stretch (NSF) come nearer still: on the
checkerboard and the two squares they have the lowest divergence of all. On the ring of normals, whose modes are smooth, competition wins, level
with a base that is a mixture. CIF was looked at on four targets at two budgets, and is nowhere better than RealNVP by more than the seeds
differ; its bound is worse by at most .06 at equal steps, and one of its runs on the checkerboard gave some points no mass (a divergence of 40).

## Posteriors with separate modes

*lattice*: nine normals of standard deviation 1/4, two apart, whose evidence is 1, so that the best ELBO is 0; *mode* is the share of the
smallest mode, ideally .111. *two orders*: the means of a mixture model of 60 rows, whose posterior is the same in both orders of its clusters;
*mode* is the share of one order, ideally .5. Both guides are trained by `FlowVI`, 900 steps of 64 draws, everything else by default.

{posteriors}
## Digits

MNIST at 8 x 8: the middle 24 x 24 pixels averaged three by three and rounded to 17 levels, uniform dequantisation, a logit with margin .05;
60,000 images to train on, 2000 to test. 1200 steps of 128. An upper bound of the bits, averaged over three draws of the noise; CIF's density is
its bound of 50 particles. LWTA: a block of 8 local groups of four units next to the base, which costs one path, one more block of four units,
six couplings.

{digits}"""


def jobs() -> Iterator[tuple[Record, Callable[[], Record]]]:
    """Every measurement, by what identifies it, the most important first."""
    wanted = {"ring8": ("LWTA, base", "ARLWTA"), "checkerboard": ("LWTA, interleaved",), "annulus": ("LWTA, base",), "two squares": ("LWTA, base",)}

    def job(name: str, model: str, seed: int, equal_time: bool = False) -> tuple[Record, Callable[[], Record]]:
        kind = "equal time" if equal_time else "toy"
        return {"kind": kind, "name": name, "model": model, "seed": seed}, lambda: toy(name, model, seed, equal_time)

    for seed in range(3):
        for name, models in wanted.items():
            for model in ("RealNVP", *models):
                yield job(name, model, seed)
    for seed in range(3):
        for measure in (lattice, two_orders):
            for model in ("LWTA", "RealNVP"):
                kind = "lattice" if measure is lattice else "two orders"
                yield {"kind": kind, "model": model, "seed": seed}, lambda measure=measure, model=model, seed=seed: measure(model, seed)
    if digits_file().exists():
        for seed in range(3):
            for model in DIGIT_MODELS:
                yield {"kind": "digits", "model": model, "seed": seed}, lambda model=model, seed=seed: digits(model, seed)
    else:
        print(f"the digits are skipped: no {digits_file().name}; set PYRO_FLOWS_DATA to the folder that holds density/{digits_file().name}")
    for seed in range(3):
        for name in TARGETS:
            yield job(name, "CIF", seed)
    for seed in range(3):
        for name in TARGETS:
            yield job(name, "RealNVP", seed, True)
            for model in MODELS:
                yield job(name, model, seed)
    for seed in range(3):
        for name in TARGETS:
            for model in MODELS:
                yield job(name, model, seed, True)


def main() -> None:
    """Measure what is missing, or render what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a kind, a target or a model")
    parser.add_argument("--out", type=Path, default=Path("stochastic.json"))
    parser.add_argument("--render", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.render:
        return rerender(options.render, render)
    complete(options.out, (job for job in jobs() if options.only in ("", job[0]["kind"], job[0].get("name"), job[0]["model"])))


if __name__ == "__main__":
    main()
