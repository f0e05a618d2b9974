"""Continuous flows: solvers, traces, gradients and their memory, penalties, what may fail and how, and the check of accuracy."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_flows as pf
from pyro_flows.diagnostics import check_ode
from pyro_flows.errors import CaptureError, IntegrationError, OptionError, ShapeError
from pyro_flows.nets import AutoregressiveVelocity, PotentialNet, VelocityMLP
from pyro_flows.numerics import Solver, draw_probe, estimated_divergence, exact_divergence, integrate, reverse_products
from pyro_flows.numerics.ode import ADAPTIVE_SOLVERS, FIXED_SOLVERS
from pyro_flows.transforms import ContinuousFlow
from pyro_flows.vi.scores import push_score

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Plain(nn.Module):
    """A net that knows nothing of its derivatives, as users write them."""

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim + 1 + context_dim, 8), nn.Tanh(), nn.Linear(8, dim))

    def forward(self, t, x, context=None):
        time = torch.zeros_like(x[..., :1]) + t
        return self.net(torch.cat([x, time] if context is None else [x, time, context], -1))


class Field(nn.Module):
    """A velocity by formula."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f, self.scale = f, nn.Parameter(torch.ones((), dtype=DOUBLE))

    def forward(self, t, x):
        return self.scale * self.f(t, x)


def perturbed(module: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.double().parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=DOUBLE)
    return module


NETS = {
    "one-layer": lambda dim, context: VelocityMLP(dim, context, (8,), "softplus", "concat"),
    "two-layers": lambda dim, context: VelocityMLP(dim, context, (8, 7)),
    "three-layers": lambda dim, context: VelocityMLP(dim, context, (8, 7, 6), "silu"),
    "narrow-potential": lambda dim, context: PotentialNet(dim, context, 2),
    "potential": lambda dim, context: PotentialNet(dim, context, 8),
    "autoregressive": lambda dim, context: AutoregressiveVelocity(dim, context, (8, 8), 3),
    "plain": Plain,
}
each_net = pytest.mark.parametrize("name", NETS)


def points(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def flow_of(name: str, dim: int = 3, context_dim: int = 0, **options) -> ContinuousFlow:
    return perturbed(ContinuousFlow(dim, NETS[name](dim, context_dim), context_dim, **options))


# --- solvers


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_fixed_steps_have_their_order(method, order):
    def error(steps):
        y, evaluations = integrate(lambda t, y: torch.cos(torch.as_tensor(t)) * y, points(3), 0.0, 2.0, Solver(method, steps))
        assert evaluations == steps * FIXED_SOLVERS[method][1]
        return (y / points(3) - math.exp(math.sin(2.0))).abs().max().item()

    assert math.log2(error(16) / error(32)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("method", ADAPTIVE_SOLVERS)
def test_adaptive_steps_keep_their_tolerance(method):
    y0 = points(4, 2)
    errors, counts = [], []
    for tolerance in (1e-4, 1e-7):
        solver = Solver(method, rtol=tolerance, atol=tolerance)
        y, count = integrate(lambda t, y: torch.stack([y[..., 1], -y[..., 0]], -1), y0, 0.0, 1.0, solver)
        turned = torch.stack([y0[:, 0] * math.cos(1) + y0[:, 1] * math.sin(1), y0[:, 1] * math.cos(1) - y0[:, 0] * math.sin(1)], -1)
        errors.append((y - turned).abs().max().item())
        counts.append(count)
    assert errors[0] < 1e-3 and errors[1] < 1e-6 and counts[0] < counts[1]


# --- nets and traces


@each_net
@pytest.mark.parametrize("context_dim", (0, 2))
def test_traces_by_formula(name, context_dim):
    net, x = perturbed(NETS[name](3, context_dim)), points(4, 5, 3)
    context = points(4, 5, 2) if context_dim else None
    args = (0.3, x) if context is None else (0.3, x, context)
    exact = exact_divergence(reverse_products(lambda x: net(0.3, x, *args[2:])), x)
    assert exact.trace.abs().mean() > 1e-4
    torch.testing.assert_close(net(*args), exact.value)
    torch.testing.assert_close(net(torch.full((4, 5, 1), 0.3, dtype=DOUBLE), *args[1:]), exact.value)  # a time for each row
    if hasattr(net, "velocity_and_trace"):
        value, trace = net.velocity_and_trace(0.3, x, context)
        torch.testing.assert_close(value, exact.value)
        torch.testing.assert_close(trace, exact.trace)
    if hasattr(net, "products"):
        own = exact_divergence(lambda x, v: net.products(0.3, x, v, context), x)
        for ours, theirs in zip(own, exact, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("noise", ("rademacher", "gaussian", "sphere"))
def test_probes_have_unit_covariance(noise):
    v = draw_probe(noise, torch.zeros(200_000, 3, dtype=DOUBLE))
    assert (v.T @ v / len(v) - torch.eye(3)).abs().max() < 0.02 and v.mean(0).abs().max() < 0.01


@pytest.mark.parametrize("noise", ("rademacher", "gaussian", "sphere"))
def test_hutchinson_has_the_variance_that_the_docs_state(noise):
    torch.manual_seed(0)
    s = points(4, 4)
    s, x = s + s.mT, torch.zeros(200_000, 4, dtype=DOUBLE)
    trace = estimated_divergence(reverse_products(lambda x: x @ s), x, draw_probe(noise, x)).trace
    total, diagonal = (s**2).sum(), s.diagonal()
    variance = {"gaussian": 2 * total, "rademacher": 2 * (total - (diagonal**2).sum()), "sphere": 2 * (total - diagonal.sum() ** 2 / 4) * 4 / 6}[
        noise
    ]
    assert trace.mean().item() == pytest.approx(diagonal.sum().item(), abs=4 * (variance.item() / len(x)) ** 0.5)
    assert trace.var().item() == pytest.approx(variance.item(), rel=0.03)


@pytest.mark.parametrize("noise", ("rademacher", "gaussian", "sphere"))
@pytest.mark.parametrize("name", ("two-layers", "plain"))
def test_hutchinson_is_unbiased(name, noise):
    """The mean of 2,000 draws of the log-det, and of its gradient, within three standard errors of the exact ones."""
    torch.manual_seed(3)
    flow = flow_of(name, solver="rk4", steps=4, noise=noise)
    x, draws = points(3), 2000
    params = {k: p.detach() for k, p in flow.named_parameters()}
    key = "net.layers.1.linear.weight" if name == "two-layers" else "net.net.0.weight"
    direction = points(*params[key].shape, seed=5)

    def ladj(step, x):
        moved = params | {key: params[key] + step * direction}
        return functional_call(_Ladj(flow), {f"flow.{k}": v for k, v in moved.items()}, (x,))

    zero = torch.zeros((), dtype=DOUBLE)
    exact, slope = ladj(zero, x), grad(ladj)(zero, x)
    flow.trace = "hutchinson"
    many = torch.zeros(draws, dtype=DOUBLE)
    for found, wanted in (
        (vmap(lambda s: ladj(s, x), randomness="different")(many), exact),
        (vmap(lambda s: grad(ladj)(s, x), randomness="different")(many), slope),
    ):
        assert found.std() > 1e-4
        assert (found.mean() - wanted).abs() < 3 * found.std() / draws**0.5


class _Ladj(nn.Module):
    def __init__(self, flow: ContinuousFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x):
        return self.flow.inverse_and_ladj(x)[1]


def test_a_net_that_draws_is_tried_out_beside_the_random_stream():
    class Noisy(nn.Module):
        def forward(self, t, x):
            return torch.rand_like(x)

    before = torch.get_rng_state()
    ContinuousFlow(2, Noisy())
    assert torch.equal(torch.get_rng_state(), before)


def test_one_draw_a_solve_and_a_fresh_one_a_call():
    flow, x = flow_of("plain", trace="hutchinson", solver="rk4", steps=10), points(6, 3)
    torch.manual_seed(0)
    first, second = flow.forward_and_ladj(x)[1], flow.forward_and_ladj(x)[1]
    assert (first != second).any()
    torch.manual_seed(0)
    torch.testing.assert_close(flow.forward_and_ladj(x)[1], first)
    torch.manual_seed(0)
    probe = draw_probe(flow.noise, x)
    there = flow.solve(x, probe=probe)
    torch.testing.assert_close(there.ladj, first)  # so the one draw served all of the evaluations
    back = flow.solve(there.value, inverse=True, probe=probe)
    torch.testing.assert_close(back.ladj, -there.ladj, rtol=1e-5, atol=1e-5)


# --- values and gradients


OPTIONS = [{}, {"adjoint": True}, {"checkpoint": 3}, {"solver": "dopri8"}]
EACH_AND_EACH = [  # every net as it is and every option on one net; all of them together are thorough
    pytest.param(name, options, id=f"{name}-{options}", marks=[pytest.mark.thorough] * (bool(options) and name != "two-layers"))
    for name in NETS
    for options in OPTIONS
]


@pytest.mark.parametrize("name, options", EACH_AND_EACH)
def test_adaptive_solves(name, options):
    flow, x = flow_of(name, **(TIGHT | options)), points(4, 3)
    y, ladj = flow.forward_and_ladj(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.forward_and_ladj(x)[0].sum(0), x).movedim(1, 0)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-6)
    back, reverse = flow.inverse_and_ladj(y)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reverse, -ladj, rtol=1e-6, atol=1e-6)
    assert (y - x).abs().max() > 0.05 and flow.solve(x).evaluations > 10


def test_round_trip_at_a_tolerance_of_1e_7():
    flow, x = perturbed(ContinuousFlow(2, VelocityMLP(2, 0, (32, 32)), rtol=1e-7, atol=1e-7), 0.5), 2 * points(500, 2)
    for there, back in ((flow.forward_and_ladj, flow.inverse_and_ladj), (flow.inverse_and_ladj, flow.forward_and_ladj)):
        y, ladj = there(x)
        again, reverse = back(y)
        assert (again - x).abs().max() < 1e-5 and (ladj + reverse).abs().max() < 1e-5


def gradients(flow: ContinuousFlow, context: Tensor | None = None) -> Tensor:
    x = points(5, 3).requires_grad_()
    given = None if context is None else context.clone().requires_grad_()
    total = sum(((v * torch.linspace(0.5, 2, v.numel()).view_as(v)).sum() for v in flow.inverse_and_ladj(x, given)), torch.zeros(()))
    wanted = [x, *flow.parameters(), *([] if given is None else [given])]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, wanted)])


@pytest.mark.parametrize("context_dim", (0, 2))
@pytest.mark.parametrize("name", ("two-layers", "potential", "plain"))
def test_adjoint_and_direct_gradients_agree(name, context_dim):
    context = points(5, 2, seed=4) if context_dim else None
    flow = flow_of(name, 3, context_dim, rtol=1e-8, atol=1e-8)
    direct = gradients(flow, context)
    fixed = Solver("rk4", steps=40)
    for solver in (Solver(adjoint=True, rtol=1e-8, atol=1e-8), Solver(checkpoint=3, rtol=1e-8, atol=1e-8), fixed, Solver("rk4", 40, adjoint=True)):
        flow.solver = solver
        assert (gradients(flow, context) - direct).abs().max() < 1e-5, solver
    flow.solver = fixed
    plain = gradients(flow, context)
    flow.solver = Solver("rk4", steps=40, checkpoint=7)
    torch.testing.assert_close(gradients(flow, context), plain)


def test_eval_changes_neither_values_nor_gradients():
    for options in ({}, {"adjoint": True}, {"trace": "hutchinson"}, {"solver": "rk4", "steps": 5}):
        flow, found = flow_of("two-layers", **options), []
        for mode in (True, False):
            torch.manual_seed(0)
            found.append(gradients(flow.train(mode)))
        assert torch.equal(*found)


def saved_bytes(flow: ContinuousFlow) -> int:
    """What the graph of one solve holds on to."""
    total = 0

    def pack(t):
        nonlocal total
        total += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        flow.forward_and_ladj(points(50, 3))
    return total


def test_memory():
    """The adjoint's does not grow with the steps; checkpoints' only with their number; that of the plain solve does."""
    few, many = 10, 80

    def held(**options):
        flow = flow_of("two-layers", solver="rk4")
        return [saved_bytes(_with(flow, Solver("rk4", steps, **options))) for steps in (few, many)]

    adjoint, kept, plain = held(adjoint=True), held(checkpoint=5), held()
    assert adjoint[0] == adjoint[1] and kept[0] == kept[1]
    assert plain[1] > 7 * plain[0] > 20 * kept[0] > 20 * adjoint[0] / 5


def _with(flow: ContinuousFlow, solver: Solver) -> ContinuousFlow:
    flow.solver = solver
    return flow


@pytest.mark.parametrize("trace", ("exact", "hutchinson"))
@each_net
def test_the_score_is_carried_forward(name, trace):
    flow, x, score = flow_of(name, solver="rk4", steps=30, trace=trace), points(6, 3), points(6, 3, seed=8)
    torch.manual_seed(0)
    y, ladj, pushed = push_score(flow, x, score)
    torch.manual_seed(0)
    probe = None if trace == "exact" else draw_probe(flow.noise, x)
    torch.testing.assert_close((y, ladj), tuple(flow.solve(x, probe=probe)[:2]))
    point = y.detach().requires_grad_()
    back = flow.solve(point, inverse=True, probe=probe)
    wanted = torch.autograd.grad([back.value, back.ladj], point, [score, torch.ones(6, dtype=DOUBLE)])[0]
    torch.testing.assert_close(pushed, wanted, rtol=1e-5, atol=1e-5)


# --- penalties


@pytest.mark.parametrize("name", ("two-layers", "potential", "plain"))
def test_regularization_is_the_integral_along_the_path(name):
    flow, y = flow_of(name, **TIGHT), points(4, 3)
    found = flow.regularization(y)
    way = flow.path(found.value, points=201)
    torch.testing.assert_close(way[-1], y, rtol=1e-6, atol=1e-6)
    kinetic, jacobian = [], []
    for t, z in zip(torch.linspace(0, 1, 201).tolist(), way, strict=True):
        at = exact_divergence(reverse_products(lambda z, t=t: flow.net(t, z)), z)
        kinetic.append((at.value**2).sum(-1))
        jacobian.append(at.norm)
    for ours, values in ((found.kinetic, kinetic), (found.jacobian, jacobian)):
        torch.testing.assert_close(ours, torch.trapezoid(torch.stack(values), dx=1 / 200, dim=0), rtol=1e-3, atol=1e-5)
    plain = flow.solve(y, inverse=True)
    torch.testing.assert_close(found.value, plain.value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.ladj, plain.ladj, rtol=1e-6, atol=1e-6)
    assert not plain.kinetic.any() and not plain.jacobian.any()
    torch.manual_seed(0)
    flow.trace = "hutchinson"
    many = flow.regularization(y[:1].expand(4000, 3)).jacobian
    assert (many.mean() - found.jacobian[0]).abs() < 4 * many.std() / 4000**0.5


# --- errors


def test_bad_options_are_refused():
    for options in (
        {"solver": "rk5"},
        {"rtol": 0.0},
        {"atol": -1e-3},
        {"rtol": float("nan")},
        {"steps": 0},
        {"steps": 2.0},
        {"checkpoint": -1},
        {"adjoint": True, "checkpoint": 2},
        {"trace": "skilling"},
        {"noise": "cauchy"},
    ):
        with pytest.raises(OptionError, match=next(iter(options)).split("=")[0]):
            ContinuousFlow(2, **options)
    for make in (
        lambda: VelocityMLP(2, activation="relu"),
        lambda: VelocityMLP(2, layer="film"),
        lambda: VelocityMLP(2, hidden_features=()),
        lambda: PotentialNet(2, hidden_features=(8, 8)),
        lambda: AutoregressiveVelocity(2, units=0),
        lambda: pf.flows.cnf(2, net="transformer"),
        lambda: pf.flows.cnf(2, net="potential", hidden_features=()),
        lambda: pf.flows.cnf(2, augment=-1),
        lambda: pf.flows.cnf(2).compiled(),
        lambda: ContinuousFlow(2, torch.tanh),
        lambda: draw_probe("uniform", torch.zeros(2)),
    ):
        with pytest.raises(OptionError):
            make()


def test_a_net_of_the_wrong_size_is_refused():
    for net in (VelocityMLP(3), Plain(2, 1), nn.Linear(2, 2), Field(lambda t, x: x[..., :1])):
        with pytest.raises(ShapeError, match="ContinuousFlow: net"):
            ContinuousFlow(2, net)
    with pytest.raises(ShapeError, match="context"):
        ContinuousFlow(2, VelocityMLP(2), context_dim=1)


def test_an_exact_trace_has_a_budget():
    for net in (Plain(200), VelocityMLP(200, hidden_features=(4, 4, 4)), PotentialNet(200, hidden_features=150)):
        with pytest.raises(OptionError, match="hutchinson"):
            ContinuousFlow(200, net)
        ContinuousFlow(200, net, trace="hutchinson")
    for net in (None, AutoregressiveVelocity(200, hidden_features=(4,)), PotentialNet(200, hidden_features=4)):
        flow = ContinuousFlow(200, net, solver="rk4", steps=1)
        assert flow.forward_and_ladj(torch.zeros(2, 200))[1].shape == (2,)
        with pytest.raises(OptionError, match="norm.*hutchinson"):
            flow.regularization(torch.zeros(2, 200))


@pytest.mark.parametrize("options", [{}, {"adjoint": True}, {"solver": "rk4"}, {"solver": "rk4", "adjoint": True}, {"checkpoint": 2}], ids=str)
def test_dynamics_that_fail_say_where(options):
    x = points(4, 2).abs() + 1
    late_nan = ContinuousFlow(2, Field(lambda t, x: x + torch.log(torch.as_tensor(0.62) - t)), **options)
    with pytest.raises(IntegrationError, match=r"at time 0\.[4-7].*norm"):
        late_nan.forward_and_ladj(x)
    explodes = ContinuousFlow(2, Field(lambda t, x: x**3), **options)  # infinite at time 1 / (2 x^2)
    with pytest.raises(IntegrationError, match=r"at time .*norm"):
        explodes.forward_and_ladj(10 * x)


def test_a_step_that_underflows():
    jump = ContinuousFlow(2, Field(lambda t, x: 1 / (x - 1).abs() ** 3), rtol=1e-9, atol=1e-9)  # arrives at 1 with infinite speed
    with pytest.raises(IntegrationError, match="shrunk to nothing at time|steps"):
        jump.forward_and_ladj(torch.zeros(1, 2, dtype=DOUBLE))


@pytest.mark.parametrize("options", [{"adjoint": True}, {"checkpoint": 2}, {"solver": "rk4", "checkpoint": 2}], ids=str)
def test_replaced_parameters_have_no_silent_gradient(options):
    """The backward pass evaluates the net again, by then with its own parameters: that gave zeros."""
    flow, x = flow_of("two-layers", **options), points(4, 3)
    new = {name: (p.detach() + 0.1).requires_grad_() for name, p in flow.named_parameters()}
    loss = functional_call(flow, new, (x,)).sum()
    with pytest.raises(CaptureError, match="adjoint=False"):
        loss.backward()
    flow.forward_and_ladj(x)[1].sum().backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_a_score_and_a_probe_are_for_their_flows():
    with pytest.raises(ShapeError, match="context"):
        flow_of("two-layers", context_dim=2, solver="rk4").forward_with_score(points(4, 3), points(4, 3))
    with pytest.raises(OptionError, match="exact"):
        flow_of("two-layers").solve(points(4, 3), probe=points(4, 3))


def test_what_graphs_and_function_transforms_refuse():
    x, adjoint, adaptive = points(3, 3), flow_of("two-layers", adjoint=True), flow_of("plain")
    with pytest.raises(CaptureError, match="adjoint=False"):
        grad(lambda x: adjoint.forward_and_ladj(x)[0].sum())(x)
    with pytest.raises(CaptureError, match="rk4"):
        make_fx(lambda x: adaptive.forward_and_ladj(x))(x)
    with pytest.raises(CaptureError, match="rk4"):
        vmap(lambda x: adaptive.forward_and_ladj(x)[1])(x)


# --- the check of accuracy


def test_check_ode():
    torch.manual_seed(0)
    flow = pf.Flow(2, perturbed(ContinuousFlow(2), 0.3).float())
    x = 2 * torch.randn(200, 2)
    before = copy.deepcopy(flow.state_dict())
    good = check_ode(flow, x)
    assert good.verdict == "good" and good.log_prob_error.abs().max() < 1e-3 and good.reference_evaluations > good.evaluations
    assert "log density" in str(good) and good.log_prob_error.shape == (200,)
    flow.transform.solver = Solver("euler", steps=2)
    bad = check_ode(flow, x)
    assert bad.verdict == "inaccurate" and "smaller rtol" in bad.reasons[0] and bad.evaluations == 2
    assert bad.log_prob_error.abs().max() > 0.01
    flow.transform.solver, flow.transform.trace = Solver(), "hutchinson"
    assert check_ode(flow, x).log_prob_error.abs().max() < 1e-3  # the same noise in both solves
    assert all(torch.equal(a, b) for a, b in zip(before.values(), flow.state_dict().values(), strict=True))
    assert check_ode(flow.transform, x).verdict == "good"
    assert check_ode(pf.flows.cnf(2, context_dim=1), x, torch.zeros(200, 1)).verdict == "good"
    with pytest.raises(OptionError):
        check_ode(pf.flows.realnvp(2), x)
    for wrong in (x[:, :1], x[:0]):
        with pytest.raises(ShapeError):
            check_ode(flow, wrong)
    other = pf.Flow(2, perturbed(ContinuousFlow(2), 0.3).float().inv)
    assert check_ode(other, x).verdict == "good"


def test_tolerances_below_rounding_are_raised_to_it():
    flow = ContinuousFlow(2, Field(lambda t, x: torch.sin(3 * x)).float(), rtol=1e-13, atol=1e-13)
    assert flow.solve(torch.randn(5, 2)).evaluations < 500
