"""Draws docs/images/eight_schools.png: the funnel of the centred eight schools, by AutoNormal, by pf.fit, and exactly.

    python docs/images/make.py

Takes about a minute. Every random number is seeded.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from torch import Tensor

import pyro_flows as pf

HERE = Path(__file__).parent
EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
DRAWS = 2500


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """The centred parametrisation, whose posterior is a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def mean_field(steps: int = 4000) -> dict[str, Tensor]:
    """Draws of stock Pyro's AutoNormal, trained until its ELBO no longer moves."""
    pyro.clear_param_store()
    guide = AutoNormal(eight_schools)
    optimizer = ClippedAdam({"lr": 0.1, "betas": (0.9, 0.99), "lrd": 0.02 ** (1 / steps)})
    svi = SVI(eight_schools, guide, optimizer, Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1))
    for _ in range(steps):
        svi.step(EFFECTS, ERRORS)
    with torch.no_grad():
        return Predictive(guide, num_samples=DRAWS, parallel=True)(EFFECTS, ERRORS)


def exact(num_samples: int = DRAWS) -> dict[str, Tensor]:
    """Exact draws: tau from its marginal on a fine grid, then mu and theta from their normal conditionals."""
    y, variance = EFFECTS.double(), ERRORS.double() ** 2
    log_tau = torch.linspace(-8.0, 6.0, 20_001, dtype=torch.float64)
    tau = log_tau.exp()
    precision = 1 / (variance + tau[:, None] ** 2)  # of y_j given mu and tau
    mu_precision = precision.sum(-1) + 1 / 25
    mu_mean = (precision * y).sum(-1) / mu_precision
    log_marginal = dist.HalfCauchy(5.0).log_prob(tau) + log_tau
    log_marginal += 0.5 * (precision.log().sum(-1) - (precision * y**2).sum(-1) + mu_mean**2 * mu_precision - mu_precision.log())
    at = torch.multinomial(log_marginal.softmax(-1), num_samples, replacement=True)
    mu = mu_mean[at] + torch.randn(num_samples, dtype=torch.float64) / mu_precision[at].sqrt()
    weight = 1 / (1 / variance + 1 / tau[at, None] ** 2)
    mean = weight * (y / variance + mu[:, None] / tau[at, None] ** 2)
    return {"mu": mu, "tau": tau[at], "theta": mean + weight.sqrt() * torch.randn(num_samples, 8, dtype=torch.float64)}


def draw(path: Path) -> None:
    """Fit, and draw the three panels."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    truth = exact()
    normal = mean_field()
    flow = pf.fit(eight_schools, EFFECTS, ERRORS).get_samples(DRAWS)
    panels = [("AutoNormal, stock Pyro", normal, "#c0392b"), ("pf.fit", flow, "#2166ac"), ("exact draws", truth, "#444444")]
    figure, axes = plt.subplots(1, 3, figsize=(9.0, 3.4), sharex=True, sharey=True, layout="constrained")
    for axis, (title, draws, colour) in zip(axes, panels, strict=True):
        theta, tau = draws["theta"].reshape(-1, 8)[:, 0], draws["tau"].reshape(-1)
        axis.scatter(theta, tau.log(), s=4, alpha=0.3, linewidths=0, color=colour)
        axis.set_title(title, color=colour, fontsize=11)
        note = f"tau: mean {tau.mean():.1f}, sd {tau.std():.1f}"
        axis.text(0.97, 0.04, note, transform=axis.transAxes, ha="right", fontsize=9, color="#444444")
        axis.set(xlim=(-18, 36), ylim=(-4.2, 3.6), xlabel="theta[0]")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("log tau")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(HERE / "eight_schools.png")
