"""Continuous flows in training: flow matching, the penalties of RNODE, augmented flows, and the guide."""

from __future__ import annotations

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows.density.flow_matching import FlowMatching
from pyro_flows.density.regularized import Regularized
from pyro_flows.density.rows import Rows
from pyro_flows.diagnostics import check_ode
from pyro_flows.distributions import AugmentedFlow, Gaussian
from pyro_flows.errors import CaptureError, IntractableError, OptionError, ShapeError
from pyro_flows.nets import VelocityMLP
from pyro_flows.numerics import Solver
from pyro_flows.numerics.assignment import near_optimal_assignment
from pyro_flows.transforms import Affine, Compose, ContinuousFlow, Permutation, Standardize

QUICK = {"batch_size": 256, "lr": 1e-2, "progress": False}
TWO = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])


def mixture(count: int, seed: int = 0) -> Tensor:
    """Two normals of width .5."""
    g = torch.Generator().manual_seed(seed)
    return TWO[torch.randint(2, (count,), generator=g)] + 0.5 * torch.randn(count, 2, generator=g)


def log_density(x: Tensor) -> Tensor:
    return torch.logsumexp(-((x[:, None] - TWO) ** 2).sum(-1) / 0.5 - math.log(2 * math.pi * 0.25), -1) - math.log(2)


def divergence(flow: pf.Flow) -> float:
    x = mixture(4000, seed=9)
    with torch.no_grad():
        return float((log_density(x) - flow().log_prob(x)).mean())


@pytest.fixture(scope="module")
def matched() -> pf.Flow:
    torch.manual_seed(0)
    flow = pf.flows.cnf(2, hidden_features=(32, 32))
    fit = pf.fit_density(flow, mixture(20_000), objective="flow_matching", max_steps=1500, **QUICK)
    assert "flow matching loss" in repr(fit) and "nats" not in repr(fit)
    return flow


# --- flow matching


def test_flow_matching_fits(matched):
    assert divergence(matched) < 0.05
    assert divergence(pf.flows.cnf(2)) > 0.5


def matching_loss(flow: pf.Flow, rows: Rows) -> Tensor:
    matching = FlowMatching()
    return matching.loss(flow, matching.prepare(flow, rows))


def test_the_density_integrates_to_one(matched):
    side = torch.linspace(-7, 7, 281, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    flow = pf.Flow(2, ContinuousFlow(2, copy.deepcopy(matched.transform[0].net), rtol=1e-7, atol=1e-7)).double()
    with torch.no_grad():
        total = flow().log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-4)


def test_its_loss_is_least_at_the_true_velocity():
    """From N(0, 1) to N(m, s^2) with independent pairs the best velocity is linear, and known."""
    torch.manual_seed(0)
    m, s = 1.5, 0.4

    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, t, x):
            t = torch.as_tensor(t)
            variance = (1 - t) ** 2 + t**2 * s**2
            return m + (t * s**2 - (1 - t)) / variance * (x - t * m) + self.shift

    flow = pf.Flow(1, ContinuousFlow(1, Best(), rtol=1e-7, atol=1e-7))
    rows, losses = Rows(m + s * torch.randn(100_000, 1)), []
    for shift in (-0.1, 0.0, 0.1):
        flow.transform.net.shift.data.fill_(shift)
        torch.manual_seed(1)
        losses.append(matching_loss(flow, rows).mean().item())
    assert losses[1] < losses[0] and losses[1] < losses[2]
    flow.transform.net.shift.data.zero_()
    x = torch.linspace(0, 3, 20)[:, None]
    torch.testing.assert_close(flow().log_prob(x), dist.Normal(m, s).log_prob(x[:, 0]), rtol=1e-4, atol=1e-4)


def test_conditional_flow_matching():
    torch.manual_seed(0)
    context = torch.randn(20_000, 1)
    x = 2 * context + 0.5 * torch.randn(20_000, 1)
    flow = pf.flows.cnf(1, context_dim=1, hidden_features=(32, 32)).standardized(x)
    pf.fit_density(flow, x, context, objective="flow_matching", max_steps=1000, **QUICK)
    with torch.no_grad():
        gap = dist.Normal(2 * context, 0.5).log_prob(x)[:2000, 0] - flow(context[:2000]).log_prob(x[:2000])
    assert gap.mean() < 0.05


def test_pairs_are_nearly_the_best():
    torch.manual_seed(0)
    for count, dim in ((1, 2), (64, 2), (256, 5)):
        a, b = torch.randn(count, dim), 2 * torch.randn(count, dim) + 1
        found = near_optimal_assignment(a, b)
        assert found.sort()[0].equal(torch.arange(count))
        cost = torch.cdist(a.double(), b.double()) ** 2
        rows, columns = linear_sum_assignment(cost.numpy())
        least = cost[rows, columns].sum()
        assert cost[torch.arange(count), found].sum() < 1.1 * least


@pytest.mark.thorough
def test_paired_paths_are_straighter(matched):
    torch.manual_seed(0)
    flow = pf.flows.cnf(2, hidden_features=(32, 32))
    pf.fit_density(flow, mixture(20_000), objective="flow_matching", coupling="ot", max_steps=600, **QUICK)
    x = mixture(1000, seed=5)
    with torch.no_grad():
        kinetic, other = (float(f.transform[0].regularization(x).kinetic.mean()) for f in (flow, matched))
    assert divergence(flow) < 0.1 and kinetic < 0.9 * other


def test_flow_matching_around_fixed_layers():
    """Layers before and after are gone through; a flow of another kind is refused before any work."""
    torch.manual_seed(0)
    fixed = Standardize(torch.tensor([10.0, -3.0]), torch.tensor([[3.0, 0.0], [1.0, 0.2]]))
    flow = pf.Flow(2, [Permutation(torch.tensor([1, 0])), ContinuousFlow(2), fixed])
    x = fixed(mixture(5000))
    before = matching_loss(flow, Rows(x)).mean()
    plain = matching_loss(pf.Flow(2, ContinuousFlow(2)), Rows(mixture(5000))).mean()
    assert before.item() == pytest.approx(plain.item(), rel=0.1)
    for wrong in (
        pf.flows.realnvp(2),
        pf.flows.cnf(2, transforms=2),
        pf.Flow(2, [ContinuousFlow(2), Affine(2)]),
        pf.Flow(pf.distributions.StudentT(2, trainable=True), ContinuousFlow(2)),
        pf.flows.cnf(2, augment=1),
    ):
        with pytest.raises(OptionError, match="flow_matching"):
            pf.fit_density(wrong, x, objective="flow_matching", progress=False)


def test_an_inverted_layer_is_matched_and_penalised():
    """An inverse runs from data at time 0 to base at time 1; compositions may be inverted whole."""
    torch.manual_seed(0)
    fixed = Permutation(torch.tensor([1, 0]))
    flow = pf.Flow(2, Compose([fixed.inv, ContinuousFlow(2, VelocityMLP(2, hidden_features=(32, 32)))]).inv)
    pf.fit_density(flow, mixture(10_000), objective="flow_matching", max_steps=600, **QUICK)
    assert divergence(flow) < 0.15
    x = mixture(20)
    inner = flow.transform.transform[1]
    with torch.no_grad():
        found = inner.solve(fixed.inverse_and_ladj(x)[0], regularize=True)
        expected = -flow().log_prob(x) + 0.3 * found.kinetic + 0.7 * found.jacobian
        torch.testing.assert_close(Regularized(0.3, 0.7).loss(flow, Rows(x)), expected, rtol=1e-3, atol=1e-3)


def test_the_bound_far_out_is_finite():
    """The scale of q(a | x) overflowed there."""
    flow = moved(pf.flows.cnf(1, augment=1))
    for far in (1e2, 1e4, 1e6):
        x = torch.full((3, 1), far, dtype=torch.float64, requires_grad=True)
        bound = flow().log_prob_bound(x, 5)
        assert bound.isfinite().all() and torch.autograd.grad(bound.sum(), x)[0].isfinite().all()


def test_options_that_do_not_go_together():
    x, flow = mixture(100), pf.flows.cnf(2)
    for options in (
        {"objective": "score_matching"},
        {"objective": "flow_matching", "coupling": "sinkhorn"},
        {"coupling": "ot"},
        {"objective": "flow_matching", "kinetic": 0.1},
        {"kinetic": -1.0},
        {"jacobian": float("nan")},
    ):
        with pytest.raises(OptionError):
            pf.fit_density(flow, x, progress=False, **options)
    with pytest.raises(OptionError, match="contexts"):
        pf.fit_density(pf.flows.cnf(2, 1), x, x[:, :1], objective="flow_matching", coupling="ot", progress=False)
    for other in (pf.flows.realnvp(2), pf.flows.cnf(2, augment=1)):
        with pytest.raises(OptionError, match="kinetic"):
            pf.fit_density(other, x, kinetic=0.1, progress=False)


def test_resumed_flow_matching_ends_the_same(tmp_path):
    class Stop(Exception):
        pass

    def run(steps_before_stop=None, **options):
        torch.manual_seed(0)
        flow = pf.flows.cnf(2, hidden_features=(8,))

        def callback(record):
            if steps_before_stop and record["step"] >= steps_before_stop:
                raise Stop

        options = {"objective": "flow_matching", "coupling": "ot", "max_steps": 60, **QUICK, "batch_size": 32, **options}
        pf.fit_density(flow, mixture(400), callbacks=[callback], **options)
        return flow.state_dict()

    whole = run()
    with pytest.raises(Stop):
        run(20, checkpoint=tmp_path / "fit.pt")
    for a, b in zip(whole.values(), run(checkpoint=tmp_path / "fit.pt").values(), strict=True):
        assert torch.equal(a, b)


def test_a_solve_that_fails_in_training_is_a_step_left_out():
    class Brittle(VelocityMLP):
        calls = 0

        def velocity_and_trace(self, t, x, context=None):
            Brittle.calls += self.training
            velocity, trace = super().velocity_and_trace(t, x, context)
            return velocity / (0.0 if self.training and Brittle.calls == 30 else 1.0), trace

    torch.manual_seed(0)
    fit = pf.fit_density(pf.Flow(2, ContinuousFlow(2, Brittle(2, 0, (8,)))), 5 + mixture(200), max_steps=30, **QUICK)
    assert fit.steps == 30 and any("1 steps without a finite loss" in note for note in fit.warnings)
    assert fit.validation_loss < fit.history[0]["validation"]


# --- penalties


@pytest.mark.thorough
def test_penalties_make_paths_shorter():
    x, found = mixture(5000), []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        flow = pf.flows.cnf(2, hidden_features=(16, 16), solver="rk4", steps=6)
        pf.fit_density(flow, x, max_steps=150, kinetic=weight, jacobian=weight, **QUICK)
        found.append(flow.transform[0].regularization(x[:500]))
    assert found[1].kinetic.mean() < 0.8 * found[0].kinetic.mean()
    assert found[1].jacobian.mean() < 0.8 * found[0].jacobian.mean()


def test_a_penalised_loss_is_the_sum():
    torch.manual_seed(0)
    flow = pf.flows.cnf(2, transforms=2, solver="rk4", steps=8).standardized(mixture(500))
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn_like(p)
        x = mixture(50)
        second, first = flow.transform[1], flow.transform[0]
        z = flow.transform[2].inverse_and_ladj(x)[0]
        a = second.regularization(z)
        b = first.regularization(a.value)
        expected = -flow().log_prob(x) + 0.3 * (a.kinetic + b.kinetic) + 0.7 * (a.jacobian + b.jacobian)
        torch.testing.assert_close(Regularized(0.3, 0.7).loss(flow, Rows(x)), expected)


# --- augmented flows


def moved(flow: AugmentedFlow, seed: int = 0) -> AugmentedFlow:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in flow.double().parameters():
            p += 0.3 * torch.randn_like(p)
    return flow


@pytest.mark.parametrize("context_dim", (0, 2))
def test_the_bound_is_below_the_density_and_rises_to_it(context_dim):
    flow = moved(pf.flows.cnf(1, context_dim, augment=1, hidden_features=(8, 8), solver="rk4", steps=8))
    context = torch.randn(2).double() if context_dim else None
    d = flow(context)
    assert d.exact is False and d.event_shape == (1,) and d.has_rsample
    x = torch.tensor([[-0.5], [0.2], [1.0]], dtype=torch.float64)
    a = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    joint = pf.Flow(flow.base, flow.transform)(context)
    with torch.no_grad():
        wide = torch.cat([x[:, None].expand(-1, 2001, -1), a[None, :, None].expand(3, -1, -1)], -1)
        exact = joint.log_prob(wide).exp().sum(-1).mul(a[1] - a[0]).log()
        one = torch.stack([d.log_prob_bound(x) for _ in range(400)])
        many = d.log_prob_bound(x, 20_000)
    assert (one.mean(0) < exact + 3 * one.std(0) / 20).all() and (one.mean(0) < exact).any()
    torch.testing.assert_close(many, exact, rtol=0, atol=0.05)
    with pytest.raises(IntractableError, match="log_prob_bound"):
        d.log_prob(x)
    for wrong, error in ((x[:, :0], ShapeError), (torch.zeros(()).double(), ShapeError)):
        with pytest.raises(error):
            d.log_prob_bound(wrong)
    with pytest.raises(OptionError):
        d.log_prob_bound(x, 0)
    assert d.expand((4,)).sample((2,)).shape == (2, 4, 1)
    draws = d.rsample((20_000,)).detach()[:, 0]
    grid = torch.linspace(-12, 12, 200, dtype=torch.float64)
    with torch.no_grad():
        wide = torch.cartesian_prod(grid, torch.linspace(-9, 9, 200, dtype=torch.float64))
        mass = joint.log_prob(wide).exp().view(200, 200).sum(1)
    assert draws.mean().item() == pytest.approx(float((mass * grid).sum() / mass.sum()), abs=0.05)


def test_augmented_flows_train_by_their_bound():
    torch.manual_seed(0)
    x = 5 + 3 * mixture(3000)
    flow = pf.flows.cnf(2, augment=1, hidden_features=(16, 16), solver="rk4", steps=4).standardized(x)
    assert (flow.dim, flow.transform.dim) == (2, 3) and isinstance(flow, AugmentedFlow)
    fit = pf.fit_density(flow, x, max_steps=150, **QUICK)
    assert fit.validation_loss < fit.history[0]["validation"] - 0.2
    with pytest.raises(ShapeError):
        AugmentedFlow(pf.flows.cnf(2), 2)


def test_an_augmented_fit_says_that_its_loss_is_a_bound():
    """It said negative log-likelihood."""
    x = mixture(200)
    flow = pf.flows.cnf(2, augment=1, hidden_features=(8,), solver="rk4", steps=2)
    for objective, name in (("auto", "elbo"), ("elbo", "elbo"), ("iwae", "iwae")):
        fit = pf.fit_density(flow, x, objective=objective, num_particles=2, max_steps=3, **QUICK)
        assert fit.loss_name == f"negative {name} bound" and fit.in_nats
        assert f"negative {name} bound" in repr(fit) and "likelihood" not in repr(fit)
        assert fit.plot().axes[0].get_title(loc="left") == f"negative {name} bound"
    for objective, says in (("likelihood", "only a bound"), ("rws", "continuous"), ("dreg", "does not have")):
        with pytest.raises(OptionError, match=says):
            pf.fit_density(flow, x, objective=objective, **QUICK)
    with pytest.raises(OptionError, match="of no use"):
        pf.fit_density(flow, x, labels=torch.zeros(200, dtype=torch.long), **QUICK)


def test_the_upper_bound_of_an_augmented_flow_at_its_draws():
    flow = moved(pf.flows.cnf(1, augment=1, hidden_features=(8, 8), solver="rk4", steps=4))
    with torch.no_grad():
        d = flow()
        x, upper = d.sample_and_log_prob((200,), num_particles=4)
        log_prob = d.log_prob_bound(x, 500)  # close to the log density
    assert x.shape == (200, 1) and upper.shape == (200,)
    assert (upper - log_prob).mean() > 0


def carried(flow: ContinuousFlow, x: Tensor, wanted: Tensor, steps: int = 150) -> float:
    """Squared error of the first coordinates after training by least squares."""
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
    wide = torch.cat([x, x.new_zeros(len(x), flow.dim - x.shape[1])], -1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((flow.forward_and_ladj(wide)[0][:, : x.shape[1]] - wanted) ** 2).mean()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.thorough
def test_reflection_needs_room():
    """On a line paths cannot cross: x to -x is out of reach, and the best that can be done is the constant."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 41)[:, None]
    options = {"solver": "rk4", "steps": 4}
    plain = carried(ContinuousFlow(1, **options), x, -x)
    augmented = carried(ContinuousFlow(2, **options), x, -x)
    assert plain > 0.9 * float(x.var(correction=0)) and augmented < 0.01
    flow = pf.flows.cnf(1, augment=1)
    torch.testing.assert_close(flow.carry(x), x)


@pytest.mark.thorough
def test_disc_and_ring_need_room():
    """A plain flow of the plane keeps the ring around the disc; a plane cannot part them, and with a third coordinate one does."""
    torch.manual_seed(0)
    angle, radius = 2 * math.pi * torch.rand(200), torch.cat([0.4 * torch.rand(100), 0.8 + 0.4 * torch.rand(100)])
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    label = (torch.arange(200) >= 100).float()
    losses = []
    for dim in (2, 3):
        torch.manual_seed(1)
        flow, line = ContinuousFlow(dim, solver="rk4", steps=3), nn.Linear(dim, 1)
        optimizer = torch.optim.Adam([*flow.parameters(), *line.parameters()], 1e-2)
        wide = torch.cat([x, torch.zeros(200, dim - 2)], -1)
        for _ in range(120):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(line(flow.forward_and_ladj(wide)[0])[:, 0], label)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.05 and losses[0] > 4 * losses[1], losses


# --- guides


def conjugate(y: Tensor) -> None:
    with pyro.plate("coordinates", 3):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 0.5), obs=y)


def test_a_continuous_guide_runs_captured():
    y = torch.tensor([1.0, -0.5, 2.0])
    guide = pf.AutoFlow(conjugate, flow="cnf").setup(y)
    assert guide.inner[0][0].solver.is_fixed
    guide = pf.AutoFlow(conjugate, flow=lambda dim: pf.flows.cnf(dim, hidden_features=(8, 8), solver="rk4", steps=2))
    posterior = pf.FlowVI(conjugate, guide, max_steps=60, num_eval=2000, engine="captured", progress=False).run(y)
    assert posterior.ess > 0.95
    mu = posterior.get_samples(4000)["mu"]
    torch.testing.assert_close(mu.mean(0), (y * 0.8).to(mu), rtol=0, atol=0.05)
    assert check_ode(posterior.guide.flow, posterior.guide.flow().sample((50,))).verdict == "good"


def test_an_adaptive_guide_says_what_to_use():
    guide = pf.AutoFlow(conjugate, flow=pf.flows.cnf)
    with pytest.raises(CaptureError, match="rk4"):
        pf.FlowVI(conjugate, guide, max_steps=5, num_eval=500, progress=False).run(torch.tensor([1.0, -0.5, 2.0]))


@pytest.mark.parametrize("options", [{}, {"adjoint": True}, {"trace": "hutchinson"}], ids=str)
def test_stock_svi_steps(options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    guide = pf.AutoFlow(conjugate, flow=lambda dim: pf.Flow(Gaussian(dim), ContinuousFlow(dim, **options)))
    svi = pyro.infer.SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO())
    losses = [svi.step(torch.tensor([1.0, -0.5, 2.0])) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
    pyro.clear_param_store()


def test_a_solver_can_be_changed_later(matched):
    layer, x = matched.transform[0], mixture(50)
    with torch.no_grad():
        before, solver = matched().log_prob(x), layer.solver
        layer.solver = Solver("rk4", steps=50)
        torch.testing.assert_close(matched().log_prob(x), before, rtol=1e-3, atol=1e-3)
        layer.solver = solver
