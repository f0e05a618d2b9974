"""Directions and angles reparameterised to normal vectors: exact densities, NUTS against known moments, every stock autoguide, bad input."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoIAFNormal, AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
from pyro.ops.stats import effective_sample_size

import pyro_flows as pf
from pyro_flows.errors import SupportError
from pyro_flows.manifolds import (
    AxisFlow,
    CircleReparam,
    ManifoldReparam,
    PowerSpherical,
    Sphere,
    SphereReparam,
    Torus,
    TorusElementwise,
    Uniform,
    UniformSphere,
    UniformTorus,
    VonMisesFisher,
    manifold_of,
)

POLE = torch.tensor([0.0, 0.6, 0.8])


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def prior(fn, obs=None):
    def model():
        return pyro.sample("x", fn, obs=obs)

    return model


def sphere_flow():
    flow = pf.Flow(Uniform(Sphere(3)), AxisFlow(3)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return flow()


DIRECTIONS = {
    "vmf": lambda: VonMisesFisher(POLE.double(), 4.0),
    "projected normal": lambda: dist.ProjectedNormal(2 * POLE.double()),
    "plane": lambda: PowerSpherical(torch.tensor([0.6, 0.8], dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_density_of_directions_is_the_priors(name):
    """Divided by the normal density, what the normal vector has is p(x) times the surface, whose average over the sphere is one."""
    fn = DIRECTIONS[name]()
    points, weights = Sphere(fn.event_shape[0]).quadrature(24)
    model = poutine.reparam(prior(fn.expand([len(points)])), {"x": SphereReparam()})
    u = (torch.rand(len(points), 1) + 0.5) * points
    trace = poutine.trace(poutine.condition(model, {"x_normal": u})).get_trace()
    trace.compute_log_prob()
    ratios = sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample") - dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    assert abs((weights * ratios.exp()).sum() / weights.sum() - 1) < 1e-4
    torch.testing.assert_close(trace.nodes["x"]["value"], points)


def test_the_density_of_angles_is_the_priors():
    fn = dist.VonMises(torch.tensor([0.5, -3.0]), torch.tensor([1.0, 8.0])).to_event(1)
    model = poutine.reparam(prior(fn), {"x": CircleReparam()})
    theta = torch.tensor([-2.0, 3.0])
    u = torch.tensor([[0.7], [1.9]]) * torch.stack([theta.cos(), theta.sin()], -1)
    trace = poutine.trace(poutine.condition(model, {"x_normal": u})).get_trace()
    torch.testing.assert_close(trace.nodes["x"]["value"], theta)
    expected = fn.log_prob(theta) + 2 * math.log(2 * math.pi) + dist.Normal(0.0, 1.0).log_prob(u).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def mixture(components):
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)


def torus_flow():
    return pf.Flow(Uniform(Torus(2)), TorusElementwise(pf.univariate.CircularSpline(4), 2)).double()()


PRIORS = {
    "uniform": (SphereReparam, lambda: UniformSphere(3)),
    "vmf": (SphereReparam, lambda: VonMisesFisher(POLE.double(), 4.0)),
    "flow": (SphereReparam, sphere_flow),
    "mixture": (SphereReparam, lambda: mixture(VonMisesFisher(torch.eye(3)[:2], torch.tensor([2.0, 5.0])))),
    "uniform angles": (CircleReparam, lambda: UniformTorus(2)),
    "von mises": (CircleReparam, lambda: dist.VonMises(torch.tensor(3.0), 2.0)),
    "flow of angles": (CircleReparam, torus_flow),
    "mixture of angles": (CircleReparam, lambda: mixture(dist.VonMises(torch.tensor([-2.0, 3.0]), torch.tensor([2.0, 5.0])))),
}
WRAPPERS = {
    "plain": lambda fn: fn,
    "expand": lambda fn: fn.expand([4]),
    "to_event": lambda fn: fn.expand([4]).to_event(1),
    "mask": lambda fn: fn.expand([4]).mask(torch.tensor([True, False, True, True])),
    "masked, expanded": lambda fn: fn.mask(False).expand([4]),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", PRIORS)
def test_precision_and_density_under_every_wrapper(name, wrapper):
    """The normal vector has the prior's dtype, whatever the default is, and its density is that of the value, times the surface or the circle."""
    make, prior_of = PRIORS[name]
    fn = WRAPPERS[wrapper](prior_of())
    torch.set_default_dtype(torch.float32)
    trace = poutine.trace(poutine.reparam(prior(fn), {"x": make()})).get_trace()
    u, x = trace.nodes["x_normal"]["value"], trace.nodes["x"]["value"]
    assert u.dtype == x.dtype == torch.float64
    volume = 4 * math.pi if make is SphereReparam else 2 * math.pi
    points = x.numel() // 3 if make is SphereReparam else x.numel()
    expected = fn.log_prob(x).sum() + points * math.log(volume) + dist.Normal(0.0, 1.0).log_prob(u).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def run_nuts(model, *args, draws=300, warmup=100):
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*args)
    return Predictive(model, posterior_samples=mcmc.get_samples())(*args)


def z_score(values, mean):
    ess = effective_sample_size(values[None], 0, 1).item()
    return abs(values.mean().item() - mean) / (values.std().item() / math.sqrt(ess))


@pytest.mark.thorough
def test_nuts_finds_the_moments_of_von_mises_fisher():
    pole, kappa = POLE.double(), 4.0

    def model():  # the density of von Mises and Fisher, written out
        x = pyro.sample("x", UniformSphere(3))
        pyro.factor("tilt", kappa * (x @ pole))

    x = run_nuts(ManifoldReparam()(model))["x"].reshape(-1, 3)
    mean = 1 / math.tanh(kappa) - 1 / kappa
    height = x @ pole
    assert z_score(height, mean) < 3
    assert z_score(height**2, 1 - 2 * mean / kappa) < 3
    across = torch.tensor([1.0, 0.0, 0.0])
    assert z_score(x @ across, 0.0) < 3
    assert z_score((x @ across) ** 2, mean / kappa) < 3


@pytest.mark.thorough
def test_nuts_goes_round_the_circle():
    def model():  # a von Mises density, written out
        x = pyro.sample("x", UniformTorus(1))
        pyro.factor("tilt", 2.0 * (x[..., 0] - 3.0).cos())

    x = run_nuts(ManifoldReparam()(model))["x"].flatten()
    bessel = (torch.special.i1e(torch.tensor(2.0)) / torch.special.i0e(torch.tensor(2.0))).item()
    assert z_score((x - 3.0).cos(), bessel) < 3
    assert z_score((x - 3.0).sin(), 0.0) < 3
    assert (x > 3).any() and (x < -3).any()  # on both sides of the seam


def everything(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    flow = pyro.sample("flow", sphere_flow())
    parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
    angles = pyro.sample("angles", UniformTorus(2))
    with pyro.plate("groups", 4):
        x = pyro.sample("x", dist.ProjectedNormal(torch.ones(3)))
        pyro.sample("phase", dist.VonMises(0.0, 1.0))
        pyro.sample("y", VonMisesFisher(x, 10.0), obs=y)
    return scale, flow, parts, angles


Y = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.float64), dim=-1)


def test_the_strategy_takes_latent_directions_and_angles_alone():
    strategy = ManifoldReparam()
    trace = poutine.trace(poutine.reparam(everything, config=strategy)).get_trace(Y)
    latent = {name: tuple(node["value"].shape) for name, node in trace.iter_stochastic_nodes()}
    assert latent == {
        "scale": (), "flow_base_normal": (3,), "parts": (3,), "angles_normal": (2, 2), "x_normal": (4, 3), "phase_normal": (4, 2), "groups": (4,),
    }  # fmt: skip
    trace.compute_log_prob()
    assert trace.nodes["x_density"]["log_prob"].shape == (4,)
    assert trace.nodes["y"]["is_observed"] and strategy.config["y"] is None


GUIDES = (AutoDelta, AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal, AutoLaplaceApproximation, pf.AutoFlow)


@pytest.mark.parametrize("make", GUIDES, ids=lambda g: g.__name__)
def test_autoguides_take_the_model(make):
    model = ManifoldReparam()(everything)
    guide = make(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(Y)) for _ in range(3))
    draws = Predictive(model, guide=guide, num_samples=5, return_sites=["x", "phase", "flow", "angles"])(Y)
    assert torch.allclose(draws["x"].norm(dim=-1), torch.ones(5, 4)) and torch.allclose(draws["flow"].norm(dim=-1), torch.ones(()))
    assert (draws["phase"].abs() <= math.pi).all() and draws["angles"].shape[-1] == 2


def test_initial_values_come_through():
    value = {"x": torch.tensor([0.0, 0.0, 1.0])}
    guide = AutoNormal(ManifoldReparam()(prior(dist.ProjectedNormal(torch.zeros(3)))), init_loc_fn=pyro.infer.autoguide.init_to_value(values=value))
    guide()
    torch.testing.assert_close(guide.locs.x_normal.detach(), value["x"])


ERRORS = {
    "observed": (SphereReparam(), prior(dist.ProjectedNormal(torch.ones(3)), torch.tensor([0.0, 0.0, 1.0])), "'x' is observed.*ManifoldReparam"),
    "line": (SphereReparam(), prior(dist.Normal(0.0, 1.0)), "SphereReparam: site 'x' has support Real.*directions"),
    "sphere": (CircleReparam(), prior(dist.ProjectedNormal(torch.ones(3))), "CircleReparam: site 'x' has support.*angles"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_sites_of_another_kind_are_refused(name):
    reparam, model, words = ERRORS[name]
    with pytest.raises(SupportError, match=words):
        poutine.trace(poutine.reparam(model, {"x": reparam})).get_trace()


def test_the_manifold_of_a_distribution():
    normal = dist.ProjectedNormal(torch.zeros(5, 3))
    directions = mixture(VonMisesFisher(torch.eye(3)[:2], 1.0))
    for fn in (normal, normal.to_event(1), normal.mask(False), sphere_flow(), directions, directions.expand([5]).mask(False).to_event(1)):
        assert manifold_of(fn, "x") == Sphere(3)
    von_mises = dist.VonMises(torch.zeros(4), 1.0)
    angles = mixture(dist.VonMises(torch.zeros(5, 2), 1.0))
    wrapped = (von_mises.expand([3, 4]), von_mises.to_event(1), UniformTorus(4).expand([2]).to_event(1), angles.mask(False).to_event(1))
    for fn in (von_mises, UniformTorus(4), angles, mixture(UniformTorus(4).expand([2])), *wrapped):
        assert manifold_of(fn, "x") == Torus(fn.shape().numel())
    numbers = mixture(dist.Normal(torch.zeros(2), 1.0))
    for fn in (dist.Normal(0.0, 1.0), dist.Uniform(-math.pi, math.pi), dist.Dirichlet(torch.ones(3)), dist.Bernoulli(0.5), numbers):
        assert manifold_of(fn, "x") is None


def test_copies_and_pickles_of_flows_keep_their_manifold():
    for flow, manifold in ((pf.flows.sphere(3), Sphere(3)), (pf.flows.torus(2), Torus(2))):
        for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert manifold_of(other(), "x") == manifold


def test_nothing_is_registered_at_import():
    code = "import pyro_flows, pyro.distributions as d; from torch.distributions import biject_to; biject_to(d.constraints.sphere)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "NotImplementedError" in run.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_dtype_of_the_prior(dtype):
    def model():
        return pyro.sample("x", pf.manifolds.VonMisesFisher(torch.tensor([0.0, 0.6, 0.8], dtype=dtype), torch.tensor(2.0, dtype=dtype)))

    assert poutine.reparam(model, {"x": pf.manifolds.SphereReparam()})().dtype == dtype
