"""Points that are no vectors: transforms of images keep the same contract, in every wrapper, in torch, and in Pyro."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.diagnostics import check_invertibility
from pyro_flows.errors import DtypeError, ShapeError
from pyro_flows.transforms import Affine, Compose, FlowTransform

SHAPE = (2, 3, 4)


class Pixels(FlowTransform):
    """``y = exp(s) x + t`` with a log scale and a shift of each pixel, and a shift that a context decides."""

    def __init__(self, shape: tuple[int, ...], context_dim: int = 0) -> None:
        super().__init__(shape, context_dim)
        self.log_scale, self.shift = nn.Parameter(0.3 * torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.net = nn.Linear(context_dim, self.dim) if context_dim else None

    def _offset(self, context: Tensor | None) -> Tensor:
        return self.shift if self.net is None else self.shift + self.net(context).unflatten(-1, self.event_shape)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp() + self._offset(context), self.log_scale.sum().expand(x.shape[:-3])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y - self._offset(context)) * (-self.log_scale).exp(), -self.log_scale.sum().expand(y.shape[:-3])


class Channels(FlowTransform):
    """A 1x1 convolution: one matrix for the channels of every pixel."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.weight = nn.Parameter(torch.eye(shape[0]) + 0.2 * torch.randn(shape[0], shape[0]))

    def _mixed(self, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        pixels = self.dim // self.event_shape[0]
        ladj = pixels * torch.linalg.slogdet(matrix)[1]
        return torch.einsum("ij,...jhw->...ihw", matrix, x), ladj.expand(x.shape[:-3])

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mixed(x, self.weight)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mixed(y, torch.linalg.inv(self.weight))


class Noise(nn.Module):
    """The standard normal base of images."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = torch.Size(shape)
        self.register_buffer("zero", torch.zeros(shape, dtype=torch.float64))

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Normal(self.zero, 1.0).to_event(len(self.event_shape))


def images(*batch: int) -> Tensor:
    return torch.randn(*batch, *SHAPE, dtype=torch.float64)


def stack(context_dim: int = 0) -> Compose:
    torch.manual_seed(0)
    return Compose([Pixels(SHAPE), Channels(SHAPE), Compose([Pixels(SHAPE, context_dim), Channels(SHAPE)]).inv]).double()


def jacobian_log_det(f, x: Tensor) -> Tensor:
    flat = torch.func.jacrev(lambda x: f(x.unflatten(-1, SHAPE)).flatten(-3))
    return torch.stack([torch.linalg.slogdet(flat(row.flatten()))[1] for row in x])


@pytest.mark.parametrize("make", (lambda: Pixels(SHAPE), lambda: Channels(SHAPE), stack, lambda: stack().inv))
def test_the_contract(make):
    transform, x = make().double(), images(5)
    assert transform.event_shape == SHAPE and transform.dim == 24 and transform.domain.event_dim == transform.codomain.event_dim == 3
    y, ladj = transform.forward_and_ladj(x)
    assert y.shape == x.shape and ladj.shape == (5,)
    torch.testing.assert_close(ladj, jacobian_log_det(lambda x: transform.forward_and_ladj(x)[0], x))
    back, inverse_ladj = transform.inverse_and_ladj(y)
    torch.testing.assert_close(back, x), torch.testing.assert_close(inverse_ladj, -ladj)
    y = transform(x)  # torch's interface, with its memory
    assert transform.inv(y) is x and transform.inv.inv is transform
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), ladj)
    assert transform.forward_shape((7, *SHAPE)) == transform.inverse_shape((7, *SHAPE)) == (7, *SHAPE)
    for other in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        assert torch.equal(other(x), y) and other.event_shape == SHAPE
    stock = torch.distributions.ComposeTransform([transform, torch.distributions.ExpTransform()])
    assert stock.domain.event_dim == 3 and stock.log_abs_det_jacobian(x, stock(x)).shape == (5,)
    assert "event_shape=(2, 3, 4)" in repr(transform)


def test_layers():
    layers = stack().layers
    assert [type(layer).__name__ for layer in layers] == ["Pixels", "Channels", "Inverse", "Inverse"]
    assert [layer.event_shape for layer in layers] == [torch.Size(SHAPE)] * 4
    x, transform = images(2), stack()
    y = x
    for layer in transform.layers:
        y = layer(y)
    torch.testing.assert_close(y, transform(x))


@pytest.mark.parametrize("context_dim", (0, 2))
def test_in_a_flow(context_dim):
    flow = pf.Flow(Noise(SHAPE), stack(context_dim))
    args = (torch.randn(5, 2, dtype=torch.float64),) if context_dim else ()
    d, batch = flow(*args), (5,) if context_dim else ()
    assert flow.event_shape == d.event_shape == SHAPE and flow.dim == 24 and d.batch_shape == batch and "event_shape=(2, 3, 4)" in repr(flow)
    assert d.support.event_dim == 3 and constraints.independent(constraints.real, 3).check(d.sample()).shape == batch
    x, log_prob = d.rsample_and_log_prob((7,))
    assert x.shape == (7, *batch, *SHAPE) and log_prob.shape == (7, *batch)
    z, ladj = flow.transform.inverse_and_ladj(x, *args)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum((-3, -2, -1)) + ladj
    drawn = d.rsample((7,))
    torch.testing.assert_close(d.log_prob(x.detach()), expected), torch.testing.assert_close(log_prob, expected)
    torch.testing.assert_close(d.log_prob(drawn), d.log_prob(drawn.detach()))
    wide = d.expand((6, *batch))
    assert wide.sample((2,)).shape == (2, 6, *batch, *SHAPE) and wide.log_prob(x[:1]).shape == (6, *batch)
    assert d.expand((6, *batch)).to_event(1).event_shape == ((6, *batch)[-1:] + SHAPE)


def test_in_a_plate():
    flow = pf.Flow(Noise(SHAPE), stack(2))
    context = torch.randn(4, 2, dtype=torch.float64)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("outer", 3, dim=-2), pyro.plate("rows", 4, dim=-1):
            return pyro.sample("x", flow(context))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    assert x.shape == (3, 4, *SHAPE) and trace.nodes["x"]["log_prob"].shape == (3, 4)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], flow(context).log_prob(x.clone()))


def test_a_context_decides_the_batch():
    transform = Pixels(SHAPE, 2).double()
    context = torch.randn(5, 2, dtype=torch.float64)
    bound = transform.condition(context)
    assert bound.forward_shape(torch.Size((3, 1, *SHAPE))) == (3, 5, *SHAPE) and bound(images(3, 1)).shape == (3, 5, *SHAPE)
    assert transform.forward_and_ladj(images(), context)[1].shape == (5,)


def test_errors():
    transform, x = Pixels(SHAPE).double(), images(5)
    for call, error, says in (
        (lambda: transform(images(5)[..., :3]), ShapeError, r"\(\*batch, 2, 3, 4\)"),
        (lambda: transform(x.flatten(-3)), ShapeError, "Pixels expects points"),
        (lambda: transform(torch.zeros(4, dtype=torch.float64)), ShapeError, "Pixels expects points"),
        (lambda: transform(x.float()), DtypeError, "Pixels has parameters"),
        (lambda: stack()(x.flatten(-3)), ShapeError, "^Compose expects points"),
        (lambda: Compose([Pixels(SHAPE), Pixels((3, 2, 4))]), ShapeError, "different shapes"),
        (lambda: Compose([Pixels(SHAPE), Affine(24)]), ShapeError, "different shapes"),
        (lambda: Pixels((2, 0, 4)), ShapeError, "positive integer"),
        (lambda: Pixels(()), ShapeError, "positive integer"),
        (lambda: pf.Flow(24, Pixels(SHAPE)), ShapeError, "Flow: the base has points of shape"),
        (lambda: pf.Flow(Noise((3, 2, 4)), Pixels(SHAPE)), ShapeError, "Flow: the base has points of shape"),
        (lambda: pf.Flow(Noise(SHAPE), Pixels(SHAPE)).standardized(x), ShapeError, "standardized"),
        (lambda: check_invertibility(transform, x), ShapeError, "only vectors"),
    ):
        with pytest.raises(error, match=says):
            call()
