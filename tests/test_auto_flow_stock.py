"""AutoFlow with the rest of stock Pyro: Predictive, guide lists, blocked sites, NeuTra and NUTS, learning rates by name."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, AutoNormal
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import ClippedAdam
from test_auto_flow_elbos import NOISE, OBSERVED, SLOPES, N, data, eight_schools, exact, fit, linear, mixture, perturbed, small, solve

from pyro_flows import AutoFlow


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    def model(y=None):
        x = pyro.sample("x", N(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("double", 2 * x, event_dim=1)
        pyro.sample("y", N(x @ torch.tensor(SLOPES).T, NOISE).to_event(1), obs=y)

    count = 4000 if parallel else 300
    draws = Predictive(model, guide=exact(), num_samples=count, parallel=parallel)()
    assert {k: v.shape for k, v in draws.items()} == {"x": (count, 2), "double": (count, 2), "y": (count, 3)}
    torch.testing.assert_close(draws["double"], 2 * draws["x"])
    mean, tril, _ = solve()
    error = (tril @ tril.T).diagonal().div(count).sqrt()
    assert bool(((draws["x"].mean(0) - mean).abs() < 4 * error).all())
    spread = (draws["y"] - draws["x"] @ torch.tensor(SLOPES).T).std(0)
    torch.testing.assert_close(spread, torch.full((3,), NOISE), rtol=0, atol=4 * NOISE / (2 * count) ** 0.5)


def test_predictive_keeps_plates():
    guide = perturbed(AutoFlow(eight_schools, flow=small).setup(*data()))
    for parallel in (False, True):
        draws = Predictive(eight_schools, guide=guide, num_samples=5, parallel=parallel, return_sites=("mu", "theta", "y"))(None, data()[1])
        assert {k: v.shape[:1] + v.squeeze().shape[1:] for k, v in draws.items()} == {"mu": (5,), "theta": (5, 8), "y": (5, 8)}


def test_a_guide_list_shares_the_sites():
    guide = AutoGuideList(eight_schools)
    guide.append(AutoFlow(poutine.block(eight_schools, hide=["theta"]), flow=small))
    guide.append(AutoNormal(poutine.block(eight_schools, expose=["theta"])))
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    losses = fit(eight_schools, guide, elbo, *data(), steps=80, lr=0.03)
    assert sum(losses[-10:]) < sum(losses[:10]) - 100.0
    assert set(guide(*data())) == set(guide.median(*data())) == {"mu", "tau", "theta"}
    levels = guide.quantiles([0.1, 0.5, 0.9], *data())
    assert {k: torch.as_tensor(v).shape for k, v in levels.items()} == {"mu": (3,), "tau": (3,), "theta": (3, 8)}
    assert {name.split(".")[1] for name in pyro.get_param_store()} == {"0", "1"}


def test_a_guide_list_with_a_discrete_guide():
    y = torch.tensor([-2.0, -1.5, 0.3, 1.0, 2.5])
    guide = AutoGuideList(mixture)
    guide.append(AutoFlow(poutine.block(mixture, expose=["centre"]), flow=small))
    guide.append(AutoDiscreteParallel(poutine.block(mixture, hide=["centre"])))
    losses = fit(mixture, guide, TraceEnum_ELBO(max_plate_nesting=1), y, steps=60, lr=0.03)
    assert sum(losses[-10:]) < sum(losses[:10]) - 10.0


def test_neutra_density_is_that_of_the_pulled_back_model():
    guide = perturbed(AutoFlow(eight_schools, flow=small).setup(*data()))
    neutra = NeuTraReparam(guide)
    model = poutine.reparam(eight_schools, config=lambda _: neutra)
    point = torch.randn(10)
    trace = poutine.trace(poutine.condition(model, {"mu_shared_latent": point})).get_trace(*data())
    z, ladj = guide.flow.transform.forward_and_ladj(point)
    values = guide.unpack(z)
    wanted = poutine.trace(poutine.condition(eight_schools, values)).get_trace(*data()).log_prob_sum() + ladj + guide.unpack_ladj(z)
    torch.testing.assert_close(trace.log_prob_sum(), wanted)
    for name, value in neutra.transform_sample(point).items():
        torch.testing.assert_close(value, values[name])


def test_neutra_and_nuts_find_the_posterior():
    y, (mean, tril, _) = torch.tensor(OBSERVED), solve()
    neutra = NeuTraReparam(perturbed(exact(small), 0.2))
    mcmc = MCMC(NUTS(poutine.reparam(linear, config=lambda _: neutra)), num_samples=150, warmup_steps=50, disable_progbar=True)
    mcmc.run(y)
    x = neutra.transform_sample(mcmc.get_samples()["x_shared_latent"])["x"]
    sd = (tril @ tril.T).diagonal().sqrt()
    assert x.shape == (150, 2) and bool(((x.mean(0) - mean).abs() < 0.4 * sd).all()) and bool(((x.std(0) / sd).log().abs() < 0.35).all())


@pytest.mark.parametrize("seed", [1, 3])
def test_the_default_flow_survives_one_particle_with_the_documented_rates(seed):
    torch.set_default_dtype(torch.float32)
    pyro.set_rng_seed(seed)
    guide = AutoFlow(eight_schools)
    optimizer = ClippedAdam(lambda name: {"lr": 1e-3 if ".net." in name else 1e-2, "clip_norm": 10.0})
    train = SVI(eight_schools, guide, optimizer, Trace_ELBO())
    losses = torch.tensor([train.step(*data()) for _ in range(120)])
    assert bool(losses.isfinite().all()) and losses[-40:].median() < losses[:10].median() - 8.0
