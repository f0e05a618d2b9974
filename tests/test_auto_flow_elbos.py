"""AutoFlow in stock Pyro: every ELBO against the formula, with the same noise; known evidences; Predictive, guide lists, NeuTra."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.ops.indexing import Vindex
from pyro.optim import Adam
from torch.func import jacrev, vmap

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.errors import SupportError

NAMES = ("nice", "realnvp", "maf", "iaf", "nsf", "nsf_ar")
N = dist.Normal


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def small(dim):
    return pf.flows.realnvp(dim, transforms=2, hidden_features=(8,))


def perturbed(guide, scale=0.1):
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return guide


# A linear Gaussian model, whose posterior and evidence are known; and eight schools, whose evidence is known to four digits.

SLOPES, NOISE, OBSERVED = ((1.0, 0.5), (0.3, -1.0), (0.8, 0.2)), 0.7, (1.0, -2.0, 0.5)


def linear(y):
    x = pyro.sample("x", N(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", N(x @ torch.tensor(SLOPES).T, NOISE).to_event(1), obs=y)


def solve():
    """The posterior's mean and Cholesky factor, and the log evidence."""
    a, y = torch.tensor(SLOPES), torch.tensor(OBSERVED)
    covariance = torch.linalg.inv(torch.eye(2) + a.T @ a / NOISE**2)
    evidence = dist.MultivariateNormal(torch.zeros(3), a @ a.T + NOISE**2 * torch.eye(3)).log_prob(y)
    return covariance @ a.T @ y / NOISE**2, torch.linalg.cholesky(covariance), evidence.item()


def exact(flow="auto"):
    """The guide that is the posterior of ``linear``, by its affine layer."""
    guide = AutoFlow(linear, flow=flow).setup(torch.tensor(OBSERVED))
    mean, tril, _ = solve()
    with torch.no_grad():
        guide.affine.log_diag.copy_(tril.diagonal().log())
        guide.affine.lower.copy_(tril / tril.diagonal()[:, None])
        guide.affine.shift.copy_(mean - guide.standardize.loc)
    return guide


Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
EIGHT_SCHOOLS_EVIDENCE = -31.311


def eight_schools(y, sigma, centred=True):
    mu = pyro.sample("mu", N(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", N(mu, tau)) if centred else mu + tau * pyro.sample("eta", N(0.0, 1.0))
        pyro.sample("y", N(theta, sigma), obs=y)


def data():
    return torch.tensor(Y), torch.tensor(SIGMA)


def by_hand(guide, noise):
    """Draws of an eight-schools guide, and their log weights, from the model's formula and the Jacobian by autograd."""
    y, sigma = data()

    def forward(noise):
        return guide.flow.transform.forward_and_ladj(noise)[0]

    z = forward(noise)
    log_q = N(0.0, 1.0).log_prob(noise).sum(-1) - vmap(jacrev(forward))(noise).slogdet().logabsdet
    mu, tau, theta = z[:, :1], z[:, 1:2].exp(), z[:, 2:]
    each = N(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + z[:, 1:2]
    log_p = each.sum(-1) + (N(mu, tau).log_prob(theta) + N(theta, sigma).log_prob(y)).sum(-1)
    return z, log_p - log_q


def tail_adaptive(log_weights):
    gamma = 1.0 / (log_weights.argsort() + 1.0)  # what Pyro takes for their ranks
    return -(gamma * log_weights).sum() / gamma.sum() / len(log_weights)


def bound(log_weights):
    return -log_weights.mean()


def renyi(alpha):
    return lambda w: -((1 - alpha) * w).logsumexp(0).sub(math.log(len(w))).div(1 - alpha)


ELBOS = {
    "Trace": (Trace_ELBO, {}, bound),
    "JitTrace": (infer.JitTrace_ELBO, {"ignore_jit_warnings": True}, bound),
    "TraceMeanField": (infer.TraceMeanField_ELBO, {}, bound),
    "TraceGraph": (infer.TraceGraph_ELBO, {}, bound),
    "TraceEnum": (TraceEnum_ELBO, {"strict_enumeration_warning": False}, bound),
    "Renyi 0.5": (infer.RenyiELBO, {"alpha": 0.5}, renyi(0.5)),
    "Renyi 2": (infer.RenyiELBO, {"alpha": 2.0}, renyi(2.0)),
    "ReweightedWakeSleep": (infer.ReweightedWakeSleep, {"model_has_params": False}, renyi(0.0)),
    "TraceTailAdaptive": (infer.TraceTailAdaptive_ELBO, {}, tail_adaptive),
}


def build(name, num_particles=6, vectorize_particles=True):
    kind, options, _ = ELBOS[name]
    return kind(num_particles=num_particles, vectorize_particles=vectorize_particles, max_plate_nesting=1, **options)


@pytest.mark.parametrize("name, vectorised", [*((name, True) for name in ELBOS), ("Trace", False), ("TraceGraph", False), ("TraceMeanField", False)])
def test_loss_and_gradient_are_those_of_the_formula(name, vectorised):
    elbo, formula = build(name, 6 if vectorised else 1, vectorised), ELBOS[name][2]
    guide = perturbed(AutoFlow(eight_schools, flow=small).setup(*data()))
    parameters = list(guide.parameters())

    torch.manual_seed(1)
    noise = torch.randn(elbo.num_particles, 10)
    z, log_weights = by_hand(guide, noise)
    if name == "ReweightedWakeSleep":  # the cross entropy of the weighted draws, which are held fixed
        wanted = -(log_weights.softmax(0).detach() * guide.flow().log_prob(z.detach())).sum()
    else:
        wanted = formula(log_weights)
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)

    torch.manual_seed(1)
    loss = elbo.loss_and_grads(eight_schools, guide, *data())
    if name == "JitTrace":  # the first call ran the model before it traced it
        for parameter in parameters:
            parameter.grad = None
        torch.manual_seed(1)
        loss = elbo.loss_and_grads(eight_schools, guide, *data())
    if name != "TraceTailAdaptive":  # it reports no loss
        assert (loss[0] if isinstance(loss, tuple) else loss) == pytest.approx(formula(log_weights).item(), rel=1e-9)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient if gradient is not None else torch.zeros_like(parameter))


@pytest.mark.parametrize("name", [name for name in ELBOS if name != "TraceTailAdaptive"])
def test_the_exact_posterior_scores_the_evidence(name):
    loss = build(name).loss(linear, exact(), torch.tensor(OBSERVED))
    assert float(loss[0] if isinstance(loss, tuple) else loss) == pytest.approx(-solve()[2], rel=1e-10)


# Known evidences


@pytest.mark.parametrize("affine", ["full_rank", "low_rank", "diagonal"])
@pytest.mark.parametrize("flow", [None, *NAMES])
def test_importance_weights_average_to_the_evidence(flow, affine):
    y, start = torch.tensor(OBSERVED), init_to_value(values={"x": solve()[0]})
    guide = perturbed(AutoFlow(linear, flow, affine, base="student_t", init_loc_fn=start, init_scale=0.7).setup(y))
    log_weights = log_weights_of(guide, linear, y)
    weights = (log_weights - solve()[2]).exp()
    error = weights.std() / len(weights) ** 0.5
    assert error < 0.1 and abs(weights.mean() - 1.0) < 4 * error
    assert log_weights.mean() < solve()[2] + 3 * log_weights.std() / len(weights) ** 0.5


def log_weights_of(guide, model, *args, num_draws=4000):
    """Log weights of fresh draws, as Pyro scores them."""
    with torch.no_grad(), pyro.plate("draws", num_draws, dim=-2):
        drawn = poutine.trace(guide).get_trace(*args)
        scored = poutine.trace(poutine.replay(model, drawn)).get_trace(*args)
    totals = []
    for trace in map(poutine.util.prune_subsample_sites, (scored, drawn)):
        trace.compute_log_prob()
        sites = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
        totals.append(sum(log_prob.reshape(num_draws, -1).sum(-1) for log_prob in sites).detach())
    return totals[0] - totals[1]


def fit(model, guide, elbo, *args, steps, lr):
    train = SVI(model, guide, Adam({"lr": lr}), elbo)
    return [train.step(*args) for _ in range(steps)]


@pytest.mark.parametrize("name", ELBOS)
def test_training_reaches_the_evidence_and_never_beats_it(name):
    y, evidence = torch.tensor(OBSERVED), solve()[2]
    guide = AutoFlow(linear, flow=small, init_loc_fn=init_to_value(values={"x": torch.tensor([1.2, 0.4])}), init_scale=0.3).setup(y)
    start = log_weights_of(guide, linear, y)
    fit(linear, guide, build(name, 24), y, steps=100, lr=0.03)
    end = log_weights_of(guide, linear, y)
    assert start.mean() < evidence - 1.0
    gap, error = evidence - end.mean(), end.std() / len(end) ** 0.5
    assert -4 * error < gap < 0.15


def test_eight_schools_reaches_its_evidence():
    args = (*data(), False)
    start = {"mu": torch.tensor(4.0), "tau": torch.tensor(3.0), "eta": torch.zeros(8)}
    guide = AutoFlow(eight_schools, flow=small, init_scale=0.5, init_loc_fn=init_to_value(values=start)).setup(*args)
    fit(eight_schools, guide, build("Trace", 32), *args, steps=400, lr=0.02)
    log_weights = log_weights_of(guide, eight_schools, *args, num_draws=20_000)
    gap, error = EIGHT_SCHOOLS_EVIDENCE - log_weights.mean(), log_weights.std() / len(log_weights) ** 0.5
    assert -4 * error < gap < 0.3
    assert log_weights.logsumexp(0) - math.log(len(log_weights)) == pytest.approx(EIGHT_SCHOOLS_EVIDENCE, abs=0.05)


def test_one_dimension_learns_a_skewed_posterior():
    def model():
        pyro.sample("x", dist.Gamma(2.0, 1.0))

    guide = AutoFlow(model)
    fit(model, guide, Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0), steps=500, lr=0.01)
    log_weights = log_weights_of(guide, model, num_draws=20_000)
    assert -log_weights.mean() < 0.02  # the best Gaussian of log x is .041 away
    levels = torch.tensor([0.1, 0.5, 0.9])
    truth = dist.Gamma(2.0, 1.0).sample((100_000,)).quantile(levels)
    torch.testing.assert_close(guide.quantiles([0.1, 0.5, 0.9])["x"], truth, rtol=0.1, atol=0)


# Discrete sites, summed out


def mixture(y):
    centre = pyro.sample("centre", N(torch.tensor([-1.0, 1.0]), 2.0).to_event(1))
    wide = pyro.sample("wide", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    with pyro.plate("rows", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
        pyro.sample("y", N(Vindex(centre)[..., k.long()], 1.0 + wide), obs=y)


def mixture_log_joint(centre, y):
    likelihood = [(torch.tensor([0.4, 0.6]).log() + N(centre, s).log_prob(y[:, None])).logsumexp(-1).sum() for s in (1.0, 2.0)]
    prior = N(torch.tensor([-1.0, 1.0]), 2.0).log_prob(centre).sum()
    return prior + torch.logaddexp(likelihood[0] + math.log(0.7), likelihood[1] + math.log(0.3))


def test_enumerated_sites_are_summed_out():
    y = torch.tensor([-2.0, -1.5, 0.3, 1.0, 2.5])
    guide = perturbed(AutoFlow(mixture, flow=small).setup(y))
    assert [s.name for s in guide.sites] == ["centre"]
    elbo = TraceEnum_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(1)
    loss = elbo.loss(mixture, guide, y)
    torch.manual_seed(1)
    z, log_q = guide.flow().rsample_and_log_prob((4,))
    wanted = torch.stack([mixture_log_joint(point, y) for point in z]) - log_q
    assert loss == pytest.approx(-wanted.mean().item(), rel=1e-10)
    losses = fit(mixture, guide, elbo, y, steps=60, lr=0.02)
    assert sum(losses[-10:]) < sum(losses[:10]) - 5.0

    with pytest.raises(SupportError, match="'wide' is discrete"):
        AutoFlow(poutine.infer_config(mixture, lambda site: {"enumerate": "sequential"})).setup(y)
