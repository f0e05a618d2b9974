"""Stochastic flows as Pyro models and guides: enumeration is the exact density, draws are its bound, names and plates are right."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.optim import Adam

import pyro_flows as pf
from pyro_flows.errors import OptionError, ShapeError
from pyro_flows.stochastic import ARLWTA, ContinuouslyIndexed, DensityModel, LWTACoupling, StochasticFlow
from pyro_flows.transforms import Coupling, LULinear
from pyro_flows.univariate import Affine

FIRST = torch.tensor([True, False])
SMALL = {"hidden_features": (8,)}


def perturbed(flow, scale=0.4):
    with torch.no_grad():
        for p in flow.parameters():
            p += scale * torch.randn_like(p)
    return flow.eval()


FLOWS = {
    "two blocks": lambda: StochasticFlow(2, [LWTACoupling(2, 3, moved=FIRST, **SMALL), LULinear(2), LWTACoupling(2, 2, moved=~FIRST, **SMALL)]),
    "a map below": lambda: StochasticFlow(2, [LULinear(2), LWTACoupling(2, 3, moved=FIRST, **SMALL)]),
    "groups above a map": lambda: StochasticFlow(3, [LULinear(3), LWTACoupling(3, 2, moved=torch.tensor([1, 1, 0]) > 0, groups=2, **SMALL)]),
    "ar": lambda: StochasticFlow(4, [ARLWTA(4, 3, **SMALL), LULinear(4)]),
}


def elbo(**options):
    return TraceEnum_ELBO(max_plate_nesting=1, **options)


@pytest.mark.parametrize("name", FLOWS)
def test_enumeration_in_the_model_is_the_density(name):
    torch.set_default_dtype(torch.float64)
    flow = perturbed(FLOWS[name]())
    x = flow().sample((7,))
    density = DensityModel(flow)
    loss = elbo().differentiable_loss(density.model, density.guide, x)
    exact = flow().log_prob(x).sum()
    torch.testing.assert_close(-loss, exact, atol=1e-8, rtol=0)
    parameters = list(flow.parameters())
    for g, w in zip(torch.autograd.grad(-loss, parameters), torch.autograd.grad(exact, parameters), strict=True):
        torch.testing.assert_close(g, w)


def test_the_winners_next_to_the_base_are_summed_one_by_one():
    """Forty coordinates of three units: 3^40 winners, which no joint enumeration could hold."""
    flow = perturbed(StochasticFlow(40, [ARLWTA(40, 3, **SMALL)]).double(), 0.2)
    x = flow().sample((3,))
    density = DensityModel(flow)
    assert elbo().loss(density.model, density.guide, x) == pytest.approx(-flow().log_prob(x).sum().item(), rel=1e-9)


def test_bounds_by_enumeration_and_by_draws():
    torch.set_default_dtype(torch.float64)
    flow = perturbed(FLOWS["two blocks"](), 0.5)
    flow.fit_laws()
    x = flow().sample((5,))
    exact = flow().log_prob(x).sum().detach().item()
    summed, drawn = DensityModel(flow, "guide"), DensityModel(flow, None)
    with torch.no_grad():
        enumerated = -elbo().loss(summed.model, summed.guide, x)
        particles = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
        sampled = -particles.loss(drawn.model, drawn.guide, x)
        own = StochasticFlow(flow.base, list(flow.layers), max_paths=1)().log_prob_bound(x.expand(20_000, 5, 2)).mean(0).sum().item()
    assert enumerated < exact - 1e-5
    assert sampled == pytest.approx(enumerated, abs=0.03)
    if not flow.folds:
        assert own == pytest.approx(enumerated, abs=0.03)


def test_continuous_indices_are_sites():
    torch.set_default_dtype(torch.float64)
    flow = perturbed(StochasticFlow(2, [ContinuouslyIndexed(Coupling(Affine(), 2, FIRST, **SMALL), 2, **SMALL) for _ in range(2)]), 0.2)
    x = flow().sample((4,))
    density = DensityModel(flow)
    trace = poutine.trace(density.guide).get_trace(x)
    model = poutine.trace(poutine.replay(density.model, trace)).get_trace(x)
    log_p, log_q, _ = flow.log_weight(x, None, [trace.nodes["flow_u0"]["value"], trace.nodes["flow_u1"]["value"]])
    torch.testing.assert_close(trace.log_prob_sum(), log_q.sum())
    torch.testing.assert_close(model.log_prob_sum(), log_p.sum())
    svi = SVI(density.model, density.guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1))
    assert svi.step(x) != svi.step(x)
    sites = {n for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    assert sites - {"flow_rows"} == {"flow_u0", "flow_u1"}
    assert trace.nodes["flow_u1"]["value"].shape == (4, 2)
    with pytest.raises(OptionError, match="needs discrete indices"):
        DensityModel(flow, "model")


def test_names_plates_and_subsampling():
    torch.set_default_dtype(torch.float64)
    flow = perturbed(FLOWS["groups above a map"]())
    x = flow().sample((12,))
    density = DensityModel(flow, None, subsample_size=4, name="q")
    trace = poutine.trace(density.guide).get_trace(x)
    assert [n for n in trace.nodes if "_u" in n] == ["q_u1_0", "q_u1_1"]
    for name in ("q_u1_0", "q_u1_1"):
        site = trace.nodes[name]
        assert site["value"].shape == (4,) and [f.name for f in site["cond_indep_stack"]] == ["q_rows"] and site["scale"] == 3.0
    model = poutine.trace(poutine.replay(density.model, trace)).get_trace(x)
    assert torch.equal(model.nodes["q_u1_1"]["value"], trace.nodes["q_u1_1"]["value"])
    assert torch.equal(model.nodes["q_rows"]["value"], trace.nodes["q_rows"]["value"])
    summed = DensityModel(flow, subsample_size=4)
    losses = [elbo().loss(summed.model, summed.guide, x) for _ in range(300)]
    error = torch.tensor(losses).std() / 300**0.5
    assert abs(sum(losses) / 300 + flow().log_prob(x).sum().item()) < 4 * error
    with pytest.raises(ShapeError, match="must have shape"):
        summed.model(torch.zeros(3, 4))
    with pytest.raises(OptionError, match="enumerate must be"):
        DensityModel(flow, "both")


def test_contexts_and_training():
    flow = StochasticFlow(2, [LWTACoupling(2, 3, context_dim=1, moved=FIRST, **SMALL), LWTACoupling(2, 3, context_dim=1, moved=~FIRST, **SMALL)])
    context = torch.randn(200, 1)
    x = torch.randn(200, 2) * 0.3 + torch.sign(torch.randn(200, 1)) + context
    density = DensityModel(flow)
    svi = SVI(density.model, density.guide, Adam({"lr": 1e-2}), elbo())
    before = svi.evaluate_loss(x, context)
    assert before == pytest.approx(-flow(context).log_prob(x).sum().item(), rel=1e-5)
    for _ in range(60):
        svi.step(x, context)
    assert svi.evaluate_loss(x, context) < before - 100
    assert "flow$$$layers.0.shift" in pyro.get_param_store().keys()
    assert pf.stochastic.DensityModel is DensityModel
