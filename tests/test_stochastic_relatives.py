"""Surjections, partitions, mixtures of flows, and layers that simulate an energy: under one interface, exact where they say so."""

import math

import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from scipy import stats
from torch import nn

import pyro_flows as pf
from pyro_flows.errors import IntractableError, OptionError, ShapeError
from pyro_flows.stochastic import Abs, DensityModel, Langevin, LWTACoupling, Max, Metropolis, MixtureOfFlows, Partition, Sort, StochasticFlow
from pyro_flows.transforms import Coupling, LULinear, TriangularLinear
from pyro_flows.univariate import Affine

SMALL = {"hidden_features": (8,)}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def perturbed(flow, scale=0.3):
    with torch.no_grad():
        for p in flow.parameters():
            p += scale * torch.randn_like(p)
    return flow.eval()


def components(dim, count=3):
    return [TriangularLinear(dim) for _ in range(count)]


LAYERS = {
    "abs": lambda: Abs(2, 1, **SMALL),
    "max": lambda: Max(2, **SMALL),
    "sort": lambda: Sort(2),
    "partition": lambda: Partition(2, [-1.0, 0.5], **SMALL),
    "mixture": lambda: MixtureOfFlows(components(2), **SMALL),
}


@pytest.mark.parametrize("name", LAYERS)
def test_exact_densities(name):
    """Mass one; draws and density agree; the way back is exact; the determinant is autograd's."""
    flow = perturbed(StochasticFlow(2, [LULinear(2), LAYERS[name](), LULinear(2)]))
    assert flow().exact
    line = torch.linspace(-14, 14, 1401)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        p = torch.cat([flow().log_prob(part).exp() for part in grid.split(100_000)])
    assert (p.sum() * 0.02**2).item() == pytest.approx(1, abs=3e-3)
    x, path = flow().sample_with_path((4000,))
    with torch.no_grad():
        mean, error = flow().log_prob(x).exp().mean(), flow().log_prob(x).exp().std() / 4000**0.5
    assert abs(mean.item() - ((p * p).sum() * 0.02**2).item()) < 5 * error.item() + 2e-3
    found = flow().inverse(x)
    torch.testing.assert_close(flow.push(found.z, found.indices)[0], x, atol=1e-8, rtol=1e-8)
    assert all(stats.kstest(found.z[:, i].numpy(), "norm")[1] > 1e-3 for i in range(2))
    z, u = path.z[:5], path.indices[0][:5]
    layer = flow.layers[1]
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(lambda t, i=i: layer.push(t, u[i]).value, z[i])
        torch.testing.assert_close(layer.push(z[i], u[i]).ladj, jacobian.det().abs().log())
    if name != "mixture":  # the index is a function of the point
        assert flow.num_paths == 1
        at = flow.layers[2].inverse_and_ladj(x)[0]
        assert torch.equal(layer.cell(at), path.indices[0])
        other = (path.indices[0] + 1) % layer.choices if name != "sort" else path.indices[0].flip(-1)
        assert bool((layer.pull(at, other).log_prior == -torch.inf).all())


@pytest.mark.parametrize("name", LAYERS)
def test_relatives_enumerate_in_pyro(name):
    flow = perturbed(StochasticFlow(2, [LULinear(2), LAYERS[name]()]))
    x = flow().sample((5,))
    density = DensityModel(flow)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(density.model, density.guide, x)
    assert loss == pytest.approx(-flow().log_prob(x).sum().item(), rel=1e-8)


def test_surjections_stay_exact_at_any_depth_and_can_be_trained():
    layers = [layer for i in range(6) for layer in (LULinear(2), Abs(2, i % 2, **SMALL))]
    flow = StochasticFlow(2, layers, max_paths=1)
    assert flow().exact
    x = torch.randn(400, 2) * 0.3 + torch.sign(torch.randn(400, 2)) * 2
    before = -flow().log_prob(x).mean().item()
    fit = pf.fit_density(flow, x, max_steps=60, batch_size=64, lr=2e-2, progress=False)
    assert fit.validation_loss < before - 0.3


def test_contexts_of_gates():
    flow = perturbed(StochasticFlow(2, [Partition(2, [0.0], 0, 3, (8,)), Max(2, 3, (8,))]))
    context = torch.randn(4, 3)
    x = flow(context).sample((2,))
    for i in range(4):
        torch.testing.assert_close(flow(context).log_prob(x)[:, i], flow(context[i]).log_prob(x[:, i]))


def test_sorted_densities_do_not_see_the_order():
    flow = perturbed(StochasticFlow(4, [LULinear(4), Sort(4)]))
    x = flow().sample((20,))
    torch.testing.assert_close(flow().log_prob(x), flow().log_prob(x[:, torch.tensor([2, 0, 3, 1])]))
    orders = flow().sample((4000,)).argsort(-1)
    counts = torch.unique(orders, dim=0, return_counts=True)[1]
    assert len(counts) == 24 and stats.chisquare(counts.numpy())[1] > 1e-3


def test_gradients_at_extreme_points_are_finite():
    for name, make in LAYERS.items():
        flow = perturbed(StochasticFlow(2, [make()]))
        x = torch.tensor([[1e4, -1e4], [1e-9, 3.0], [-40.0, 0.7], [0.2, 0.2000001]], requires_grad=True)
        log_prob = flow().log_prob(x)
        grads = torch.autograd.grad(log_prob.sum(), [x, *flow.parameters()], allow_unused=True)
        assert bool(log_prob.isfinite().all()), name
        assert all(g is None or bool(g.isfinite().all()) for g in grads), name


def test_amortised_assignment():
    """Beyond max_paths the net guesses the component; training brings the guess to the posterior."""
    parts = components(2, 2)
    with torch.no_grad():
        parts[0].shift += 2.0
        parts[1].shift -= 2.0
    flow = StochasticFlow(2, [MixtureOfFlows(parts, **SMALL)], max_paths=1)
    exact = StochasticFlow(2, list(flow.layers))
    x = exact().sample((1000,))
    gap = ((exact().log_prob(x) - flow().log_prob_bound(x, 10)).mean().detach()).item()
    pf.fit_density(flow, x, objective="elbo", max_steps=150, lr=1e-2, progress=False)
    with torch.no_grad():
        after = ((exact().log_prob(x) - flow().log_prob_bound(x)).mean()).item()
    assert -1e-3 < after < 0.3 and gap < 1
    assert (flow().inverse(x, "map").indices[0][:, 0] == (x[:, 0] < 0).long()).double().mean().item() > 0.95


# --- energies


def double_well(x):
    return (x[..., 0] ** 2 - 2.0) ** 2 + 0.5 * x[..., 1] ** 2


def log_constant():
    line = torch.linspace(-6, 6, 4001)
    return torch.trapezoid(torch.exp(-((line**2 - 2.0) ** 2)), line).log() + 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("kernel", ["metropolis", "hamiltonian", "langevin"])
def test_path_weights_average_to_the_constant(kernel):
    flow = pf.flows.snf(2, lambda x: -double_well(x), transforms=3, kernel=kernel, step_size=0.25, steps=4, **SMALL)
    perturbed(flow, 0.1)
    with torch.no_grad():
        x, log_q = flow().sample_and_log_prob((30_000,), num_particles=0)
        weight = (-double_well(x) - log_q - log_constant()).exp()
    assert not flow().exact
    assert weight.mean().item() == pytest.approx(1, abs=5 * weight.std().item() / 30_000**0.5)
    biased = (-double_well(x) - flow.base().log_prob(flow().sample((30_000,))) - log_constant()).exp()  # a control: no path weights
    assert abs(biased.mean().item() - 1) > 0.05
    with pytest.raises(IntractableError, match="log_prob_bound"):
        flow().log_prob(x)


@pytest.mark.parametrize("leapfrog", [0, 4])
def test_chains_leave_their_density_alone(leapfrog):
    layer = Metropolis(lambda x: 0.5 * (x**2).sum(-1), 2, step_size=0.8, steps=3, leapfrog=leapfrog)
    z = torch.randn(20_000, 2)
    u, move = layer.draw(z)
    assert torch.equal(u, z) and 0.3 < (move.value != z).any(-1).double().mean().item() <= 1
    assert all(stats.kstest(move.value[:, i].numpy(), "norm")[1] > 1e-3 for i in range(2))
    flow = StochasticFlow(2, [layer])
    bound = flow().log_prob_bound(move.value[:100], 4000, "rws")
    torch.testing.assert_close(bound, flow.base().log_prob(move.value[:100]), atol=1e-8, rtol=0)  # in equilibrium: every weight is one


def test_langevin_inverts_and_trains():
    layer = Langevin(double_well, 2, 0.02)
    z = torch.randn(50, 2)
    u, move = layer.draw(z)
    back = layer.pull(move.value, u)
    torch.testing.assert_close(back.value, z)
    torch.testing.assert_close(back.log_prior, move.log_prior)
    flow = StochasticFlow(2, [Coupling(Affine(), 2, **SMALL), layer])
    assert flow().has_rsample
    x, path = flow.simulate(torch.randn(20, 2))
    loss = (path.log_prob - flow.infer(x, None, path.indices)[1] + double_well(x)).mean()
    grads = torch.autograd.grad(loss, list(flow.parameters()))
    assert all(bool(g.isfinite().all()) for g in grads) and grads[-1].abs().item() > 0
    with pytest.raises(OptionError, match="cannot move by a given index"):
        layer.push(z, u)


def test_what_is_refused():
    for make, error, says in (
        (lambda: Partition(2, [1.0, 0.0]), OptionError, "increasing"),
        (lambda: Partition(2, [0.0], 2), ShapeError, "coordinate"),
        (lambda: MixtureOfFlows([LULinear(2)]), OptionError, "at least two"),
        (lambda: MixtureOfFlows([LULinear(2), LULinear(3)]), ShapeError, "differ in size"),
        (lambda: MixtureOfFlows([LULinear(2), nn.Linear(2, 2)]), OptionError, "FlowTransforms"),
        (lambda: Langevin(double_well, 2, -1.0), OptionError, "step_size"),
        (lambda: Metropolis(double_well, 2, steps=0), OptionError, "steps"),
        (lambda: pf.flows.snf(2, double_well, kernel="gibbs"), OptionError, "kernel"),
    ):
        with pytest.raises(error, match=says):
            make()
    chain = StochasticFlow(2, [Metropolis(double_well, 2)])
    assert not chain().has_rsample
    with pytest.raises(OptionError, match="use 'rws'"):
        chain().log_prob_bound(torch.zeros(2), 2)
    both = StochasticFlow(2, [LWTACoupling(2, 2, **SMALL), Sort(2)])
    assert both().exact and both.num_outcomes == 4
