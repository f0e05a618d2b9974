"""Linear layers against dense linear algebra: the matrix written out, its determinant, and the structure that each one promises."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.func import jacrev
from zoo import ZOO, perturbed

from pyro_flows import transforms as T
from pyro_flows.errors import DtypeError, OptionError, ShapeError

LINEAR = [pytest.param(case, id=case.id) for case in ZOO if isinstance(case.make(), T.Linear) and not case.context_dim]
CONDITIONAL = [pytest.param(case, id=case.id) for case in ZOO if isinstance(case.make(), T.Linear) and case.context_dim]


def close(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def spread(layer, seed=0):
    """The layer with standard normal parameters, in float64."""
    generator = torch.Generator().manual_seed(seed)
    layer.double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


@pytest.mark.parametrize("case", LINEAR)
def test_the_matrix_is_the_map(case):
    layer, x = perturbed(case), case.points(4, 2)
    layer(x)  # a new ActNorm takes its parameters from here
    weight, shift = layer.weight(), layer(torch.zeros(case.dim).double())
    assert weight.shape == (case.dim, case.dim) and layer.logabsdet().shape == ()
    close(weight.double(), jacrev(layer)(x[0, 0]))  # a permutation has no dtype of its own
    close(layer(x), x @ weight.double().mT + shift)
    close(layer.logabsdet().double(), torch.linalg.slogdet(weight.double())[1])
    close(layer.solve(x), torch.linalg.solve(weight.double(), x.unsqueeze(-1)).squeeze(-1))
    close(layer.solve(x[0, 0]), layer.solve(x)[0, 0])


@pytest.mark.parametrize("case", LINEAR)
def test_solve_checks_what_it_is_given(case):
    layer, x = perturbed(case), case.points(3)
    with pytest.raises(ShapeError, match=type(layer).__name__):
        layer.solve(x[..., :-1])
    with pytest.raises(DtypeError):
        layer.solve(x.long())


@pytest.mark.parametrize("case", CONDITIONAL)
@pytest.mark.parametrize("batch, context_batch", [((6,), ()), ((6,), (1,)), ((5, 6), (6,)), ((5, 6), (5, 1)), ((), (6,)), ((0,), (0,))], ids=str)
def test_the_matrix_at_a_context_is_the_map(case, batch, context_batch):
    """One matrix a context, whatever the number of points it serves."""
    layer, x, context = perturbed(case), case.points(*batch), case.context(*context_batch)
    weight, (y, ladj) = layer.weight(context), layer.forward_and_ladj(x, context)
    assert weight.shape == (*context_batch, case.dim, case.dim) and layer.logabsdet(context).shape == context_batch
    for index in np.ndindex(context_batch):
        jacobian = jacrev(lambda x, c=context[index]: layer.forward_and_ladj(x, c)[0])(torch.zeros(case.dim).double())
        close(weight[index], jacobian)
    offset = layer.forward_and_ladj(0 * x, context)[0]
    close(y - offset, (weight @ x.unsqueeze(-1)).squeeze(-1))
    close(ladj, torch.linalg.slogdet(weight)[1].expand(ladj.shape))
    close(layer.logabsdet(context), torch.linalg.slogdet(weight)[1])
    close(layer.solve(y - offset, context), x.expand(y.shape))
    for asked in (layer.weight, layer.logabsdet, lambda: layer.solve(x)):
        with pytest.raises(ShapeError, match="context"):
            asked()
    with pytest.raises(ShapeError, match="context"):
        layer.weight(torch.zeros(3).double())


def test_a_context_has_one_matrix(monkeypatch):
    """A thousand points in three contexts need three matrices, in one context one."""
    layer, made = T.LULinear(4, context_dim=2), []
    monkeypatch.setattr(layer, "_matrix", lambda at: made.append(T.LULinear._matrix(layer, at)) or made[-1])
    for whole in (layer, T.Compose([T.Affine(4), layer]), layer.inv.inv):
        for contexts in (torch.randn(3, 2), torch.randn(1, 2), torch.randn(2), torch.randn(1000, 1, 2)):
            x = torch.randn(1000, 3, 4)
            y, ladj = whole.forward_and_ladj(x, contexts)
            close(y, layer.forward_and_ladj(x, contexts.expand(1000, 3, 2).contiguous())[0], 1e-5)
            assert [m.shape for m in made] == [(*contexts.shape[:-1], 4, 4) if contexts.numel() > 2 else (4, 4), (1000, 3, 4, 4)]
            made.clear()


def test_nothing_is_stale():
    """The three methods follow the parameters, without anything to clear."""
    for case in (p.values[0] for p in LINEAR):
        layer, x = perturbed(case), case.points(3)
        layer(x)
        before = layer.weight(), layer.solve(x)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.1 * torch.linspace(1, 2, p.numel()).view_as(p))
        if any(p.numel() for name, p in layer.named_parameters() if name != "shift" and f"gradient:{name}" not in case.exceptions):
            assert not torch.equal(layer.weight(), before[0]) and not torch.equal(layer.solve(x), before[1]), case.id


# --- structure


@pytest.mark.parametrize("reflections", (2, 4, 6, 10))
def test_householder_product_is_the_reflections_one_by_one(reflections):
    layer = spread(T.OrthogonalLinear(6, reflections))
    product = torch.eye(6).double()
    for v in layer.vectors:
        product = product @ (torch.eye(6) - 2 * torch.outer(v, v) / (v @ v))
    close(layer.weight(), product, 1e-12)


@pytest.mark.parametrize("dim", (1, 2, 3, 64, 257))
def test_orthogonal_in_float32(dim):
    for layer in (fresh_orthogonal(dim), spread(T.OrthogonalLinear(dim)).float()):
        q = layer.weight()
        assert (q @ q.mT - torch.eye(dim)).abs().max() < 1e-5
        assert abs(torch.linalg.det(q.double()) - 1) < 1e-4


def fresh_orthogonal(dim):
    torch.manual_seed(dim)
    return T.OrthogonalLinear(dim)


def test_orthogonal_without_a_normal():
    """A zero vector has no direction: its reflection is left out, and nothing divides by zero."""
    layer = T.OrthogonalLinear(3)
    layer.vectors.data.zero_()
    assert torch.equal(layer.weight(), torch.eye(3))
    layer(torch.ones(3)).sum().backward()
    assert layer.vectors.grad.isfinite().all()


def test_orthogonal_reaches_a_given_rotation():
    """A learned permutation: from a random order, by least squares, to another one of the same parity."""
    start, goal = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([3, 4, 0, 1, 2])
    layer = T.Compose([T.Permutation(start), T.OrthogonalLinear(5)])
    x = torch.randn(200, 5)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(250):
        optimizer.zero_grad()
        (layer(x) - x[:, goal]).square().mean().backward()
        optimizer.step()
    close(layer(torch.eye(5)).mT.detach(), torch.eye(5)[goal], 2e-3)


def test_qr_factors():
    layer = spread(T.QRLinear(5))
    q, r = torch.linalg.qr(layer.weight())
    sign = r.diagonal().sign()
    close(sign[:, None] * r, layer._factor(layer))
    close(q * sign @ (q * sign).mT, torch.eye(5).double())
    assert torch.linalg.det(q * sign) > 0


def test_block_diagonal():
    layer = spread(T.BlockDiagonalLinear(6, 2))
    weight, blocks = layer.weight(), torch.arange(6) // 2
    apart = blocks[:, None] != blocks
    assert not weight[apart].any() and weight[~apart].all()
    for b in range(3):
        lower, upper = layer.lower[b].tril(-1) + torch.eye(2), layer.log_diag[b].exp().diag() @ (layer.upper[b].triu(1) + torch.eye(2))
        close(weight[2 * b : 2 * b + 2, 2 * b : 2 * b + 2], lower @ upper)


@pytest.mark.parametrize("dim", (1, 2, 3, 6, 7))
def test_circulant(dim):
    layer, x = spread(T.CirculantLinear(dim)), torch.randn(4, dim).double()
    assert sum(p.numel() for name, p in layer.named_parameters() if name != "shift") == dim
    weight, taps = layer.weight(), layer.weight()[:, 0]
    for j in range(dim):
        close(weight[:, j], taps.roll(j))
    convolved = torch.stack([sum(taps[(i - j) % dim] * x[:, j] for j in range(dim)) for i in range(dim)], -1)
    close(layer(x) - layer.shift, convolved)
    spectrum = torch.linalg.svdvals(weight)
    close(spectrum[0] / spectrum[-1], (layer.log_gain.max() - layer.log_gain.min()).exp())


def test_low_rank():
    layer = spread(T.LowRankLinear(7, 2))
    update = layer.weight() / layer.log_scale.exp()[:, None] - torch.eye(7)
    assert torch.linalg.matrix_rank(update, rtol=1e-9) == 2


def test_random_permutation():
    order = T.Permutation.random(50, torch.Generator().manual_seed(3)).order
    assert torch.equal(order.sort().values, torch.arange(50)) and not torch.equal(order, torch.arange(50))
    assert torch.equal(order, T.Permutation.random(50, torch.Generator().manual_seed(3)).order)
    torch.manual_seed(0)
    assert not torch.equal(T.Permutation.random(50).order, T.Permutation.random(50).order)


# --- options


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: T.OrthogonalLinear(4, 3), "reflections must be an even number"),
        (lambda: T.QRLinear(4, -2), "reflections must be an even number"),
        (lambda: T.OrthogonalLinear(4, 2.0), "reflections must be an even number"),
        (lambda: T.BlockDiagonalLinear(6, 4), "block_size must divide dim=6"),
        (lambda: T.BlockDiagonalLinear(6, 0), "block_size must divide dim=6"),
        (lambda: T.LowRankLinear(3, 4), "rank must lie between"),
        (lambda: T.Permutation(torch.tensor([0, 0, 1])), "Permutation: order must hold each"),
        (lambda: T.LULinear(3, torch.tensor([0, 1])), "LULinear: permutation must hold each"),
    ],
)
def test_options(make, says):
    with pytest.raises((OptionError, ShapeError), match=says):
        make()


# --- numbers


def test_a_solve_loses_no_more_than_the_condition_number():
    """A float32 round trip at condition number 1e4 stays within a small multiple of eps times that."""
    layers = (T.TriangularLinear, T.LULinear, T.QRLinear, partial(T.BlockDiagonalLinear, block_size=8), T.CirculantLinear, T.LowRankLinear)
    for make in layers:
        torch.manual_seed(1)
        layer = make(32)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                if name in ("log_diag", "log_gain", "log_stretch"):
                    p.copy_(torch.linspace(0, 4, p.numel()).mul(torch.tensor(10.0).log()).view_as(p)[..., torch.randperm(p.shape[-1])])
        x = torch.randn(100, 32)
        error = (layer.inv(layer(x).clone()) - x).abs().max()
        assert error < 20 * torch.finfo(torch.float32).eps * torch.linalg.cond(layer.weight().double()), type(layer).__name__
