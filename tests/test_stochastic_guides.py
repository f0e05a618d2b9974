"""Stochastic flows as guides: the bounds in their order, gradients without bias, stock ELBOs and FlowVI, and what is refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Predictive, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

import pyro_flows as pf
from pyro_flows.errors import ConvergenceWarning, IntractableError, OptionError, ShapeError
from pyro_flows.stochastic import LWTACoupling, StochasticFlow, upper_bound
from pyro_flows.vi.objectives import build_step, find_objective

SMALL = {"hidden_features": (8,)}
MODES = torch.tensor([[-1.5, 0.0], [1.5, 0.5]])


def target(x):
    """Log density of two normals, normalised: the evidence is 1."""
    modes = MODES.to(x)
    return dist.Normal(modes, 0.5, validate_args=False).to_event(1).log_prob(x.unsqueeze(-2)).logsumexp(-1) - math.log(2)


def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1))
    pyro.factor("target", target(x))


FLOWS = {
    "lwta": lambda dim: pf.flows.lwta(dim, transforms=1, units=3, **SMALL),
    "ar_lwta": lambda dim: pf.flows.ar_lwta(dim, transforms=1, units=3, **SMALL),
    "cif": lambda dim: pf.flows.cif(dim, transforms=2, index_features=(8,), **SMALL),
}


def guide_of(name, scale=0.15):
    guide = pf.AutoStochasticFlow(model, FLOWS[name]).setup()
    with torch.no_grad():
        for p in guide.parameters():
            p += scale * torch.randn_like(p)
    return guide


def enum_elbo(count, **options):
    return TraceEnum_ELBO(max_plate_nesting=0, num_particles=count, vectorize_particles=True, **options)


def trace_elbo(count):
    return Trace_ELBO(max_plate_nesting=0, num_particles=count, vectorize_particles=True)


def test_the_sum_over_paths_is_the_marginal_bound():
    guide = guide_of("lwta")
    with torch.no_grad():
        stock = -enum_elbo(4000).loss(model, guide)
        x, log_q = guide.flow().sample_and_log_prob((20_000,))
        gap = target(x) - log_q
    assert stock == pytest.approx(gap.mean().item(), abs=6 * gap.std().item() / 4000**0.5)
    assert gap.mean().item() < 0


def test_auxiliary_bounds_stand_in_their_order():
    """The bound with auxiliary indices, its refinements, the marginal ELBO, the evidence."""
    guide = guide_of("cif", 0.1)
    flow = guide.flow
    with torch.no_grad():
        stock = -trace_elbo(20_000).loss(model, guide)
        x, path = flow().sample_with_path((4000,))
        upper = [upper_bound(flow, x, path.indices, m) for m in (0, 3, 30)]
        lower = flow().log_prob_bound(x, 2000)  # close to log q
    elbos = [(target(x) - u).mean().item() for u in upper]
    error = (target(x) - upper[0]).std().item() / 4000**0.5
    assert stock == pytest.approx(elbos[0], abs=5 * error)
    assert elbos[0] < elbos[1] < elbos[2] <= (target(x) - lower).mean().item() + 0.01
    assert elbos[2] < 0
    # and the naive estimate, by fresh paths alone, is on the other side
    with torch.no_grad():
        fresh = flow().log_prob_bound(x, 3)
    assert (target(x) - fresh).mean().item() > (target(x) - lower).mean().item()
    weight = (-upper[1]).exp() / (-lower).exp()  # the reciprocal is unbiased
    assert weight.mean().item() == pytest.approx(1, abs=5 * weight.std().item() / 4000**0.5 + 0.01)


def test_enumeration_has_the_gradient_of_its_value():
    """Against finite differences, with the same base draws; and the naive gradient through a fixed path, which is another one."""
    torch.set_default_dtype(torch.float64)
    guide = guide_of("lwta")
    elbo, p = enum_elbo(300), guide.flow.layers[0].net[-1].bias

    def loss():
        torch.manual_seed(1)
        return elbo.differentiable_loss(model, guide)

    found = torch.autograd.grad(loss(), p)[0]
    wanted = torch.zeros_like(p)
    for i in range(len(p)):
        p.data[i] += 1e-5
        up = loss().item()
        p.data[i] -= 2e-5
        wanted[i] = (up - loss().item()) / 2e-5
        p.data[i] += 1e-5
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    z = torch.randn(300, 2)
    points, log_prob = guide.flow.spread(z)
    place = dist.Categorical(logits=log_prob).sample()
    x = points[torch.arange(300), place]
    naive = torch.autograd.grad((guide.flow().log_prob(x) - target(x)).mean(), p)[0]
    assert (naive - wanted).norm().item() > 0.2 * wanted.norm().item()
    constants = guide.flow.layers[0].rows(0, 0).bias
    alone = torch.autograd.grad(target(guide.flow.spread(z)[0][torch.arange(300), place]).mean(), p)[0][constants]
    assert not bool(alone.any())  # what the target says about a gate is lost altogether


def step_of(guide, log_joint, objective):
    """The flow as functions of one vector, and the step that FlowVI takes with this objective."""
    chosen = find_objective(guide.objective(objective))
    flat_flow = chosen.flat(guide.flow)
    return flat_flow, build_step(chosen, flat_flow, log_joint)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("objective", ["path", "elbo"])
def test_steps_of_flow_vi(name, objective):
    """Value and gradient of a step, against stock Pyro and finite differences."""
    torch.set_default_dtype(torch.float64)
    guide = guide_of(name)
    flat_flow, step = step_of(guide, target, objective)
    flat = flat_flow.read()
    noise = torch.randn(4000, 2)

    def run(at, power=1.0):
        torch.manual_seed(2)
        return step(at, noise, torch.tensor(power))

    gradient, elbo, spread, dropped = run(flat)
    direction = torch.randn_like(flat) * (gradient != 0)  # the location and scale of the unit ride along, and are not learned
    slope = (run(flat + 1e-5 * direction)[1] - run(flat - 1e-5 * direction)[1]) / 2e-5
    exact = name == "cif" or objective == "elbo"
    assert (gradient @ direction).item() == pytest.approx(-slope.item(), rel=1e-5 if exact else 0.1, abs=0.02 if not exact else 1e-6)
    with torch.no_grad():
        stock = -(trace_elbo(4000) if name == "cif" else enum_elbo(4000)).loss(model, guide)
    assert elbo.item() == pytest.approx(stock, abs=6 * spread.item() ** 0.5 / 2000**0.5)
    assert int(dropped) == 0
    tempered = run(flat, 0.1)[1]
    assert tempered.item() > elbo.item()


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("objective", ["path", "elbo"])
def test_a_draw_without_a_density_does_not_spoil_the_gradient(name, objective):
    torch.set_default_dtype(torch.float64)

    def broken(x):  # above the cliff neither the value nor the slope is a number
        return target(x) + 0 * (1.5 - x[..., 0]).sqrt()

    guide = guide_of(name)
    noise = torch.randn(400, 2)
    flat_flow, step = step_of(guide, broken, objective)
    gradient, elbo, _, dropped = step(flat_flow.read(), noise, torch.ones(()))
    assert int(dropped) > 0
    assert gradient.isfinite().all() and gradient.abs().max().item() > 0
    assert elbo.isfinite()


def test_a_finished_run_of_a_stochastic_guide_goes_on_with_more_steps(tmp_path):
    """A longer run from the file of a shorter one: the flow goes on where it was. There is no affine layer to fold, and none is asked for."""
    assert not pf.AutoStochasticFlow(model, "lwta").setup().foldable
    options = {"progress": False, "checkpoint": tmp_path / "run.pt", "num_eval": 100, "engine": "eager", "num_particles": 8}
    fits = []
    for max_steps in (60, 120):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fits.append(pf.FlowVI(model, pf.AutoStochasticFlow(model, "lwta"), max_steps=max_steps, **options).run())
    assert fits[1].history[: len(fits[0].history)] == fits[0].history
    assert [h["step"] for h in fits[1].history if h["stage"] == "flow"][-1] == 120


def test_stock_elbos_with_continuous_indices():
    options = {"num_particles": 5, "vectorize_particles": True}
    every = [Trace_ELBO(), Trace_ELBO(**options), TraceMeanField_ELBO(**options), RenyiELBO(**options), TraceGraph_ELBO(**options)]
    for elbo in (*every, JitTrace_ELBO(ignore_jit_warnings=True)):
        pyro.clear_param_store()
        guide = guide_of("cif", 0.05)
        svi = SVI(model, guide, Adam({"lr": 5e-3}), elbo)
        losses = [svi.step() for _ in range(3)]
        assert all(math.isfinite(loss) for loss in losses), type(elbo)
    draws = Predictive(model, guide=guide, num_samples=7)()
    assert draws["x"].shape[0] == 7


def test_stock_elbos_with_discrete_indices():
    guide = guide_of("lwta")
    svi = SVI(model, guide, Adam({"lr": 1e-2}), enum_elbo(20))
    first = sum(svi.step() for _ in range(10))
    for _ in range(60):
        svi.step()
    assert sum(svi.step() for _ in range(10)) < first
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO(), RenyiELBO(num_particles=2)):
        with warnings.catch_warnings(), pytest.raises(IntractableError, match="TraceEnum_ELBO"):
            warnings.simplefilter("ignore")  # Pyro's own: sites to enumerate
            SVI(model, guide, Adam({"lr": 1e-2}), elbo).step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = -trace_elbo(20_000).loss(model, guide)  # without a gradient it is right
    with torch.no_grad():
        assert value == pytest.approx(-enum_elbo(4000).loss(model, guide), abs=0.15)
    assert guide()["x"].shape == (2,)
    assert Predictive(model, guide=guide, num_samples=7)()["x"].shape[0] == 7


def test_sites_in_plates_and_with_supports():
    def plated():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 3):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([0.5, -1.0, 2.0]))

    guide = pf.AutoStochasticFlow(plated, FLOWS["lwta"]).setup()
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=3000, vectorize_particles=True)
    with torch.no_grad():
        stock = -elbo.loss(plated, guide)
        posterior = pf.Posterior.from_guide(guide, num_samples=4000)
    assert stock == pytest.approx(posterior.elbo.mean, abs=6 * posterior.elbo.se * (4 / 3) ** 0.5 + 1e-3)
    assert posterior.bound == "ELBO"
    samples = posterior.get_samples(50)
    assert samples["x"].shape == (50, 3) and bool((samples["scale"] > 0).all())
    assert posterior.log_prob(samples).shape == (50,)


def linear(design, y):
    w = pyro.sample("w", dist.Normal(design.new_zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w @ design.mT, 0.5).to_event(1), obs=y)


def test_competing_coordinates_reach_a_known_evidence_and_never_beat_it():
    torch.set_default_dtype(torch.float64)
    design, y = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.7, -0.3]]), torch.tensor([1.2, -0.4, 0.8])
    evidence = dist.MultivariateNormal(torch.zeros(3), design @ design.mT + 0.25 * torch.eye(3)).log_prob(y).item()
    guide = pf.AutoStochasticFlow(linear, "ar_lwta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.errors.ConvergenceWarning)  # a short run
        fit = pf.FlowVI(linear, guide, max_steps=200, num_particles=32, progress=False, num_eval=4000, engine="eager").run(design, y)
    assert fit.bound == "ELBO"
    assert evidence - 0.05 < fit.elbo.mean < evidence + 4 * fit.elbo.se
    assert fit.log_evidence.mean == pytest.approx(evidence, abs=4 * fit.log_evidence.se + 0.005)
    with torch.no_grad():
        stock = -enum_elbo(1000).loss(linear, guide, design, y)
    assert stock == pytest.approx(fit.elbo.mean, abs=0.01)


def test_flow_vi_keeps_both_modes():
    guide = pf.AutoStochasticFlow(model, FLOWS["lwta"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.errors.ConvergenceWarning)  # a short run
        posterior = pf.FlowVI(model, guide, max_steps=300, num_particles=32, progress=False, num_eval=4000, engine="eager").run()
    assert posterior.elbo.mean > -0.1 and abs(posterior.log_evidence.mean) < 0.05
    right = (posterior.get_samples(4000)["x"][:, 0] > 0).double().mean().item()
    assert right == pytest.approx(0.5, abs=0.06)
    assert "tempered" in posterior.timings and posterior.khat < 0.7


def test_flow_vi_with_continuous_indices_quotes_its_bound(tmp_path):
    guide = pf.AutoStochasticFlow(model, FLOWS["cif"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pf.errors.ConvergenceWarning)
        posterior = pf.FlowVI(model, guide, max_steps=60, num_particles=32, progress=False, num_eval=2000).run()
    assert posterior.bound == "IWHVI" and "IWHVI" in repr(posterior)
    assert posterior.elbo.mean < 0.02
    assert set(posterior.engines.values()) == {"eager"}
    with pytest.raises(IntractableError, match="log_prob_bound"):
        posterior.log_prob(posterior.get_samples(3))
    posterior.save(tmp_path / "posterior")
    again = pf.Posterior.load(tmp_path / "posterior", pf.AutoStochasticFlow(model, FLOWS["cif"]))
    assert again.elbo == posterior.elbo


def test_what_is_refused():
    with pytest.raises(OptionError, match="choose one of lwta, ar_lwta, cif"):
        pf.AutoStochasticFlow(model, "nsf")
    with pytest.raises(OptionError, match="see AutoFlow"):
        pf.AutoStochasticFlow(model, pf.flows.realnvp(2))
    with pytest.raises(OptionError, match="AutoFlow takes bijections"):
        pf.AutoStochasticFlow(model, lambda dim: pf.flows.realnvp(dim)).setup()
    with pytest.raises(ShapeError, match="dim=3"):
        pf.AutoStochasticFlow(model, pf.flows.lwta(3, transforms=1)).setup()
    with pytest.raises(OptionError, match="outcomes of a draw, more than max_paths"):
        pf.AutoStochasticFlow(model, lambda dim: pf.flows.ar_lwta(dim, units=20)).setup()
    with pytest.raises(OptionError, match="outcomes of a draw, more than max_paths"):
        pf.AutoStochasticFlow(lambda: pyro.sample("x", dist.Normal(torch.zeros(9), 1.0).to_event(1)), "ar_lwta").setup()
    with pytest.raises(OptionError, match="Metropolis layer"):
        pf.AutoStochasticFlow(model, lambda dim: pf.flows.snf(dim, target, transforms=1)).setup()
    mixed = [LWTACoupling(2, 2, **SMALL), *pf.flows.cif(2, transforms=1, **SMALL).layers]
    with pytest.raises(OptionError, match="discrete and continuous"):
        pf.AutoStochasticFlow(model, StochasticFlow(2, mixed)).setup()
    with pytest.raises(OptionError, match="AutoStochasticFlow"):
        pf.AutoFlow(model, "lwta")
    guide = guide_of("lwta")
    with pytest.raises(IntractableError, match="use AutoFlow"):
        guide.get_transform()
    with pytest.raises(OptionError, match="not known for stochastic flows"):
        guide.objective("iwae")


def test_continuous_indices_reach_a_known_posterior_and_never_beat_its_evidence():
    torch.set_default_dtype(torch.float64)
    design, y = torch.tensor([[1.0, 0.0], [0.8, 1.0]]), torch.tensor([1.0, -0.5])
    guide = pf.AutoStochasticFlow(linear, lambda dim: pf.flows.cif(dim, transforms=2, **SMALL))
    fit = pf.FlowVI(linear, guide, max_steps=250, num_particles=64, progress=False, num_eval=4000, engine="eager").run(design, y)
    evidence = dist.MultivariateNormal(torch.zeros(2), design @ design.mT + 0.25 * torch.eye(2)).log_prob(y).item()
    assert evidence - 0.1 < fit.elbo.mean < evidence + 4 * fit.elbo.se
    assert fit.log_evidence.mean == pytest.approx(evidence, abs=0.02)
    covariance = torch.linalg.inv(torch.eye(2) + 4 * design.mT @ design)
    x, mean, sd = fit.get_samples(4000)["w"], 4 * covariance @ design.mT @ y, covariance.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 0.15 * sd).all() and ((x.std(0) / sd - 1).abs() < 0.15).all()
