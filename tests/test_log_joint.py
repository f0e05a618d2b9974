"""The log joint against densities written by hand, in every mode."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flows import AutoFlow
from pyro_flows.errors import ModelError, OptionError, ShapeError
from pyro_flows.model.log_joint import LogJoint

Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)
N = dist.Normal


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(before)


def build(model, *args, **options):
    guide = AutoFlow(model, flow=None).setup(*args)
    return LogJoint(model, guide, args, **options)


def by_hand(function, z):
    return torch.stack([function(point) for point in z])


def eight_schools(y, sigma):
    mu = pyro.sample("mu", N(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", N(mu, tau))
        pyro.deterministic("effect", theta - mu)
        pyro.sample("y", N(theta, sigma), obs=y)


def eight_schools_by_hand(z):
    mu, tau, theta = z[0], z[1].exp(), z[2:]
    prior = N(0.0, 5.0).log_prob(mu) + dist.HalfCauchy(5.0).log_prob(tau) + N(mu, tau).log_prob(theta).sum()
    return prior + N(theta, SIGMA).log_prob(Y).sum() + z[1]


def test_density_matches_the_formula():
    log_joint = build(eight_schools, Y, SIGMA)
    z = torch.randn(7, 10)
    assert log_joint.mode == "vmap" and log_joint.reason == "" and not log_joint.stochastic
    torch.testing.assert_close(log_joint(z), by_hand(eight_schools_by_hand, z))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3)])
def test_batch_shapes(shape):
    log_joint = build(eight_schools, Y, SIGMA)
    z = torch.randn(*shape, 10)
    value = log_joint(z)
    assert value.shape == shape
    torch.testing.assert_close(value.reshape(-1), by_hand(eight_schools_by_hand, z.reshape(-1, 10)))


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_gradients_match_the_formula(mode):
    log_joint = build(eight_schools, Y, SIGMA, mode=mode)
    z = torch.randn(4, 10)
    wanted = torch.func.grad(lambda z: by_hand(eight_schools_by_hand, z).sum())(z)
    torch.testing.assert_close(torch.func.grad(lambda z: log_joint(z).sum())(z), wanted)
    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(log_joint(leaf).sum(), leaf)[0], wanted)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(log_joint))(z) if mode == "vmap" else wanted, wanted)


def test_make_fx_captures_value_and_gradient():
    log_joint = build(eight_schools, Y, SIGMA)
    step = torch.func.grad_and_value(lambda z: log_joint(z).sum())
    graph = make_fx(step)(torch.randn(6, 10))
    z = torch.randn(6, 10)
    torch.testing.assert_close(graph(z), step(z), rtol=1e-12, atol=1e-12)


def test_chunks_change_nothing():
    z = torch.randn(23, 10)
    whole, chunked = build(eight_schools, Y, SIGMA), build(eight_schools, Y, SIGMA, max_elements=300)
    assert 1 <= chunked._chunk < 23 < whole._chunk
    torch.testing.assert_close(chunked(z), whole(z))
    for name in ("deterministics", "log_likelihood"):
        for key, value in getattr(whole, name)(z).items():
            torch.testing.assert_close(getattr(chunked, name)(z)[key], value)


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_deterministics_and_log_likelihood(mode):
    log_joint = build(eight_schools, Y, SIGMA, mode=mode)
    z = torch.randn(5, 10)
    values = log_joint.deterministics(z)
    assert list(values) == ["effect"]
    torch.testing.assert_close(values["effect"], z[:, 2:] - z[:, :1])
    likelihood = log_joint.log_likelihood(z)
    assert list(likelihood) == ["y"]
    torch.testing.assert_close(likelihood["y"], N(z[:, 2:], SIGMA).log_prob(Y))


def test_scale_and_mask_count_as_in_pyro():
    mask = torch.arange(8) < 5

    def model(y):
        mu = pyro.sample("mu", N(0.0, 5.0))
        with pyro.plate("rows", 8), poutine.scale(scale=3.0), poutine.mask(mask=mask):
            pyro.sample("y", N(mu, 1.0), obs=y)

    log_joint = build(model, Y)
    z = torch.randn(4, 1)
    each = N(z, 1.0).log_prob(Y)
    torch.testing.assert_close(log_joint(z), N(0.0, 5.0).log_prob(z[:, 0]) + 3 * each[:, :5].sum(-1))
    torch.testing.assert_close(log_joint.log_likelihood(z)["y"], torch.where(mask, each, torch.zeros(())))


@pytest.mark.parametrize("wrap", (lambda fn: fn, lambda fn: fn.mask(torch.tensor([True, False])), lambda fn: fn.mask(True).to_event(1)))
def test_multinomials_need_no_loop(wrap):
    """torch's own density picks entries by a mask, for counts of what is impossible."""
    counts = torch.tensor([[3.0, 2, 0], [0, 5, 0]])

    def fn(x):
        return wrap(dist.Multinomial(5, logits=torch.stack([x, x.square(), torch.full_like(x, -torch.inf)])).expand([2]))

    def model(y):
        x = pyro.sample("x", N(0.0, 1.0))
        pyro.sample("y", fn(x), obs=y)

    log_joint = build(model, counts)
    assert log_joint.mode == "vmap"
    z = torch.randn(4, 1, requires_grad=True)
    truth = by_hand(lambda point: N(0.0, 1.0).log_prob(point[0]) + fn(point[0]).log_prob(counts).sum(), z)
    torch.testing.assert_close(log_joint(z), truth)
    gradient, expected = (torch.autograd.grad(value.sum(), z)[0] for value in (log_joint(z), truth))
    torch.testing.assert_close(gradient, expected)


def test_a_branch_on_a_latent_value_is_looped_over():
    def model(y):
        mu = pyro.sample("mu", N(0.0, 5.0))
        pyro.sample("y", N(mu if mu > 0 else 2 * mu, 1.0).to_event(0), obs=y)

    log_joint = build(model, Y[1])
    assert log_joint.mode == "loop" and "control flow" in log_joint.reason and not log_joint.stochastic
    z = torch.tensor([[-1.5], [2.5]])
    truth = N(0.0, 5.0).log_prob(z[:, 0]) + N(torch.tensor([-3.0, 2.5]), 1.0).log_prob(Y[1])
    torch.testing.assert_close(log_joint(z), truth)


def test_item_is_looped_over():
    def model(y):
        mu = pyro.sample("mu", N(0.0, 5.0))
        pyro.sample("y", N(mu, 1.0 + abs(mu.detach().item())), obs=y)

    log_joint = build(model, Y[1])
    assert log_joint.mode == "loop" and ".item()" in log_joint.reason


def test_a_model_that_vmap_gets_wrong_is_looped_over():
    class Cached:  # keeps the first value it sees under vmap: no error, a wrong number
        def __call__(self, y):
            mu = pyro.sample("mu", N(0.0, 5.0))
            batched = torch._C._functorch.is_batchedtensor(mu)
            pyro.sample("y", N(mu * (2.0 if batched else 1.0), 1.0), obs=y)

    log_joint = build(Cached(), Y[1])
    assert log_joint.mode == "loop" and "another value" in log_joint.reason


def test_subsampled_plate_is_stochastic_and_unbiased():
    def model(y):
        mu = pyro.sample("mu", N(0.0, 5.0))
        with pyro.plate("rows", 8, subsample_size=3) as rows:
            pyro.sample("y", N(mu, 10.0), obs=y[rows])

    log_joint = build(model, Y)
    assert log_joint.stochastic and log_joint.mode == "loop" and "'rows'" in log_joint.reason
    z = torch.full((4000, 1), 1.0)
    values = log_joint(z)
    truth = N(0.0, 5.0).log_prob(torch.tensor(1.0)) + N(1.0, 10.0).log_prob(Y).sum()
    assert values.std() > 0.1
    assert abs(values.mean() - truth) < 5 * values.std() / 4000**0.5


def test_a_draw_that_nothing_conditions_is_stochastic():
    def noisy(y):
        mu = pyro.sample("mu", N(0.0, 5.0))
        pyro.sample("y", N(mu + torch.randn(()), 1.0), obs=y)

    def blocked(y):
        mu = pyro.sample("mu", N(0.0, 5.0))
        extra = pyro.sample("extra", N(0.0, 1.0))
        pyro.sample("y", N(mu + extra, 1.0), obs=y)

    assert build(noisy, Y[0]).stochastic
    guide = AutoFlow(poutine.block(blocked, hide=["extra"]), flow=None).setup(Y[0])
    log_joint = LogJoint(blocked, guide, (Y[0],))
    assert log_joint.stochastic and "'extra'" in log_joint.reason


def mixture(y):
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    with pyro.plate("parts", 2):
        loc = pyro.sample("loc", N(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        part = pyro.sample("part", dist.Bernoulli(weight), infer={"enumerate": "parallel"}).long()
        pyro.deterministic("own", loc[part])
        pyro.sample("y", N(loc[part], 1.0), obs=y)
    pyro.deterministic("gap", loc[1] - loc[0])
    pyro.sample("total", N(loc.sum(), 1.0), obs=torch.tensor(3.0))


def mixture_by_hand(z):
    w, loc = torch.sigmoid(z[0]), z[1:]
    each = torch.logaddexp((1 - w).log() + N(loc[0], 1.0).log_prob(Y), w.log() + N(loc[1], 1.0).log_prob(Y))
    prior = dist.Beta(2.0, 2.0).log_prob(w) + (w * (1 - w)).log() + N(0.0, 10.0).log_prob(loc).sum()
    return prior + each.sum() + N(loc.sum(), 1.0).log_prob(torch.tensor(3.0))


def test_enumerated_mixture():
    log_joint = build(mixture, Y)
    assert log_joint.mode == "vmap" and log_joint.enumerated == ("part",)
    z = torch.randn(5, 3)
    torch.testing.assert_close(log_joint(z), by_hand(mixture_by_hand, z))
    wanted = torch.func.grad(lambda z: by_hand(mixture_by_hand, z).sum())(z)
    torch.testing.assert_close(torch.func.grad(lambda z: log_joint(z).sum())(z), wanted)
    torch.testing.assert_close(make_fx(lambda z: log_joint(z))(z)(z + 1), log_joint(z + 1))
    # What depends on a discrete latent has no one value, and is left out.
    assert list(log_joint.deterministics(z)) == ["gap"]
    assert list(log_joint.log_likelihood(z)) == ["total"]


TRANSITION = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


@config_enumerate
def markov_chain(y):
    with pyro.plate("states", 2):
        loc = pyro.sample("loc", N(0.0, 10.0))
    state = 0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Categorical(TRANSITION.to(y)[state]))
        pyro.sample(f"y_{t}", N(loc[state], 3.0), obs=y[t])


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_enumerated_markov_chain_matches_the_forward_algorithm(mode):
    def forward(z):
        alpha = TRANSITION.to(Y)[0].log()
        for t, y in enumerate(Y):
            alpha = alpha + N(z, 3.0).log_prob(y)
            if t < len(Y) - 1:
                alpha = torch.logsumexp(alpha[:, None] + TRANSITION.to(Y).log(), 0)
        return torch.logsumexp(alpha, 0) + N(0.0, 10.0).log_prob(z).sum()

    log_joint = build(markov_chain, Y, mode=mode)
    assert log_joint.mode == mode and len(log_joint.enumerated) == 8
    z = 5 * torch.randn(6, 2)
    torch.testing.assert_close(log_joint(z), by_hand(forward, z))


def test_impossible_enumerated_values_have_finite_gradients():
    def model(y):
        shift = pyro.sample("shift", N(0.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5, 0.0])), infer={"enumerate": "parallel"})
        pyro.sample("y", N(shift + k.to(y), 1.0), obs=y)

    log_joint = build(model, Y[3])
    z = torch.zeros(1, 1)
    gradient = torch.func.grad(lambda z: log_joint(z).sum())(z)
    terms = torch.stack([N(torch.tensor(float(k)), 1.0).log_prob(Y[3]) - math.log(2) for k in (0, 1)])
    wanted = (torch.softmax(terms, 0) * torch.stack([Y[3], Y[3] - 1])).sum()
    torch.testing.assert_close(gradient[0, 0], wanted)


def test_flat_priors_factors_and_reparameterised_sites():
    def model(y):
        a = pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with poutine.reparam(config={"c": LocScaleReparam(0.0)}):
            c = pyro.sample("c", N(a, b))
        pyro.factor("extra", -(c**2))
        pyro.sample("y", N(c, 1.0), obs=y)

    log_joint = build(model, Y[3])
    names = [site.name for site in log_joint.guide.sites]
    assert names == ["a", "b", "c_decentered"]
    z = torch.randn(4, 3)
    a, b, raw = z[:, 0], z[:, 1].exp(), z[:, 2]
    c = a + b * raw
    wanted = z[:, 1] + N(0.0, 1.0).log_prob(raw) - c**2 + N(c, 1.0).log_prob(Y[3])
    torch.testing.assert_close(log_joint(z), wanted)
    torch.testing.assert_close(log_joint.deterministics(z), {"c": c})
    assert list(log_joint.log_likelihood(z)) == ["y"]


def test_validation_is_restored_also_after_an_error():
    calls = []

    def model(y):
        mu = pyro.sample("mu", N(0.0, 5.0))
        calls.append(pyro.distributions.is_validation_enabled())
        if len(calls) > 40:
            raise RuntimeError("broken")
        pyro.sample("y", N(mu, 1.0), obs=y)

    pyro.enable_validation(True)
    log_joint = build(model, Y[0])
    log_joint(torch.zeros(2, 1))
    assert not calls[-1]
    assert dist.is_validation_enabled() and torch.distributions.Distribution._validate_args
    calls.extend([True] * 50)
    with pytest.raises(RuntimeError, match="broken"):
        log_joint(torch.zeros(2, 1))
    assert dist.is_validation_enabled() and torch.distributions.Distribution._validate_args
    with pytest.raises(ValueError):
        N(0.0, -1.0)


def test_the_random_stream_and_surrounding_handlers_are_left_alone():
    guide = AutoFlow(eight_schools, flow=None).setup(Y, SIGMA)
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    with poutine.trace() as outer:
        log_joint = LogJoint(eight_schools, guide, (Y, SIGMA))
        log_joint(torch.zeros(2, 10))
    torch.testing.assert_close(torch.rand(3), wanted)
    assert not [name for name in outer.trace.nodes if name in ("mu", "tau", "theta", "y")]


def test_kwargs_and_float32():
    torch.set_default_dtype(torch.float32)
    guide = AutoFlow(eight_schools, flow=None).setup(y=Y.float(), sigma=SIGMA.float())
    log_joint = LogJoint(eight_schools, guide, kwargs={"y": Y.float(), "sigma": SIGMA.float()})
    z = torch.randn(3, 10)
    value = log_joint(z)
    assert log_joint.mode == "vmap" and value.dtype == torch.float32
    torch.testing.assert_close(value.double(), by_hand(eight_schools_by_hand, z.double()), rtol=1e-5, atol=1e-4)


def test_bad_input():
    log_joint = build(eight_schools, Y, SIGMA)
    with pytest.raises(ShapeError, match=r"\(\*batch, 10\)"):
        log_joint(torch.zeros(3, 9))
    with pytest.raises(ShapeError):
        log_joint.log_likelihood(torch.zeros(()))
    with pytest.raises(OptionError, match="mode"):
        build(eight_schools, Y, SIGMA, mode="fast")
    guide = AutoFlow(eight_schools, flow=None).setup(Y, SIGMA)
    with pytest.raises(ModelError, match="size of tensor"):
        LogJoint(eight_schools, guide, (Y[:3], SIGMA))
