"""AutoManifoldFlow: densities against their measure, stock ELBOs, a known evidence, FlowVI end to end, bad input."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.optim import Adam
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_flows as pf
from pyro_flows import AutoFlow, AutoManifoldFlow, AutoStochasticFlow
from pyro_flows.errors import ConvergenceWarning, ModelError, OptionError, SupportError, SupportWarning
from pyro_flows.guides import init_to_typical
from pyro_flows.guides.angle_profiles import AngleProfiles
from pyro_flows.guides.angles import AngleCentres, angle_shapes
from pyro_flows.guides.directions import DirectionCentres, DirectionShapes
from pyro_flows.guides.modes import OtherModes, angle_profiles, circle_variances, other_modes
from pyro_flows.manifolds import (
    ManifoldReparam,
    Product,
    Sphere,
    Torus,
    Uniform,
    UniformSphere,
    UniformTorus,
    VonMisesFisher,
    log_volume_ratio,
    manifold_of,
)
from pyro_flows.model.log_joint import LogJoint
from pyro_flows.posterior import Posterior
from pyro_flows.transforms import Affine
from pyro_flows.vi.warm_start import find_start

Y = torch.tensor([[0.9, 0.1, 0.4], [0.5, -0.2, 1.0], [0.6, 0.4, 0.7], [1.1, 0.0, 0.8], [0.4, 0.1, 0.9]], dtype=torch.float64)
COUNTS = torch.tensor([0, 1, 1, 2, 1, 0, 1])


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def perturbed(module, scale=0.2):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def mixed(y, counts):
    """A scale, a direction and a composition."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    x = pyro.sample("x", dist.ProjectedNormal(torch.zeros(3)))
    parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x, scale).to_event(1), obs=y)
    with pyro.plate("draws", len(counts)):
        pyro.sample("counts", dist.Categorical(parts), obs=counts)
    pyro.deterministic("height", x[..., 2])


def everything():
    """All kinds of sites, interleaved; directions and angles in plates, events of directions."""
    pyro.sample("phase", dist.VonMises(3.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("pair", UniformSphere(3).expand([2]).to_event(1))
    with pyro.plate("groups", 3):
        pyro.sample("x", dist.ProjectedNormal(torch.tensor([0.0, 1.0, 0.5]) / scale))
        pyro.sample("angle", dist.VonMises(0.0, scale))
        pyro.sample("z", dist.Normal(0.0, scale))
    pyro.sample("plane", dist.ImproperUniform(constraints.sphere, (), (2,)))
    pyro.sample("parts", dist.Dirichlet(torch.ones(3)))


# Layers.


def tabulated(profiles):
    profiles.tabulate(torch.randn(2, 32).repeat_interleave(8, -1))
    return profiles


LAYERS = {
    "centres": (Sphere(3), lambda c: DirectionCentres(3, 1, c)),
    "centres in R^5": (Sphere(5), lambda c: DirectionCentres(5, 1, c)),
    "shapes": (Sphere(3), lambda c: DirectionShapes(3, 1, c, layers=2)),
    "angle centres": (Torus(3), lambda c: AngleCentres(3, c)),
    "angle profiles": (Torus(2), lambda c: tabulated(AngleProfiles(2))),
    "angle shapes": (Torus(3), lambda c: angle_shapes(3, c)),
}


@pytest.mark.parametrize("context_dim", (0, 2))
@pytest.mark.parametrize("name", LAYERS)
def test_layers_change_volumes_as_they_say(name, context_dim):
    manifold, make = LAYERS[name]
    layer = perturbed(make(context_dim))
    x, context = manifold.random_uniform((6,)), torch.randn(6, context_dim) if layer.context_dim else None
    for i in range(6):
        c = None if context is None else context[i]
        y, ladj = layer.forward_and_ladj(x[i], c)
        torch.testing.assert_close(ladj, log_volume_ratio(lambda p, c=c: layer.forward_and_ladj(p, c)[0], x[i], manifold), atol=1e-8, rtol=1e-8)
        back, inverse_ladj = layer.inverse_and_ladj(y, c)
        torch.testing.assert_close(
            manifold.project(back - x[i]) if isinstance(manifold, Torus) else back, 0 * x[i] if isinstance(manifold, Torus) else x[i]
        )
        torch.testing.assert_close(inverse_ladj, -ladj)


@pytest.mark.parametrize("antipode", (False, True))
@pytest.mark.parametrize("n", (2, 3, 5))
def test_poles_and_equators_have_gradients(n, antipode):
    centres = DirectionCentres(n, 1, 0)
    centres.start_at(torch.eye(n)[-1:], 1e-3 * torch.eye(n - 1)[None], OtherModes(torch.tensor([antipode]), torch.tensor([False])))
    special = torch.cat([torch.eye(n), -torch.eye(n)]).requires_grad_()
    y, ladj = centres.forward_and_ladj(special)
    back, inverse_ladj = centres.inverse_and_ladj(y)
    torch.testing.assert_close(back, special)
    ends = special[..., 0].abs() == 1  # the density of two ends is zero half-way between them
    torch.testing.assert_close(inverse_ladj[ends], -ladj[ends])
    for value in (y.sum() + ladj.sum(), back.sum() + inverse_ladj.sum()):
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(value, (special, *centres.parameters()), retain_graph=True))


def test_several_directions_are_those_of_one_side_by_side():
    centres = perturbed(DirectionCentres(3, 2, 0))
    centres.start_at(torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), torch.tensor([0.05, 0.2]).view(2, 1, 1) * torch.eye(2))
    draws = centres.forward_and_ladj(Sphere(3).random_uniform((4000, 2)).flatten(-2))[0].unflatten(-1, (2, 3))
    angles = (draws * centres.poles).sum(-1).clamp(-1, 1).acos()
    torch.testing.assert_close(angles.median(0).values / torch.tensor([0.05, 0.2]), torch.full((2,), 1.17), atol=0.06, rtol=0)
    shapes = perturbed(DirectionShapes(3, 2, 0))
    x = Sphere(3).random_uniform((2,))
    both, ladj = shapes.forward_and_ladj(x.flatten())
    for i in range(2):
        moved = x.clone()
        moved[1 - i] = Sphere(3).random_uniform()
        torch.testing.assert_close(shapes.forward_and_ladj(moved.flatten())[0].unflatten(-1, (2, 3))[i], both.unflatten(-1, (2, 3))[i])
    torch.testing.assert_close(shapes.inverse_and_ladj(both)[1], -ladj)


def test_wide_angles_that_are_tied_closely():
    """What one angle is decides the next to a hundredth, twice over: their differences are as narrow as they should be."""
    root = torch.tensor([[0.6, 0.0, 0.0], [0.6, 0.01, 0.0], [-1.2, 0.0, 0.01]]) * torch.tensor([[1.0], [1.0], [0.75]])
    centres = perturbed(AngleCentres(3, 0))
    centres.start_at(torch.tensor([3.1, 1.0, 0.0]), torch.zeros(3, 0), root)
    centres.turns.data[2, 0] = 0.0  # the part of 1.5 that is not a whole number is only nearly right
    y = centres.forward_and_ladj(Torus(3).random_uniform((20_000,)))[0].detach()
    first, second, third = Torus(3).project(y - centres.poles).unbind(-1)
    assert first.std() == pytest.approx(0.6, abs=0.06)
    assert (second - first).std() == pytest.approx(0.01, abs=5e-4)
    assert Torus(1).project(third + 2 * first).std() == pytest.approx(0.0075, abs=5e-4)
    torch.testing.assert_close(Torus(3).project(centres.forward_and_ladj(centres.inverse_and_ladj(y)[0])[0] - y), 0 * y, atol=1e-7, rtol=0)


@pytest.mark.parametrize("size", (1.0, 1e-3))
def test_placed_angles_are_normal_with_all_their_correlations(size):
    """Angles around the seam, given two numbers: their covariance is the one asked for."""
    root = 0.2 * size * torch.tensor([[1.0, 0.0, 0.0], [-0.8, 0.5, 0.0], [0.3, 0.6, 0.4]])
    on_context, poles = 0.1 * size * torch.tensor([[1.0, -0.5], [0.0, 1.0], [2.0, 0.5]]), torch.tensor([3.1, -3.1, 0.5])
    centres = perturbed(AngleCentres(3, 2))
    centres.start_at(poles, on_context, root)
    context = torch.randn(40_000, 2)
    with torch.no_grad():
        offsets = Torus(3).project(centres.forward_and_ladj(Torus(3).random_uniform((40_000,)), context)[0] - poles)
    offsets, root, on_context = (t / size for t in (offsets, root, on_context))
    torch.testing.assert_close(offsets.mean(0), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(offsets.T.cov(), on_context @ on_context.T + root @ root.T, atol=4e-3, rtol=0)
    regression = torch.linalg.lstsq(context, offsets).solution.T
    torch.testing.assert_close(regression, on_context, atol=0.01, rtol=0)


def test_many_angles_turn_with_their_context_alone():
    """Beyond 300 angles none turns another: how much each turns with the context is all its own."""
    dim = 301
    root = 0.01 * torch.eye(dim)
    root[1, 0] = 0.04
    on_context = torch.zeros(dim, 1)
    on_context[0] = 0.05
    centres = AngleCentres(dim, 1)
    centres.start_at(torch.zeros(dim), on_context, root)
    y = centres.forward_and_ladj(torch.zeros(2, dim), torch.tensor([[0.0], [1.0]]))[0].detach()
    torch.testing.assert_close(y[1] - y[0], on_context.squeeze(-1), atol=1e-6, rtol=0)


def test_scores_for_few_numbers_and_paths_for_many():
    def model(size):
        pyro.sample("a", dist.VonMises(0.0, 1.0))
        pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    for size, objective in ((20, "score"), (21, "path")):
        assert AutoManifoldFlow(functools.partial(model, size)).setup().objective("auto") == objective


def test_a_profile_is_drawn_from_its_table():
    profiles = AngleProfiles(2)
    x = Torus(2).random_uniform((20_000,))
    torch.testing.assert_close(profiles.forward_and_ladj(x)[0], x)
    grid = torch.arange(256) * (2 * math.pi / 256) - math.pi
    profiles.tabulate(torch.stack([3 * torch.cos(2 * grid), torch.where(grid.abs() < 1, 0.0, -torch.inf)]))
    y, ladj = profiles.forward_and_ladj(x)
    back, inverse_ladj = profiles.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, atol=1e-7, rtol=0)
    torch.testing.assert_close(inverse_ladj, -ladj)
    resultant = float(torch.special.i1(torch.tensor(3.0)) / torch.special.i0(torch.tensor(3.0)))
    assert torch.cos(2 * y[:, 0]).mean() == pytest.approx(resultant, abs=0.01)
    assert (y[:, 1].abs() < 1.03).double().mean() > 0.999
    flow = pf.Flow(Uniform(Torus(2)), profiles)
    points, weights = Torus(2).quadrature(1024)
    assert (flow().log_prob(points).exp() * weights).sum() == pytest.approx(1, abs=1e-5)
    lost = torch.tensor([math.nan, 0.0])  # in a graph, where nothing is looked at
    for way in (lambda x: profiles.forward_and_ladj(x), lambda y: profiles.inverse_and_ladj(y)):
        y, ladj = make_fx(way)(torch.zeros(2))(lost)
        assert y.isnan().tolist() == [True, False] and ladj.isnan()


# Looks for modes.


def test_profiles_and_looks_of_strange_densities_are_finite():
    angle, index = torch.zeros(1), torch.arange(1)
    one = angle_profiles(lambda z: torch.where(z[:, 0] > 3, torch.inf, torch.where(z[:, 0] < 0, torch.nan, -z[:, 0])), angle, index)[0].softmax(-1)
    assert one.isfinite().all() and one[1:100].sum() < 1e-6 and one[128] > 2 * one[200] > 0
    for nothing in (torch.nan, -torch.inf):
        assert not angle_profiles(lambda z, v=nothing: torch.full_like(z[:, 0], v), angle, index).any()
        modes = other_modes(lambda z, v=nothing: torch.full_like(z[:, 0], v), torch.eye(3)[0], torch.arange(3), torch.eye(3)[:1], torch.ones(1))
        assert not modes.antipode.any() and not modes.elsewhere.any()


@pytest.mark.parametrize("scale", (0.1, 1e-3))
def test_widths_are_those_of_the_density_where_curvatures_are_not(scale):
    """A mode that is normal along one axis and falls as a fourth power along the other, where its curvature is zero."""
    pole, axes = torch.eye(3)[2], torch.eye(3)[:, :2]
    variances = circle_variances(lambda x: -0.5 * (x[:, 0] / scale) ** 2 - (x[:, 1] / scale) ** 4, pole, torch.arange(3), pole, axes, torch.ones(2))
    fourth = math.gamma(0.75) / math.gamma(0.25)
    torch.testing.assert_close((variances / scale**2).sqrt(), torch.tensor([1.0, fourth**0.5]), rtol=0.08, atol=0)


def test_no_angle_is_worth_more_than_its_circle():
    """A density that hardly knows an angle and one that knows it well: on the line the former's Gaussian would look better the wider it is."""

    def density(z):
        known = math.log(0.8) - 0.5 * ((z[:, 0] + 2) / 0.3) ** 2 + 20 * (z[:, 1].cos() - 1) - math.log(2 * math.pi) + 0.5 * math.log(20 * 2 * math.pi)
        vague = math.log(0.2) - 0.5 * ((z[:, 0] - 2) / 0.3) ** 2 + 1e-4 * z[:, 1].cos() - math.log(2 * math.pi)
        return torch.logaddexp(known, vague)

    def value_and_grad(z):
        gradient, value = torch.func.grad_and_value(lambda p: -density(p[None])[0])(z)
        return value, gradient

    points, noise = torch.tensor([[-2.1, 0.1], [2.1, 0.1]]), torch.randn(256, 2)
    log_lengths = torch.tensor([torch.inf, math.log(2 * math.pi)])
    assert find_start(density, value_and_grad, points, 0.1, noise)[0].loc[0] > 0
    assert find_start(density, value_and_grad, points, 0.1, noise, log_lengths)[0].loc[0] < 0


# The guide's density.


def test_the_density_integrates_to_one():
    """Over the angles and directions, at each number, what is left is the density of the numbers."""

    def model():
        pyro.sample("phase", dist.VonMises(0.0, 1.0))
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("x", UniformSphere(2))

    guide = perturbed(AutoManifoldFlow(model, init_scale=1.0).setup(), 0.05)
    circle, weights = Torus(1).quadrature(200)
    points, more = Sphere(2).quadrature(200)
    i, j = (g.flatten() for g in torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij"))
    numbers = pf.Flow(1, guide.flow.transform.parts[0])()
    for a in (-1.0, 0.0, 0.7):
        vectors = torch.cat([circle[i], torch.full((len(i), 1), a), points[j]], -1)
        with torch.no_grad():
            total = (guide.flow().log_prob(vectors).exp() * weights[i] * more[j]).sum()
            torch.testing.assert_close(total, numbers.log_prob(torch.tensor([a])).exp(), rtol=2e-3, atol=0)


def test_draws_lie_where_they_should_and_have_their_density():
    guide = perturbed(AutoManifoldFlow(everything).setup(), 0.05)
    flow = guide.flow()
    z, log_q = flow.rsample_and_log_prob((50,))
    torch.testing.assert_close(flow.log_prob(z), log_q)
    values = guide.unpack(z)
    assert {k: tuple(v.shape[1:]) for k, v in values.items()} == {
        "phase": (), "scale": (), "pair": (2, 3), "x": (3, 3), "angle": (3,), "z": (3,), "plane": (2,), "parts": (3,),
    }  # fmt: skip
    for name in ("pair", "x", "plane"):
        assert constraints.sphere.check(values[name]).all()
    assert (values["angle"].abs() <= math.pi).all() and (values["scale"] > 0).all()
    torch.testing.assert_close(guide.pack(values), z)
    assert "Sphere" in repr(flow.support) and flow.support.check(z).all() and not flow.support.check(1.1 * z).any()


def test_every_parameter_is_trained():
    guide = perturbed(AutoManifoldFlow(everything).setup(), 0.05)
    z, log_q = guide.flow().rsample_and_log_prob((20,))
    (LogJoint(everything, guide)(z) - log_q).sum().backward()
    still = [name for name, p in guide.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0 or not torch.isfinite(p.grad).all()]
    assert not still


def test_an_untrained_guide_is_even_and_small():
    guide = AutoManifoldFlow(everything).setup()
    values = guide.unpack(guide.flow().sample((20_000,)))
    assert values["x"].mean(0).abs().max() < 0.03 and (values["x"] ** 2).mean(0).sub(1 / 3).abs().max() < 0.02
    assert values["phase"].sin().mean().abs() < 0.03
    torch.testing.assert_close(values["z"].std(0), torch.full((3,), 0.1), atol=0.01, rtol=0)


def test_single_precision_and_large_concentration():
    torch.set_default_dtype(torch.float32)
    guide = AutoManifoldFlow(everything).setup()
    wide = torch.eye(guide.latent_dim)
    guide.start_at(guide.loc, 1e-3 * wide)
    z, log_q = guide.flow().rsample_and_log_prob((100,))
    assert z.dtype == torch.float32 and constraints.sphere.check(guide.unpack(z)["x"]).all()
    assert torch.isfinite(log_q).all()
    assert (
        guide.double().flow().log_prob(z.double()) - log_q
    ).abs().max() < 0.5  # of about 100 nats, at points rounded to a ten-thousandth of the spread


def test_copies_and_states(tmp_path):
    guide = perturbed(AutoManifoldFlow(everything).setup(), 0.05)
    z = guide.flow().sample((5,))
    buffer = io.BytesIO()
    torch.save(guide.state_dict(), buffer)
    buffer.seek(0)
    other = AutoManifoldFlow(everything, init_loc_fn=init_to_value(values={"phase": torch.tensor(1.0)}, fallback=init_to_typical)).setup()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for twin in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide)), other):
        torch.testing.assert_close(twin.flow().log_prob(z), guide.flow().log_prob(z))


# Stock Pyro.

ELBOS = {
    "Trace": Trace_ELBO,
    "TraceGraph": infer.TraceGraph_ELBO,
    "TraceMeanField": infer.TraceMeanField_ELBO,
    "TraceEnum": functools.partial(infer.TraceEnum_ELBO, max_plate_nesting=1, strict_enumeration_warning=False),
    "Jit": functools.partial(infer.JitTrace_ELBO, ignore_jit_warnings=True),
    "Renyi": functools.partial(infer.RenyiELBO, alpha=0.5, num_particles=1, vectorize_particles=False),
}


@pytest.mark.parametrize("name", ELBOS)
def test_every_elbo_is_the_formulas(name):
    guide = perturbed(AutoManifoldFlow(mixed).setup(Y, COUNTS), 0.05)
    log_joint = LogJoint(mixed, guide, (Y, COUNTS))
    elbo = ELBOS[name]()
    pyro.set_rng_seed(3)
    loss = elbo.differentiable_loss(mixed, guide, Y, COUNTS) if hasattr(elbo, "differentiable_loss") else elbo.loss(mixed, guide, Y, COUNTS)
    pyro.set_rng_seed(3)
    z, log_q = guide.flow().rsample_and_log_prob()
    if name not in ("Jit", "Renyi"):  # whose noise is drawn in another place
        torch.testing.assert_close(torch.as_tensor(loss).detach(), (log_q - log_joint(z)).detach())
    assert math.isfinite(float(loss.detach() if isinstance(loss, torch.Tensor) else loss))
    svi = SVI(mixed, guide, Adam({"lr": 1e-3}), ELBOS[name]())
    assert all(math.isfinite(svi.step(Y, COUNTS)) for _ in range(2))


def test_vectorized_particles():
    guide = perturbed(AutoManifoldFlow(mixed).setup(Y, COUNTS), 0.05)
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)

    def model(y, counts):  # rows to the left of the plates
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        x = pyro.sample("x", dist.ProjectedNormal(torch.zeros(3)))
        parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x, scale.unsqueeze(-1)).to_event(1), obs=y)
        with pyro.plate("draws", len(counts)):
            pyro.sample("counts", dist.Categorical(parts), obs=counts)

    z, log_q = guide.flow().rsample_and_log_prob((4000,))
    gaps = log_q - LogJoint(mixed, guide, (Y, COUNTS))(z)
    assert abs(many.loss(model, guide, Y, COUNTS) - gaps.mean()) < 5 * gaps.std() / math.sqrt(2000)


def test_predictive_lists_and_summaries():
    guide = AutoManifoldFlow(mixed).setup(Y, COUNTS)
    draws = Predictive(mixed, guide=guide, num_samples=7)(Y, COUNTS)
    assert draws["x"].reshape(7, 3).norm(dim=-1).sub(1).abs().max() < 1e-12 and draws["height"].numel() == 7
    both = AutoGuideList(mixed)
    both.append(AutoManifoldFlow(pyro.poutine.block(mixed, expose=["x"])))
    both.append(AutoNormal(pyro.poutine.block(mixed, hide=["x"])))
    assert math.isfinite(SVI(mixed, both, Adam({"lr": 1e-3}), Trace_ELBO()).step(Y, COUNTS))
    seam = AutoManifoldFlow(everything).setup()
    seam.start_at(seam.loc, 0.1 * torch.eye(seam.latent_dim))
    low, high = seam.quantiles([0.05, 0.95])["phase"]
    assert 0.1 < high - low < 1.0
    assert abs(seam.median()["x"].norm(dim=-1) - 1).max() < 1e-6


# FlowVI.

POLE, KAPPA, NOISE = torch.tensor([0.0, 0.6, 0.8], dtype=torch.float64), 2.0, 5.0
SEEN = Sphere(3).project(Y)


def log_constant(kappa):
    """Of the density of von Mises and Fisher in space."""
    return math.log(kappa) - math.log(4 * math.pi) - kappa - math.log(-math.expm1(-2 * kappa) / 2)


def conjugate(seen):
    x = pyro.sample("x", VonMisesFisher(POLE, KAPPA))
    with pyro.plate("rows", len(seen)):
        pyro.sample("seen", VonMisesFisher(x, NOISE), obs=seen)


QUICK = {"progress": False, "engine": "captured", "num_eval": 4000}


def fit(model, *args, max_steps, engine="eager"):
    """A short run, which need not have converged, and for which a capture takes longer than the steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return pf.FlowVI(model, max_steps=max_steps, **QUICK | {"engine": engine}).run(*args)


def test_a_conjugate_direction_and_its_evidence():
    posterior = fit(conjugate, SEEN, max_steps=200)
    total = KAPPA * POLE + NOISE * SEEN.sum(0)
    size = total.norm().item()
    evidence = log_constant(KAPPA) + len(SEEN) * log_constant(NOISE) - log_constant(size)
    assert isinstance(posterior.guide, AutoManifoldFlow) and posterior.guide.affine is None
    assert abs(posterior.log_evidence.mean - evidence) < max(4 * posterior.log_evidence.se, 2e-3)
    assert -0.02 < posterior.elbo.mean - evidence < 4 * posterior.elbo.se
    assert posterior.ess > 0.95 and posterior.verdict == "good"
    x = posterior.get_samples(4000)["x"]
    height = x @ (total / size)
    torch.testing.assert_close(height.mean(), torch.tensor(1 / math.tanh(size) - 1 / size), atol=4 * float(height.std()) / 60, rtol=0)
    exact = VonMisesFisher(total / size, size).log_prob(x)
    assert (posterior.log_prob({"x": x}) - exact).detach().abs().quantile(0.95) < 0.2


@pytest.mark.thorough
def test_a_direction_for_each_group_of_a_plate():
    """Conjugate and independent: the evidence is the product of three known ones, each direction's mean height known."""

    def grouped(seen):
        with pyro.plate("groups", 3, dim=-1):
            x = pyro.sample("x", VonMisesFisher(POLE, KAPPA))
            with pyro.plate("rows", len(seen), dim=-2):
                pyro.sample("seen", VonMisesFisher(x, NOISE), obs=seen)

    seen = Sphere(3).project(Sphere(3).random_uniform((3,)).double() + 0.4 * torch.randn(4, 3, 3).double())
    posterior = fit(grouped, seen, max_steps=150)
    total = KAPPA * POLE + NOISE * seen.sum(0)
    size = total.norm(dim=-1)
    evidence = sum(log_constant(KAPPA) + 4 * log_constant(NOISE) - log_constant(s) for s in size.tolist())
    assert abs(posterior.log_evidence.mean - evidence) < max(4 * posterior.log_evidence.se, 5e-3)
    assert posterior.ess > 0.85 and -0.1 < posterior.elbo.mean - evidence < 4 * posterior.elbo.se
    height = (posterior.get_samples(4000)["x"] * (total / size.unsqueeze(-1))).sum(-1)
    torch.testing.assert_close(height.mean(0), 1 / size.tanh() - 1 / size, atol=0.1 * float(height.std()), rtol=0)


@pytest.fixture(scope="module")
def fitted():
    return fit(mixed, Y, COUNTS, max_steps=400, engine="captured")


def test_flow_vi_picks_the_guide(fitted):
    assert type(fitted.guide) is AutoManifoldFlow
    assert fitted.engines["flow"] == "captured"
    assert fitted.verdict == "good" and fitted.ess > 0.8
    assert fitted.elbo.mean <= fitted.log_evidence.mean + 4 * fitted.log_evidence.se


def test_the_posterior_of_a_mixed_model(fitted, tmp_path):
    draws = fitted.get_samples(300)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {"scale": (300,), "x": (300, 3), "parts": (300, 3), "height": (300,)}
    log_q = fitted.log_prob(draws)
    assert torch.isfinite(log_q).all()
    torch.testing.assert_close(fitted.log_prob({**draws, "x": draws["x"].float()}), log_q, atol=1e-3, rtol=0)  # rounding is no distance
    assert torch.isneginf(fitted.log_prob({**draws, "x": 2 * draws["x"]})).all()
    assert "x[0]" in fitted.summary(500).index
    assert fitted.to_arviz(num_samples=50).posterior["x"].shape == (1, 50, 3)
    assert fitted.predictive(num_samples=4)["y"].shape == (4, 5, 3)
    fitted.save(tmp_path / "posterior.pt")
    loaded = pf.Posterior.load(tmp_path / "posterior.pt", mixed, Y, COUNTS)
    assert type(loaded.guide) is AutoManifoldFlow
    torch.testing.assert_close(loaded.log_prob(draws), log_q)


@pytest.mark.thorough  # the evidence says the same sooner
def test_nuts_agrees(fitted):
    """Means and spreads of NUTS with ManifoldReparam, its own noise allowed for."""
    mcmc = infer.MCMC(infer.NUTS(pf.manifolds.ManifoldReparam()(mixed)), num_samples=300, warmup_steps=120, disable_progbar=True)
    mcmc.run(Y, COUNTS)
    chains = mcmc.get_samples()
    chains["x"] = Sphere(3).project(chains.pop("x_normal"))
    draws = fitted.get_samples(4000)
    for name, chain in chains.items():
        ess = pyro.ops.stats.effective_sample_size(chain[None], 0, 1)
        noise = 1 / ess.clamp(max=300).sqrt()
        assert ((draws[name].mean(0) - chain.mean(0)).abs() < (0.1 + 3 * noise) * chain.std(0)).all(), name
        assert ((draws[name].std(0) / chain.std(0) - 1).abs() < 0.15 + 3 * noise).all(), name


TIMES = torch.linspace(0, 4, 20)


def wave(times):
    """A model of an oscillation seen at some times, whose phase is counted ``times`` round the circle."""

    def model(y):
        amplitude = pyro.sample("amplitude", dist.LogNormal(0.0, 1.0))
        phase = pyro.sample("phase", dist.VonMises(0.0, 0.1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(amplitude * torch.cos(TIMES - times * phase), 0.4), obs=y)

    return model


def by_quadrature(model, y):
    """Log evidence, and the phase's posterior on 400 points of the circle."""
    guide = AutoManifoldFlow(model).setup(y)
    logs, angles = torch.linspace(-2.0, 1.5, 401), Torus(1).quadrature(400)[0]
    points = torch.cartesian_prod(logs, angles.squeeze(-1))
    terms = LogJoint(model, guide, (y,))(points).view(401, 400) + math.log((logs[1] - logs[0]) * 2 * math.pi / 400)
    return float(terms.logsumexp((0, 1))), angles.squeeze(-1), terms.logsumexp(0).softmax(-1)


@pytest.mark.parametrize("times", (pytest.param(1, marks=pytest.mark.thorough), 3))
def test_flow_vi_finds_all_modes_of_an_angle_across_the_seam(times):
    y = 1.5 * torch.cos(TIMES - 3.1) + 0.4 * torch.randn(20)
    model = wave(times)
    posterior = fit(model, y, max_steps=250)
    evidence, angles, weights = by_quadrature(model, y)
    assert type(posterior.guide) is AutoManifoldFlow and posterior.ess > 0.95 and posterior.verdict != "poor"
    assert abs(posterior.log_evidence.mean - evidence) < max(4 * posterior.log_evidence.se, 2e-3)
    assert -0.05 < posterior.elbo.mean - evidence < 4 * posterior.elbo.se
    phase = posterior.get_samples(4000)["phase"]
    assert (phase.abs() <= math.pi).all()
    for k in (1, 2, 3):  # trigonometric moments: those that are not multiples of ``times`` cancel between the modes
        for wave_of in (torch.cos, torch.sin):
            assert wave_of(k * phase).mean() == pytest.approx(float((wave_of(k * angles) * weights).sum()), abs=0.07)
    if times == 1:
        assert (phase > 3).any() and (phase < -3).any()
        table = posterior.summary(2000)
        assert table.loc["phase", "sd"] < 0.3 and abs(table.loc["phase", "mean"]) > 2.8


def test_flow_vi_finds_the_antipode():
    """Squares of heights do not tell a direction from its opposite: both are drawn, and the evidence counts both."""
    axes = torch.randn(30, 3)
    y = (axes @ Sphere(3).random_uniform()) ** 2 + 0.8 * torch.randn(30)

    def axial(y):
        x = pyro.sample("x", UniformSphere(3))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((axes * x.unsqueeze(-2)).sum(-1) ** 2, 0.8), obs=y)

    posterior = fit(axial, y, max_steps=100)
    points, weights = Sphere(3).quadrature(400)
    guide = AutoManifoldFlow(axial).setup(y)
    evidence = float((LogJoint(axial, guide, (y,))(points) + weights.log()).logsumexp(0))
    assert abs(posterior.log_evidence.mean - evidence) < max(4 * posterior.log_evidence.se, 2e-3)
    x = posterior.get_samples(2000)["x"]
    assert 0.3 < (x @ x[0] > 0).double().mean() < 0.7


def flat_heights(y):
    """One square of a height is known, and it is at its greatest: two opposite modes without a curvature."""
    x = pyro.sample("x", UniformSphere(3))
    pyro.sample("y", dist.Normal(x[..., 2] ** 2, 0.02), obs=y)


@pytest.mark.thorough
def test_flow_vi_keeps_both_of_two_modes_without_a_curvature():
    y = torch.ones(())
    posterior = fit(flat_heights, y, max_steps=250)
    points, weights = Sphere(3).quadrature(400)
    evidence = float((LogJoint(flat_heights, AutoManifoldFlow(flat_heights).setup(y), (y,))(points) + weights.log()).logsumexp(0))
    assert -0.3 < posterior.elbo.mean - evidence < 4 * posterior.elbo.se
    assert 0.4 < (posterior.get_samples(4000)["x"][:, 2] > 0).double().mean() < 0.6


def three_modes():
    centres = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-0.6, 0.0, 0.8]])
    x = pyro.sample("x", UniformSphere(3))
    pyro.factor("modes", (torch.tensor([0.5, 0.3, 0.2]).log() + 50 * ((centres * x.unsqueeze(-2)).sum(-1) - 1)).logsumexp(-1))


@pytest.mark.thorough
def test_flow_vi_finds_three_modes_of_a_direction_and_their_weights():
    posterior = fit(three_modes, max_steps=300)
    evidence = math.log((1 - math.exp(-100)) / 100)  # of three von Mises-Fisher densities, under the uniform one
    assert abs(posterior.log_evidence.mean - evidence) < max(4 * posterior.log_evidence.se, 5e-3)
    assert not any("mode" in r and "cannot be seen" not in r for r in posterior.reasons)
    x = posterior.get_samples(4000)["x"]
    nearest = torch.stack([x[:, 0], x[:, 1], -0.6 * x[:, 0] + 0.8 * x[:, 2]]).argmax(0)
    torch.testing.assert_close(torch.bincount(nearest, minlength=3) / 4000, torch.tensor([0.5, 0.3, 0.2]), atol=0.06, rtol=0)


@pytest.mark.parametrize("model", (three_modes, wave(2)))
def test_a_guide_that_misses_a_mode_is_called_poor(model):
    """Its own draws agree with their weights; a look all round does not."""
    args = () if model is three_modes else (1.5 * torch.cos(TIMES - 2.0),)
    at = {"x": torch.tensor([1.0, 0.0, 0.0])} if model is three_modes else {"amplitude": torch.tensor(1.5), "phase": torch.tensor(1.0)}
    guide = AutoManifoldFlow(model, flow=None).setup(*args)
    guide.start_at(guide.pack(at), 0.1 * torch.eye(guide.latent_dim))
    posterior = Posterior.from_guide(guide, *args)
    assert posterior.verdict == "poor" and "misses a mode" in posterior.reasons[0]
    assert ("of x lies" if model is three_modes else "of phase lies") in posterior.reasons[0]


@pytest.mark.thorough
def test_flow_vi_takes_angles_that_depend_on_each_other():
    def model(x, y):
        kappa = pyro.sample("kappa", dist.LogNormal(0.0, 1.0))
        a, b = (pyro.sample(name, dist.VonMises(0.0, 0.1)) for name in "ab")
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.VonMises(a, kappa), obs=x)
            pyro.sample("y", dist.VonMises(a + b, kappa), obs=y)

    x = dist.VonMises(3.0, 2.0).sample((15,))
    y = dist.VonMises(2.2 + 0.6 * torch.sin(x - 3.0), 2.0).sample()
    posterior = fit(model, x, y, max_steps=250)
    assert posterior.ess > 0.8 and posterior.verdict != "poor"
    assert posterior.log_evidence.mean - posterior.elbo.mean < 0.15


def test_an_angle_across_the_seam_is_plotted_in_one_piece():
    model = prior(dist.VonMises(3.1, 20.0))
    guide = AutoManifoldFlow(model, flow=None).setup()
    guide.start_at(torch.tensor([3.1]), torch.tensor([[0.22]]))
    posterior = pf.Posterior.from_guide(guide, num_samples=200)
    low, high = posterior.plot(num_samples=200).axes[2].get_xlim()
    assert high - low < math.pi and low < 3.1 < high
    assert posterior.to_arviz(num_samples=200).posterior["x"].min() < -3


def test_a_model_of_plain_sites_keeps_its_guide_and_its_random_numbers():
    def plain():
        pyro.sample("a", dist.Normal(0.0, 1.0))

    state = torch.get_rng_state()
    assert type(pf.guides.auto_guide(plain)) is AutoFlow
    assert torch.equal(torch.get_rng_state(), state)
    guide = AutoManifoldFlow(plain).setup()  # which then is an AutoFlow by another name
    assert guide.affine is not None and math.isfinite(SVI(plain, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step())


# Bad input.


def prior(fn):
    def model():
        pyro.sample("x", fn)

    return model


def at(value):
    return init_to_value(values={"x": torch.as_tensor(value)})


def product():
    manifold = Product(Sphere(3), Torus(2))
    return dist.ImproperUniform(manifold.support, (), (5,))


ANGLE = prior(dist.VonMises(0.0, 1.0))
ERRORS = {
    "off the sphere": (
        lambda: AutoManifoldFlow(prior(UniformSphere(3)), init_loc_fn=at([1.0, 1.0, 0.0])).setup(),
        ModelError,
        "'x' starts.*is 0.414 away.*init_loc_fn",
    ),
    "off the torus": (
        lambda: AutoManifoldFlow(prior(UniformTorus(2)), init_loc_fn=at([1.0, 4.0])).setup(),
        ModelError,
        "'x' starts.*is 0.858 away.*wraps them.*init_loc_fn",
    ),
    "product": (lambda: AutoManifoldFlow(prior(product())).setup(), SupportError, "'x' lies on a product.*one site each"),
    "two points": (lambda: manifold_of(dist.ProjectedNormal(torch.ones(1)), "x"), SupportError, "'x'.*two points"),
    "flow without numbers": (lambda: AutoManifoldFlow(prior(UniformSphere(3)), flow=Affine(3)).setup(), OptionError, "directions and angles only"),
    "recipe without numbers": (lambda: AutoManifoldFlow(prior(dist.VonMises(0.0, 1.0)), flow="nsf").setup(), OptionError, "^flow= would"),
    "affine without numbers": (lambda: AutoManifoldFlow(prior(UniformSphere(3)), flow=None, affine="diagonal").setup(), OptionError, "^affine= w"),
    "base without numbers": (lambda: pf.FlowVI(ANGLE, AutoManifoldFlow(ANGLE, base="student_t")).run(), OptionError, "^base= would"),
    "discrete": (lambda: AutoManifoldFlow(prior(dist.Bernoulli(0.5))).setup(), SupportError, "'x' is discrete"),
    "AutoFlow": (lambda: AutoFlow(prior(UniformSphere(3))).setup(), SupportError, "'x'.*AutoManifoldFlow.*ManifoldReparam"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_says_what_to_do(name):
    make, error, words = ERRORS[name]
    with pytest.raises(error, match=words):
        make()


def angles():
    pyro.sample("number", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.VonMises(0.0, 1.0))
    with pyro.plate("p", 2):
        pyro.sample("b", UniformTorus(1).mask(True))


@pytest.mark.parametrize("make", (AutoFlow, functools.partial(AutoStochasticFlow, flow="lwta")))
def test_angles_taken_for_numbers_are_warned_of(make):
    with pytest.warns(SupportWarning, match="site.s. 'a', 'b' hold angles.*AutoManifoldFlow.model.*ManifoldReparam"):
        make(angles).setup()
    make(ManifoldReparam()(angles)).setup()  # warnings are errors here
    make(poutine.block(angles, hide=["a", "b"])).setup()


def test_guides_of_the_circle_do_not_warn():
    AutoManifoldFlow(angles).setup()
    pf.guides.auto_guide(angles).setup()


@pytest.mark.parametrize("make", (AutoFlow, AutoManifoldFlow, AutoStochasticFlow))
def test_every_guide_draws_with_a_density(make):
    guide = make(lambda: pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))).setup()
    pyro.set_rng_seed(0)
    z, log_q = guide.sample_and_log_prob(5)
    assert z.shape == (5, 2)
    torch.testing.assert_close(log_q, guide.flow().log_prob(z))


def test_a_site_that_no_block_takes_is_refused():
    class Numbers(AutoManifoldFlow):
        kinds = AutoManifoldFlow.kinds[:1]

    with pytest.raises(SupportError, match="no kind of block takes all of the latent sites number, a, b"):
        Numbers(angles).setup()


def test_observed_directions_off_the_sphere_are_refused():
    with pytest.raises(SupportError, match="do not lie on.*is 0.01 away"):
        pf.FlowVI(conjugate, **QUICK).run(1.01 * SEEN)


def test_nuts_does_not_mistake_the_base_for_numbers():
    guide = AutoManifoldFlow(mixed).setup(Y, COUNTS)
    neutra = infer.reparam.NeuTraReparam(guide)
    with pytest.raises(NotImplementedError):
        infer.MCMC(infer.NUTS(neutra.reparam(mixed)), num_samples=1, warmup_steps=1, disable_progbar=True).run(Y, COUNTS)
