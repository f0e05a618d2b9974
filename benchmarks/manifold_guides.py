"""AutoManifoldFlow against NUTS on a model with a scale, a direction and a composition.

    python benchmarks/manifold_guides.py --out docs/benchmarks/manifold_guides.md

The reference is NUTS on the model of ``ManifoldReparam``. The guide is trained twice, by stock ``SVI`` and by ``FlowVI``, and judged by 10,000 raw
draws: the worst coordinate's error of the mean, in posterior standard deviations, and of the standard deviation. PASS is below 0.10 and below 0.15.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.ops.stats import effective_sample_size
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

import pyro_flows as pf
from pyro_flows.manifolds import ManifoldReparam, Sphere

DRAWS = 10_000


def model(y: Tensor, counts: Tensor) -> None:
    """Noisy points in some direction, and counts of some composition; latent sites may have particles to the left of the plates."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    x = pyro.sample("x", dist.ProjectedNormal(torch.zeros(3)))
    parts = pyro.sample("parts", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("rows", len(y), dim=-1):
        pyro.sample("y", dist.Normal(x, scale.unsqueeze(-1)).to_event(1), obs=y)
    with pyro.plate("draws", len(counts), dim=-1):
        pyro.sample("counts", dist.Categorical(parts), obs=counts)


def data() -> tuple[Tensor, Tensor]:
    """Twenty points and twenty counts."""
    torch.manual_seed(1)
    return torch.tensor([0.6, 0.0, 0.8]) + 0.5 * torch.randn(20, 3), torch.randint(0, 4, (20,))


def nuts(args: tuple[Tensor, Tensor], draws: int) -> tuple[Tensor, Tensor]:
    """Draws of all coordinates, ``(draws, 8)``, and their effective numbers."""
    pyro.set_rng_seed(0)
    kernel = NUTS(ManifoldReparam()(model), jit_compile=True, ignore_jit_warnings=True)
    chain = MCMC(kernel, num_samples=draws, warmup_steps=300, disable_progbar=True)
    chain.run(*args)
    sites = chain.get_samples()
    sites["x"] = Sphere(3).project(sites.pop("x_normal"))
    columns = flatten(sites)
    return columns, effective_sample_size(columns[None], 0, 1)


def flatten(sites: dict[str, Tensor]) -> Tensor:
    """Sites as columns, in one order."""
    return torch.cat([sites[name].reshape(len(sites["x"]), -1) for name in ("scale", "x", "parts")], -1)


def by_svi(args: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """The guide trained by stock SVI, with the learning rates that its docstring names."""
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    guide, steps = pf.AutoManifoldFlow(model).setup(*args), 1500

    def rates(name: str) -> dict[str, float]:
        nets = any(part in name for part in (".net.", ".inner.", ".params."))
        return {"lr": 2e-3 if nets else 1e-2, "lrd": 0.05 ** (1 / steps), "clip_norm": 10.0}

    svi = SVI(model, guide, pyro.optim.ClippedAdam(rates), Trace_ELBO(num_particles=64, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(*args)
    with torch.no_grad():
        return flatten(guide.unpack(guide.flow().sample((DRAWS,))))


def by_flow_vi(args: tuple[Tensor, Tensor], seed: int) -> Tensor:
    """The guide that FlowVI picks and trains."""
    posterior = pf.FlowVI(model, seed=seed, progress=False).run(*args)
    assert type(posterior.guide) is pf.AutoManifoldFlow
    print(posterior, flush=True)
    return flatten(posterior.get_samples(DRAWS))


METHODS: dict[str, Callable[[tuple[Tensor, Tensor], int], Tensor]] = {"FlowVI": by_flow_vi, "stock SVI": by_svi}


def main() -> None:
    """Run the comparison and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draws", type=int, default=4000, help="of NUTS, after 300 of warm-up")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    args = data()
    start = time.process_time()
    reference, ess = nuts(args, options.draws)
    seconds = time.process_time() - start
    lines = [
        "# AutoManifoldFlow against NUTS",
        "",
        "A scale, a direction and a composition of four parts. Worst coordinate of eight; PASS is e_mean < 0.10 and e_sd < 0.15. Made by",
        "`python benchmarks/manifold_guides.py`, one thread, float64.",
        "",
        f"Reference: NUTS with `ManifoldReparam`, {options.draws} draws, effective number {ess.min().item():.0f} at least (an error of the mean of",
        f"{ess.min().item() ** -0.5:.3f} standard deviations), {seconds:.0f} CPU-seconds.",
        "",
        "| Training | Seed | e_mean | e_sd | | CPU-seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    print(*lines, sep="\n", flush=True)
    for seed in range(options.seeds):
        for name, train in METHODS.items():
            start = time.process_time()
            draws = train(args, seed)
            spread = reference.std(0)
            e_mean = ((draws.mean(0) - reference.mean(0)).abs() / spread).max().item()
            e_sd = (draws.std(0) / spread - 1).abs().max().item()
            word = "PASS" if e_mean < 0.10 and e_sd < 0.15 else "fail"
            lines.append(f"| {name} | {seed} | {e_mean:.3f} | {e_sd:.3f} | {word} | {time.process_time() - start:.0f} |")
            print(lines[-1], flush=True)
            if options.out:
                options.out.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
