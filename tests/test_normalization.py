"""ActNorm and BatchNorm in training, where the zoo's battery does not reach: what they take from data, when, and what they never do."""

import copy
import io
import warnings

import pytest
import torch
from torch.func import jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_flows as pf
from pyro_flows import transforms as T
from pyro_flows.errors import ModelError, OptionError

LOC, SCALE = torch.tensor([3.0, -200.0, 0.01]).double(), torch.tensor([0.5, 30.0, 1e-4]).double()
BOTH = pytest.mark.parametrize("make", (T.ActNorm, T.BatchNorm))


def data(*batch, seed=0):
    return LOC + SCALE * torch.randn(*batch, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual, torch.as_tensor(expected).to(actual).expand_as(actual), rtol=tol, atol=tol)


def state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def unchanged(layer, before):
    return all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


# --- both


@BOTH
@pytest.mark.parametrize("batch", ((40,), (5, 8), (2, 5, 4)))
def test_the_first_batch_is_standardised(make, batch):
    layer, y = make(3).double(), data(*batch)
    x, ladj = layer.inverse_and_ladj(y)
    flat = x.flatten(0, -2)
    close(flat.mean(0), 0.0)
    close(flat.var(0, correction=0), 1.0)
    assert ladj.shape == batch
    close(ladj, -y.flatten(0, -2).std(0, correction=0).log().sum())
    alone = make(3).double()
    close(alone.inverse_and_ladj(y.flatten(0, -2))[0], flat)  # the shape of the batch does not matter
    close(layer(x), y)


@BOTH
def test_one_pass_of_log_prob_is_consistent(make):
    """Value and log-det of one question come from one state, memory or not, and the log-det is that of the map."""
    layer, y = make(3).double(), data(30)
    flow = pf.Flow(3, [layer]).double()
    score = flow().log_prob(y)
    x = (y - y.mean(0)) / y.std(0, correction=0)
    close(score, torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1) - y.std(0, correction=0).log().sum())
    for mode in (True, False):
        layer.train(mode)
        x, ladj = layer.inverse_and_ladj(data(30, seed=1))
        jacobian = vmap(jacrev(lambda y: layer.inverse_and_ladj(y)[0]))(data(30, seed=1))
        close(ladj, torch.linalg.slogdet(jacobian)[1])
        back, forward = layer.forward_and_ladj(x)
        close(back, data(30, seed=1))
        close(forward, -ladj)


@BOTH
def test_it_looks_at_no_single_point_nor_an_empty_batch(make):
    layer = make(3).double()
    before = state(layer)
    for batch in ((), (1,), (0,), (3, 0)):
        layer.inverse_and_ladj(data(*batch))
        layer.forward_and_ladj(data(*batch))
    assert unchanged(layer, before)


@BOTH
def test_it_does_not_look_in_evaluation(make):
    layer = make(3).double().eval()
    before = state(layer)
    close(layer.inverse_and_ladj(data(10))[0], data(10))
    assert unchanged(layer, before)


@BOTH
def test_it_does_not_look_under_transforms_and_tracers(make):
    layer, y = make(3).double(), data(10)
    before = state(layer)
    apply = layer.inverse_and_ladj
    vmap(apply)(data(2, 10))
    torch.func.grad(lambda y: apply(y)[0].sum())(y)
    torch.func.jvp(lambda y: apply(y)[0], (y,), (y,))
    graph = make_fx(lambda y: apply(y))(y)
    torch.compiler.reset()
    compiled = torch.compile(apply, fullgraph=True, backend="eager")(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that the trace takes for constants
        layer.requires_grad_(False)
        traced = torch.jit.trace(lambda y: apply(y)[0], y, check_trace=False)
    assert unchanged(layer, before), "it waits for a batch outside"
    for got in (graph(y)[0], compiled[0], traced(y)):
        close(got, y)  # and acts as it stands


@BOTH
def test_data_that_are_not_finite(make):
    layer, y = make(3).double(), data(10)
    y[4, 1], y[7, 0] = float("nan"), float("inf")
    before = state(layer)
    with pytest.raises(ModelError, match=rf"{make.__name__}.*rows \[4, 7\] of the batch"):
        layer.inverse_and_ladj(y)
    with pytest.raises(ModelError, match="rescale"):
        layer.inverse_and_ladj(1e300 * data(10))
    assert unchanged(layer, before)


@BOTH
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_constant_coordinate_is_moved_and_not_scaled(make, dtype):
    y = data(20).to(dtype)
    y[:, 0] = 0.1
    x, ladj = make(3).to(dtype).inverse_and_ladj(y)
    close(x[:, 0], 0.0, 1e-6)
    assert ladj.isfinite().all()
    close(ladj[0], -y[:, 1:].std(0, correction=0).log().sum(), 1e-5)


@BOTH
def test_loading_keeps_what_was_learned(make):
    layer, file = make(3).double(), io.BytesIO()
    layer.inverse_and_ladj(data(50))
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for other in (make(3).double(), copy.deepcopy(layer)):
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert other.training and unchanged(other, state(layer))
        other.eval()
        close(other.inverse_and_ladj(data(50))[0], layer.eval().inverse_and_ladj(data(50))[0], 1e-12)
        layer.train()


# --- ActNorm


def test_actnorm_looks_once():
    layer = T.ActNorm(3).double()
    assert not layer.initialized
    layer.inverse_and_ladj(data(50))
    assert layer.initialized and "initialized" in layer.state_dict()
    before = state(layer)
    layer.inverse_and_ladj(7 * data(50, seed=1))
    layer.forward_and_ladj(7 * data(50, seed=1))
    assert unchanged(layer, before)
    loaded = T.ActNorm(3).double()
    loaded.load_state_dict(before)
    loaded.inverse_and_ladj(7 * data(50, seed=1))
    assert unchanged(loaded, before), "loading does not initialise again"


def test_actnorm_forward_standardises_what_comes_out():
    layer = T.ActNorm(3).double()
    y, ladj = layer.forward_and_ladj(data(5, 10))
    close(y.flatten(0, 1).mean(0), 0.0)
    close(y.flatten(0, 1).std(0, correction=0), 1.0)
    close(ladj, -data(5, 10).flatten(0, 1).std(0, correction=0).log().sum())


def test_actnorm_trains_on():
    layer, y = T.ActNorm(3).double(), data(100)
    flow = pf.Flow(3, [layer]).double()
    optimizer = torch.optim.Adam(flow.parameters(), 0.01)
    start = -flow().log_prob(y).mean()  # the first batch fits a normal exactly ...
    skewed = y.exp().log1p()
    for _ in range(3):
        optimizer.zero_grad()
        (-flow().log_prob(skewed).mean()).backward()
        optimizer.step()
    assert start.isfinite() and not torch.equal(layer.shift, y.mean(0))  # ... and Adam goes on from there


# --- BatchNorm


def test_batch_norm_in_training_is_batch_norm_in_evaluation():
    layer, y = T.BatchNorm(3).double(), data(30)
    layer.inverse_and_ladj(data(30, seed=1))
    trained = layer.train().inverse_and_ladj(y)
    for got, expected in zip(layer.eval().inverse_and_ladj(y), trained, strict=True):
        close(got, expected, 1e-12)
    close(layer(trained[0]), y)


def test_batch_norm_follows_the_running_mean():
    layer, first, second = T.BatchNorm(3, momentum=0.3).double(), data(30), data(4, 5, seed=1)
    layer.inverse_and_ladj(first)
    close(layer.running_mean, first.mean(0))
    layer.inverse_and_ladj(second)
    close(layer.running_mean, 0.7 * first.mean(0) + 0.3 * second.mean((0, 1)))
    close(layer.running_var, 0.7 * first.var(0, correction=0) + 0.3 * second.flatten(0, 1).var(0, correction=0))
    assert layer.batches == 2
    before = state(layer)
    layer.forward_and_ladj(first)
    layer.inv.inverse_and_ladj(first)
    assert unchanged(layer, before), "only data move the statistics, and they come from the other side"


def test_batch_norm_finds_the_population():
    layer = T.BatchNorm(3, momentum=0.02).double()
    for seed in range(300):
        layer.inverse_and_ladj(data(64, seed=seed))
    x = layer.eval().inverse_and_ladj(data(20000, seed=1000))[0]
    close(x.mean(0), 0.0, 0.05)
    close(x.std(0), 1.0, 0.05)


def test_batch_norm_is_the_papers_formula():
    layer, y = T.BatchNorm(3, momentum=1.0).double(), data(40)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([0.3, -0.2, 0.1])), layer.shift.copy_(torch.tensor([1.0, 2.0, -1.0]))
    x, ladj = layer.inverse_and_ladj(y)
    gamma, beta = -layer.log_scale, -layer.shift * (-layer.log_scale).exp()
    mean, var = y.mean(0), y.var(0, correction=0)
    close(x, (y - mean) / var.sqrt() * gamma.exp() + beta)
    close(ladj, (gamma - 0.5 * var.log()).sum())


def test_batch_norm_between_layers_trains():
    """Two graphs are alive while the statistics move; and the flow has at once the scales that Adam alone would take long to reach."""
    torch.manual_seed(0)
    flow = pf.Flow(3, [T.LULinear(3), T.BatchNorm(3), T.TriangularLinear(3), T.BatchNorm(3)]).double()
    optimizer = torch.optim.Adam(flow.parameters(), 0.01)
    for seed in range(100):
        optimizer.zero_grad()
        (-(flow().log_prob(data(64, seed=seed)).mean() + flow().log_prob(data(64, seed=seed + 500)).mean())).backward()
        optimizer.step()
    exact = torch.distributions.Normal(LOC, SCALE).log_prob(data(4000, seed=9999)).sum(-1).mean()
    assert exact - flow.eval()().log_prob(data(4000, seed=9999)).mean() < 0.1


@pytest.mark.parametrize("momentum", (0.0, 1.5, -0.1))
def test_batch_norm_momentum(momentum):
    with pytest.raises(OptionError, match="momentum"):
        T.BatchNorm(3, momentum)
