"""Conditioners: what each output may depend on and does, decoding against naive decoding, and starting at zero."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from pyro_flows.errors import OptionError, ShapeError
from pyro_flows.nets import LWTA, MLP, Hypernetwork, MaskedMLP
from pyro_flows.nets.decoding import decode_in_place
from pyro_flows.transforms import Coupling
from pyro_flows.univariate import Affine

DIMS = (1, 2, 3, 5, 8, 12)
WIDTHS = ((), (1,), (3, 2), (7, 16), (32, 32, 32))  # none, fewer and more than the inputs
P = 2  # outputs for each input


def build(dim: int, widths: tuple[int, ...] = (16, 16), context_dim: int = 0, **options) -> MaskedMLP:
    """A net whose weights are all far from zero: every connection that the masks allow carries something."""
    net = MaskedMLP(dim, P, widths, context_dim, **options).double()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.6 * torch.randn_like(p)
    return net


def inputs(net: MaskedMLP, context_dim: int, *batch: int) -> tuple[Tensor, Tensor | None]:
    context = torch.randn(*batch, context_dim).double() if context_dim else None
    return torch.randn(*batch, net.dim).double(), context


def dependence(net: MaskedMLP, context_dim: int, of: int) -> Tensor:
    """Largest absolute derivative of each input's outputs by the inputs (``of=0``) or by the context (1), over 20 points."""
    jacobian = vmap(jacrev(lambda x, c: net(x, c), of), (0, 0 if context_dim else None))(*inputs(net, context_dim, 20))
    return jacobian.abs().amax((0, 2))


each_size = pytest.mark.parametrize("dim, widths, context_dim", list(product(DIMS, WIDTHS, (0, 3))), ids=str)


each_net = pytest.mark.parametrize(  # residual ones add up where widths are equal
    "dim, widths, context_dim, residual",
    [(*size, residual) for size in product(DIMS, WIDTHS, (0, 3)) for residual in {False, size[1] == (32, 32, 32)}],
    ids=str,
)


@each_net
def test_an_output_sees_earlier_inputs_alone(dim, widths, context_dim, residual):
    seen = dependence(build(dim, widths, context_dim, residual=residual), context_dim, 0)
    assert seen.shape == (dim, dim) and not seen.triu().any()


@pytest.mark.parametrize("context_dim", (0, 3))
@pytest.mark.parametrize("dim", DIMS)
def test_an_output_sees_every_earlier_input(dim, context_dim):
    """Wide enough layers hold a unit of every degree."""
    for widths in ((), (dim,), (2 * dim, dim), (32, 32, 32)):
        seen = dependence(build(dim, widths, context_dim), context_dim, 0)
        assert (seen > 0).equal(torch.ones(dim, dim).tril(-1).bool())


@each_size
def test_every_output_sees_the_context(dim, widths, context_dim):
    if context_dim:
        assert (dependence(build(dim, widths, context_dim), context_dim, 1) > 0).all()


@pytest.mark.parametrize("dim", DIMS)
def test_the_context_reaches_the_first_output_through_hidden_units(dim):
    """Not linearly only: the context's own share of the outputs is taken away."""
    net = build(dim, context_dim=3)
    with torch.no_grad():
        net.context.weight[sum(net.widths) :] = 0
    assert (dependence(net, 3, 1) > 0).all()


@each_net
def test_decoding_is_naive_decoding(dim, widths, context_dim, residual):
    """Against D full passes, each of which fixes one more input; in value and in every gradient."""
    net = build(dim, widths, context_dim, residual=residual)
    z, context = inputs(net, context_dim, 3, 4)
    z.requires_grad_()

    def step(i: int, params: Tensor) -> tuple[Tensor, Tensor]:
        assert params.shape == (12, P)
        return z.reshape(12, dim)[:, i] * torch.tanh(params[..., 0]).exp() + params[..., 1], params.sum(-1)

    found, sums = net.decode(step, z.shape[:-1], context)
    naive = torch.zeros_like(z)
    for i in range(dim):
        column, _ = step(i, net(naive, context)[..., i, :].reshape(12, P))
        naive = torch.cat([naive[..., :i], column.reshape(3, 4, 1), naive[..., i + 1 :]], -1)
    torch.testing.assert_close(found, naive)
    torch.testing.assert_close(sums, net(naive, context).sum(-1))
    for at_once in (False, True):
        with torch.no_grad():
            apply = lambda z, params: (z * torch.tanh(params[..., 0]).exp() + params[..., 1], params.sum(-1))  # noqa: E731
            ours = decode_in_place(net, apply, z.reshape(12, dim), net.terms(context), at_once)
        torch.testing.assert_close(ours, (found.reshape(12, dim), sums.reshape(12, dim)))

    wanted = [z, *net.parameters()]
    for ours, expected in zip(
        torch.autograd.grad((found.sin() + sums).sum(), wanted, allow_unused=True),
        torch.autograd.grad((naive.sin() + net(naive, context).sum(-1)).sum(), wanted, allow_unused=True),
        strict=True,
    ):
        assert expected is None or torch.allclose(torch.zeros_like(expected) if ours is None else ours, expected, atol=1e-12)


class HalfSwish(nn.Module):
    """Has a flag as torch's activations do, but what it writes in place is not all that it does."""

    inplace = False

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * nn.functional.silu(x, self.inplace)


def test_decoding_in_place_with_any_activation():
    net = build(4, (8, 8), activation=HalfSwish)
    x, terms = torch.randn(5, 4).double(), net.terms()
    apply = lambda z, params: (z + params[..., 0], params.sum(-1))  # noqa: E731
    with torch.no_grad():
        for at_once in (False, True):
            found, _ = decode_in_place(net, apply, x, terms, at_once)
            torch.testing.assert_close(found, x + net(found)[..., 0])


def test_decoding_uses_each_weight_once(monkeypatch):
    """The cost of one pass: the multiplications of all steps together are those of the masked matrices."""
    dim, width, products = 12, 48, []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda b, w, x: products.append(w.numel()) or addmm(b, w, x))
    net = build(dim, (width, width))
    net.decode(lambda i, params: params.unbind(-1), torch.Size([5]))
    assert 0 < sum(products) <= sum(layer.weight.numel() for layer in net.layers)


@pytest.mark.parametrize("batch", ((), (0,), (4,), (2, 0), (2, 3)), ids=str)
@pytest.mark.parametrize("context_dim", (0, 2))
def test_shapes(batch, context_dim):
    for dim in (1, 4):
        net = build(dim, (6,), context_dim)
        x, context = inputs(net, context_dim, *batch)
        assert net(x, context).shape == (*batch, dim, P)
        for out in net.decode(lambda i, row: row.unbind(-1), torch.Size(batch), context):
            assert out.shape == (*batch, dim)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: MaskedMLP(4, 3, (8, 8), c),
        lambda c: MLP(4 + c, 12, (8, 8)),
        lambda c: Hypernetwork((4, 3), c),
    ],
    ids=["masked", "mlp", "hypernetwork"],
)
@pytest.mark.parametrize("context_dim", (0, 2))
def test_everything_starts_at_zero_and_moves(make, context_dim):
    net = make(context_dim)
    x, context = torch.randn(5, 4), torch.randn(5, context_dim) if context_dim else None
    given = {MaskedMLP: (x, context), MLP: (torch.randn(5, 4 + context_dim),), Hypernetwork: (context,)}[type(net)]
    out = net(*given)
    assert not out.any()
    out.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in net.parameters())


def test_mlp_and_hypernetwork():
    net = MLP(3, 2, (5,), nn.Tanh)
    nn.init.normal_(net[-1].weight)
    x = torch.randn(4, 3)
    torch.testing.assert_close(net(x), torch.tanh(x @ net[0].weight.T + net[0].bias) @ net[-1].weight.T)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Tanh, nn.Linear]
    hyper = Hypernetwork((2, 3), 4)
    nn.init.normal_(hyper.bias), nn.init.normal_(hyper.linear.weight)
    context = torch.randn(7, 1, 4)
    expected = hyper.bias + torch.einsum("...c,oc->...o", context, hyper.linear.weight).reshape(7, 1, 2, 3)
    torch.testing.assert_close(hyper(context), expected)
    assert hyper(None) is hyper.bias


@pytest.mark.parametrize("activation", (nn.ReLU, nn.Tanh, nn.GELU))
def test_activation_is_used(activation):
    net = build(3, activation=activation)
    assert isinstance(net.activation, activation)
    x, _ = inputs(net, 0, 5)
    found, first = net.decode(lambda i, row: (x[..., i], row[..., 0]), x.shape[:-1])
    torch.testing.assert_close(first, net(x)[..., 0])
    torch.testing.assert_close(found, x)


def test_residual_layers_add_up():
    net = build(3, (6, 6, 4), residual=True)
    (w1, w2, w3, w4), (b1, b2, b3, b4) = net.terms()
    x, _ = inputs(net, 0, 5)
    h = net.activation(x @ w1.T + b1)
    h = net.activation((h + net.activation(h @ w2.T + b2)) @ w3.T + b3)
    torch.testing.assert_close(net(x), (h @ w4.T + b4).unflatten(-1, (P, 3)).mT)


@pytest.mark.parametrize("widths", ((0,), (8, -1), (2.5,)), ids=str)
def test_widths_are_checked(widths):
    for make in (lambda: MLP(2, 2, widths), lambda: MaskedMLP(2, 2, widths)):
        with pytest.raises(OptionError, match="hidden_features"):
            make()


def test_masks_follow_their_module_but_are_not_stored():
    net = build(3)
    assert not [name for name in net.state_dict() if "mask" in name]
    assert net.float()(torch.randn(2, 3)).dtype == torch.float32


def test_lwta_lets_one_unit_of_each_block_through():
    x = torch.randn(500, 12)
    blocks = LWTA(3)(x).unflatten(-1, (4, 3))
    assert bool(((blocks != 0).sum(-1) == 1).all())
    assert torch.equal(blocks.sum(-1), x.unflatten(-1, (4, 3)).amax(-1))
    torch.testing.assert_close(LWTA(3, "expected")(x), (x.view(500, 4, 3).softmax(-1) * x.view(500, 4, 3)).flatten(-2))
    a = torch.tensor([0.5, -0.2, 1.0]).expand(20_000, 3)
    hard = LWTA(3, "sample").eval()(a)
    shares = (hard != 0).float().mean(0)
    torch.testing.assert_close(shares, a[0].softmax(-1), atol=0.015, rtol=0)
    relaxed = LWTA(3, "sample")(a.clone().requires_grad_())
    assert relaxed.requires_grad and bool((relaxed[:, 0] > 0).all())
    cold = LWTA(3, "sample", temperature=1e-3)(a)
    torch.testing.assert_close((cold.abs() > 1e-4).float().mean(0), a[0].softmax(-1), atol=0.02, rtol=0)


def test_lwta_in_conditioners():
    """As a conditioner's activation the largest unit keeps a coupling a bijection; drawn winners do not, which the class says."""
    for winners, exact in (("max", True), ("expected", True), ("sample", False)):
        coupling = Coupling(Affine(), 2, hidden_features=(8,), activation=lambda winners=winners: LWTA(2, winners))
        with torch.no_grad():
            for p in coupling.parameters():
                p += 0.5 * torch.randn_like(p)
            x = torch.randn(50, 2)
            back = coupling.inverse_and_ladj(coupling.forward_and_ladj(x)[0])[0]
        assert torch.allclose(back, x, atol=1e-5) == exact
    with pytest.raises(OptionError, match="mixes units"):
        MaskedMLP(3, 2, activation=lambda: LWTA(2))
    with pytest.raises(ShapeError, match="multiple of units"):
        LWTA(3)(torch.zeros(4))
    for options in ({"units": 1}, {"winners": "min"}, {"temperature": 0.0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            LWTA(**options)
