"""The direction of autoregressive layers that finds coordinates in turn: both methods, and their gradients, against the plain sequence of steps."""

from __future__ import annotations

import copy
import pickle
import shutil
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Instance, perturbed

import pyro_flows as pf
from pyro_flows.distributions import compiled
from pyro_flows.errors import OptionError, ShapeError
from pyro_flows.nets.decoding import decode_in_place
from pyro_flows.transforms import Autoregressive, autoregressive
from pyro_flows.univariate import Affine

CASES = [case for case in ZOO if case.id.startswith("autoregressive") and "1d" not in case.id]
METHODS = {"in turn": 0, "at once": 2**60}  # how many products make a pass large


def gradients(case: Instance, monkeypatch, method: str | None) -> list[Tensor]:
    """Values, gradients and the gradient of their squares; by the plain sequence where no method is named."""
    monkeypatch.setattr(autoregressive, "is_traced", lambda: method is None)
    monkeypatch.setattr(autoregressive, "_LARGE", METHODS.get(method, 0))
    transform, x = perturbed(case), case.points(2, 3).requires_grad_()
    context = case.context(2, 3)
    wanted = [x, *transform.parameters()] + ([] if context is None else [context.requires_grad_()])
    apply = transform.forward_and_ladj if transform.one_pass == "inverse" else transform.inverse_and_ladj

    def loss() -> Tensor:
        value, ladj = apply(x, context)
        return (value.sin() * torch.linspace(1, 2, value.numel()).double().view_as(value)).sum() + ladj.square().sum()

    def gradient(value: Tensor, **options: bool) -> list[Tensor]:
        return list(torch.autograd.grad(value, wanted, materialize_grads=True, **options))

    once, twice = gradient(loss()), gradient(loss(), create_graph=True)
    return [*apply(x, context), *once, *twice, *gradient(sum(g.square().sum() for g in twice))]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_are_those_of_the_steps(case, method, monkeypatch):
    for ours, plain in zip(gradients(case, monkeypatch, method), gradients(case, monkeypatch, None), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dim", (9, 40))
def test_the_gradient_keeps_no_steps(dim):
    """What stays in memory between the passes is the result, not the activations of every step."""
    layer, x = Autoregressive(Affine(), dim, hidden_features=(50, 50)), torch.randn(64, dim)
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        layer.forward_and_ladj(x)
    weights = sum(p.numel() for p in layer.parameters())
    assert sum(saved.values()) < 3 * weights + 5 * x.numel()


@pytest.mark.parametrize("batch", ((0,), (3, 0)), ids=str)
def test_no_points_have_a_gradient(batch):
    layer, x = Autoregressive(Affine(), 4), torch.randn(*batch, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and not layer.net.layers[0].weight.grad.any()


def test_a_sweep_that_overflows_is_followed_by_steps(monkeypatch):
    """At first the third coordinate sees a second one of 1e20, which is 0 once that sees the first."""
    monkeypatch.setattr(autoregressive, "_LARGE", 2**60)
    layer, x = Autoregressive(Affine(), 4, hidden_features=()), torch.tensor([[1.0, 1e20, 3.0, 4.0]])
    with torch.no_grad():
        shift = layer.net.layers[0].weight[4:]
        shift[1, 0], shift[2, 1] = -1e20, 1e20
        assert not decode_in_place(layer.net, Affine().forward, x, layer.net.terms(), at_once=True)[0].isfinite().all()
    assert torch.equal(layer(x), torch.tensor([[1.0, 0.0, 3.0, 4.0]]))


def test_an_activation_that_learns(monkeypatch):
    layer, x = Autoregressive(Affine(), 4, hidden_features=(8, 8), activation=nn.PReLU), torch.randn(5, 4)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    layer.forward_and_ladj(x)[0].sum().backward()
    assert layer.net.activation.weight.grad.abs().sum() > 0


# --- flow.compiled()



def build(recipe, context_dim: int, compile: bool) -> pf.distributions.Flow:
    torch.manual_seed(0)
    flow = recipe(3, context_dim, transforms=2, hidden_features=(8,))
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn_like(p)
    return flow.compiled() if compile else flow


def assert_same_numbers(flow: pf.distributions.Flow, plain: pf.distributions.Flow, context: Tensor | None, tol: float = 1e-4) -> None:
    close = partial(torch.testing.assert_close, rtol=tol, atol=tol)
    torch.manual_seed(1)
    draws = flow(context).rsample_and_log_prob((5,))
    torch.manual_seed(1)
    close(draws, plain(context).rsample_and_log_prob((5,)))
    x = draws[0].detach()
    loss, expected = -flow(context).log_prob(x).mean(), -plain(context).log_prob(x).mean()
    close(loss, expected)
    wanted = list(flow.parameters()), list(plain.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, wanted[0]), torch.autograd.grad(expected, wanted[1]), strict=True):
        close(ours, theirs, rtol=10 * tol)


@pytest.mark.parametrize("recipe, context_dim, directions", [(pf.flows.realnvp, 2, 2), (pf.flows.maf, 0, 1), (pf.flows.iaf, 2, 1)])
def test_compiled_flows_give_the_same_numbers(recipe, context_dim, directions, monkeypatch):
    torch.compiler.reset()
    calls, real = [], partial(torch.compile, backend="eager")
    monkeypatch.setattr(compiled.torch, "compile", lambda f: calls.append(f) or real(f))
    flow, plain = build(recipe, context_dim, True), build(recipe, context_dim, False)
    context = torch.randn(7, context_dim) if context_dim else None
    assert_same_numbers(flow, plain, context)
    assert len(calls) == directions, "each direction once; steps are not compiled"
    assert flow.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        with torch.no_grad():
            x = torch.randn(7, 3)
            torch.testing.assert_close(other(context).log_prob(x), plain(context).log_prob(x), rtol=1e-4, atol=1e-4)
            next(other.parameters()).add_(1.0)
            plain_copy = copy.deepcopy(plain)
            plain_copy.load_state_dict(other.state_dict())
            torch.testing.assert_close(other(context).log_prob(x), plain_copy(context).log_prob(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeError, match="^Compose"):
        flow(context).transforms[0](torch.randn(7, 4))


def test_a_compiled_flow_can_be_traced():
    """What looks on sees the plain operations."""
    flow, plain, x = build(pf.flows.realnvp, 0, True), build(pf.flows.realnvp, 0, False), torch.randn(7, 3)
    torch.testing.assert_close(torch.func.vmap(lambda x: flow().log_prob(x))(x), plain().log_prob(x))


def test_a_compiled_flow_shares_its_parameters():
    plain = pf.flows.cnf(2, augment=1, solver="rk4", steps=2)
    flow = plain.compiled()
    assert type(flow) is type(plain) and flow.transform is plain.transform and flow.encoder is plain.encoder
    assert [id(p) for p in flow.parameters()] == [id(p) for p in plain.parameters()]
    assert plain._compiler is None and flow._compiler is not None
    assert flow.standardized(torch.randn(9, 2))._compiler is not None and plain.standardized(torch.randn(9, 2))._compiler is None
    flow.base = pf.distributions.StudentT(3)
    assert isinstance(plain.base, pf.distributions.Gaussian)
    with pytest.raises(OptionError, match="rk4"):
        pf.Flow(2, [pf.transforms.Affine(2), pf.transforms.ContinuousFlow(2).inv]).compiled()


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_to_machine_code():
    torch.compiler.reset()
    assert_same_numbers(build(pf.flows.nsf, 0, True), build(pf.flows.nsf, 0, False), None)
