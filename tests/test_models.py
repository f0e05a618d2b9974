"""The benchmark's models: against their reference draws, under vmap, graph capture and vectorised particles."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from data import needs_posteriors
from pyro import poutine
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.log_joint import LogJoint
from benchmarks.models import NAMES, Task, load

pytestmark = needs_posteriors

# Sites that the reference does not have as columns, from those it has: the inverse of each Task.derive.
UNDERIVE: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "eight_schools": lambda s: {"eta": (s["theta"] - s["mu"]) / s["tau"]},
    "garch": lambda s: {"share": s["beta1"] / (1 - s["alpha1"])},
    "seeds": lambda s: {"z": s["b"] / s["sigma"]},
    "radon": lambda s: {"raw": (s["alpha"] - s["mu_alpha"]) / s["sigma_alpha"]},
    "irt_2pl": lambda s: {
        "z": s["theta"] / s["sigma_theta"],
        "z_a": s["a"].log() / s["sigma_a"],
        "z_b": (s["b"] - s["mu_b"]) / s["sigma_b"],
    },
}


@cache
def prepared(name: str) -> tuple[Task, LogJoint, Tensor]:
    """The task, its log joint and the reference draws in the unconstrained space (2000, latent dim)."""
    task = load(name)
    log_joint = LogJoint(task.model, task.args, task.kwargs)
    columns: dict[str, list[int]] = {}
    for i, column in enumerate(task.names):
        columns.setdefault(column.split("[")[0], []).append(i)
    sites = {block: task.draws[:, index] for block, index in columns.items()}
    if name.startswith("hmm"):  # float32 rows of the transition matrix: exactly on the simplex again
        sites |= {row: sites[row] / sites[row].sum(-1, keepdim=True) for row in ("theta1", "theta2")}
    sites |= UNDERIVE.get(name, lambda s: {})(sites)
    values = {
        site: sites[site].reshape(-1, *bijection.forward_shape(shape)) for site, bijection, shape in log_joint.sites
    }
    return task, log_joint, log_joint.pack(values)


def stein(u: Tensor, gradient: Tensor) -> Tensor:
    """z-scores of the identities E[g_i] = 0 and E[(u_i - E u_i) g_i] = -1, g the gradient of the log density."""
    terms = torch.cat([gradient, (u - u.mean(0)) * gradient + 1], -1)
    return terms.mean(0) / (terms.std(0) / math.sqrt(len(terms)))


@pytest.mark.parametrize("name", NAMES)
def test_stein_identities_hold_at_the_reference_draws(name: str) -> None:
    _, log_joint, u = prepared(name)
    z = stein(u, log_joint.gradient(u, chunk=500))
    assert z.isfinite().all()
    assert z.abs().max() < 3


def _wrong_tau_prior(values: dict[str, Tensor]) -> Tensor:
    return dist.HalfCauchy(6.0).log_prob(values["tau"]) - dist.HalfCauchy(5.0).log_prob(values["tau"])


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        ("eight_schools", _wrong_tau_prior),  # HalfCauchy(5) written as 6
        ("garch", lambda values: -torch.log1p(-values["alpha1"])),  # the Jacobian of beta1 forgotten
        ("seeds", lambda values: -0.5 * (values["z"] ** 2 * (1 / 1.3**2 - 1)).sum()),  # z ~ N(0, 1) written as 1.3
    ],
)
def test_stein_identities_catch_a_wrong_model(name: str, difference: Callable[[dict[str, Tensor]], Tensor]) -> None:
    _, log_joint, u = prepared(name)
    gradient = torch.func.vmap(torch.func.grad(lambda row: difference(log_joint.unpack(row)[0])))(u)
    assert stein(u, log_joint.gradient(u) + gradient).abs().max() > 3.5


@pytest.mark.parametrize("name", NAMES)
def test_vmap_equals_a_loop_and_graph_capture_equals_vmap(name: str) -> None:
    _, log_joint, u = prepared(name)
    value = log_joint.batched(u[:3])
    torch.testing.assert_close(value, torch.stack([log_joint(row) for row in u[:3]]), rtol=1e-12, atol=1e-10)
    captured = make_fx(torch.func.vmap(log_joint))(u[3:6])
    torch.testing.assert_close(captured(u[:3]), value, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_vectorised_particles_equal_a_loop(name: str) -> None:
    """As Trace_ELBO(vectorize_particles=True) does it: one run of the model inside an outermost plate."""
    task, log_joint, u = prepared(name)
    particles, u = 3, u[:3]
    values, ladj = log_joint.unpack(u)
    sites = (
        poutine.trace(poutine.condition(task.model, data=log_joint.unpack(u[0])[0]))
        .get_trace(*task.args)
        .nodes.values()
    )
    depth = max(
        (-frame.dim for site in sites if site["type"] == "sample" for frame in site["cond_indep_stack"]), default=0
    )
    event_dims = {site: bijection.codomain.event_dim for site, bijection, _ in log_joint.sites}
    batched = {}
    for site, value in values.items():
        batch = value.shape[1 : value.dim() - event_dims[site]]
        batched[site] = value.reshape(particles, *(1,) * (depth - len(batch)), *value.shape[1:])
    with pyro.plate("particles", particles, dim=-depth - 1):
        trace = poutine.trace(poutine.condition(task.model, data=batched)).get_trace(*task.args)
    trace.compute_log_prob()
    total = ladj
    for site in trace.nodes.values():
        if "log_prob" in site and site["name"] != "particles":
            assert site["log_prob"].shape[:1] in [(particles,), ()]
            total = total + site["log_prob"].expand(particles, *site["log_prob"].shape[1:]).reshape(particles, -1).sum(
                -1
            )
    torch.testing.assert_close(total, log_joint.batched(u), rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_flatten_gives_the_reference_columns_with_and_without_deterministic_sites(name: str) -> None:
    task, log_joint, u = prepared(name)
    values, _ = log_joint.unpack(u[:5])
    torch.testing.assert_close(task.flatten(values), task.draws[:5], rtol=1e-6, atol=1e-6)
    trace = poutine.trace(poutine.condition(task.model, data={k: v[0] for k, v in values.items()})).get_trace(
        *task.args
    )
    everything = {
        k: site["value"][None]
        for k, site in trace.nodes.items()
        if site["type"] == "sample" and site["value"] is not None
    }
    names = {column.split("[")[0] for column in task.names}
    assert names <= everything.keys()
    torch.testing.assert_close(task.flatten({k: everything[k] for k in names}), task.draws[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_dtype_is_that_of_the_data(name: str) -> None:
    _, reference, u = prepared(name)
    task = load(name, torch.float32)
    log_joint = LogJoint(task.model, task.args, dtype=torch.float32)
    value = log_joint.batched(u[:2].float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), reference.batched(u[:2]), rtol=1e-4, atol=1e-2)


def test_centred_and_noncentred_eight_schools_are_one_posterior() -> None:
    """theta = mu + tau eta: exact, where the Stein identities of the centred funnel are too noisy for a wrong scale."""
    centred, noncentred = prepared("eight_schools_centered")[1], prepared("eight_schools")[1]
    values, _ = noncentred.unpack(prepared("eight_schools")[2][:20])
    theta = values["mu"][:, None] + values["tau"][:, None] * values["eta"]
    u, v = noncentred.pack(values), centred.pack({**values, "theta": theta})
    torch.testing.assert_close(centred.batched(v), noncentred.batched(u) - 8 * values["tau"].log())


@pytest.mark.parametrize("name", ["eight_schools", "arK", "kidiq"])
def test_importance_sampling_recovers_the_known_evidence(name: str) -> None:
    """Constants count here, which the Stein identities cannot see."""
    task, log_joint, u = prepared(name)
    torch.manual_seed(0)
    proposal = dist.MultivariateStudentT(u.new_tensor(8.0), u.mean(0), torch.linalg.cholesky(torch.cov(u.T)))
    x = proposal.sample((20_000,))
    log_w = log_joint.batched(x, chunk=5000) - proposal.log_prob(x)
    assert abs(float(torch.logsumexp(log_w, 0)) - math.log(len(x)) - task.log_evidence) < 0.03
