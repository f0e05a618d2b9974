"""Planar, radial, Sylvester and block autoregressive maps: what other libraries get wrong, and what the battery does not ask."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacrev, vmap
from zoo import ZOO, Instance, perturbed

from pyro_flows import transforms as T
from pyro_flows.transforms.planar import MIN_SLOPE

BASES = ("orthogonal", "householder", "triangular")
TWO = {
    "planar": partial(T.Planar, 2),
    "planar-leaky": partial(T.Planar, 2, activation="leaky_relu"),
    "radial": partial(T.Radial, 2),
    **{f"sylvester-{basis}": partial(T.Sylvester, 2, basis=basis) for basis in BASES},
    "bnaf": partial(T.BlockAutoregressive, 2, (3, 3)),
}
FAMILY = [case for case in ZOO if isinstance(case.make(), T.Planar | T.Radial | T.Sylvester | T.BlockAutoregressive)]


def close(actual, expected, tol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def log_det(f, x):
    return torch.linalg.slogdet(vmap(jacrev(f))(x))[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", FAMILY, ids=lambda case: case.id)
def test_far_from_where_they_start(case, seed):
    """Pyro's Sylvester multiplies rows by S Q' where its determinant wants Q S', unseen at its small initial values."""
    wide = Instance("", case.make, case.dim, case.context_dim, param_scale=0.7)
    transform, x, context = perturbed(wide, seed=seed), 2 * case.points(50), case.context()
    y, ladj = transform.forward_and_ladj(x, context)
    close(ladj, log_det(lambda x: transform.forward_and_ladj(x, context)[0], x), 1e-8)
    back, reverse = transform.inverse_and_ladj(y, context)
    close(back, x, 1e-8)
    close(reverse, -ladj, 1e-8)


@pytest.mark.parametrize("name", TWO)
def test_densities_integrate_to_one(name):
    """Of both pushforwards of a normal: nothing is missed, and nothing counted twice."""
    transform = perturbed(Instance("", TWO[name], 2, param_scale=0.7), seed=1)
    axis = torch.linspace(-16, 16, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for way in ("forward_and_ladj", "inverse_and_ladj"):
        with torch.no_grad():
            z, ladj = getattr(transform, way)(grid)
            mass = (torch.distributions.Normal(0, 1).log_prob(z).sum(-1) + ladj).exp().sum() * (axis[1] - axis[0]) ** 2
        assert mass.item() == pytest.approx(1, abs=2e-3), way


TWICE = [case for case in FAMILY if case.id in ("planar-context", "sylvester-orthogonal-context", "block-autoregressive-context")]


@pytest.mark.parametrize("case", TWICE, ids=lambda case: case.id)
def test_second_derivatives_of_the_way_back(case):
    transform, y, context = perturbed(case), case.points(2), case.context(2)
    names, values = zip(*((k, p.detach().requires_grad_()) for k, p in transform.named_parameters()), strict=True)

    class Back(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.t = transform

        def forward(self, y, context):
            return self.t.inverse_and_ladj(y, context)

    def back(y, context, *values):
        return functional_call(Back(), {f"t.{k}": v for k, v in zip(names, values, strict=True)}, (y, context))

    inputs = (y.requires_grad_(), context.requires_grad_(), *values)
    assert gradcheck(back, inputs, fast_mode=True) and gradgradcheck(back, inputs, fast_mode=True, atol=1e-4)


# --- planar


@pytest.mark.parametrize("scale", (1e1, 1e2, 1e3))
@pytest.mark.parametrize("activation", ("tanh", "leaky_relu"))
def test_planar_stays_invertible_at_extreme_parameters(activation, scale):
    for seed in range(20):
        transform = perturbed(Instance("", partial(T.Planar, 3, activation=activation), 3, param_scale=scale), seed=seed)
        w, u, _, rho = transform._parts(None)
        assert rho.item() >= MIN_SLOPE - 1 - 1e-12
        close((w * u).sum(), rho, 1e-6)
        x = torch.randn(100, 3, dtype=torch.float64)
        y, ladj = transform.forward_and_ladj(x)
        assert ladj.isfinite().all()
        back, reverse = transform.inverse_and_ladj(y)
        assert back.isfinite().all() and reverse.isfinite().all()
        again = transform.forward_and_ladj(back)[0]
        assert (again - y).abs().max() <= 1e-9 * (1 + y.abs().max())


def test_planar_without_a_direction_is_a_shift():
    transform = T.Planar(3).double()
    with torch.no_grad():
        transform.params.bias.copy_(torch.tensor([0.0, 0, 0, 1, -2, 3, 0.5]))
    x = torch.randn(5, 3, dtype=torch.float64)
    for way, sign in (("forward_and_ladj", 1), ("inverse_and_ladj", -1)):
        transform.zero_grad()
        y, ladj = getattr(transform, way)(x)
        close(y, x + sign * torch.tensor([1.0, -2, 3], dtype=torch.float64) * torch.tensor(0.5, dtype=torch.float64).tanh())
        close(ladj, torch.zeros(5, dtype=torch.float64))
        (y.sum() + ladj.sum()).backward()
        assert transform.params.bias.grad.isfinite().all()


# --- radial


def test_radial_is_smooth_at_its_centre():
    transform = perturbed(Instance("", partial(T.Radial, 3), 3, param_scale=0.7))
    centre, alpha, beta = transform._parts(None)
    for way, factor in (("forward_and_ladj", 1 + beta / alpha), ("inverse_and_ladj", alpha / (alpha + beta))):
        for x in (centre.detach(), centre.detach() + 1e-9):
            close(jacrev(lambda x: getattr(transform, way)(x)[0])(x), factor * torch.eye(3, dtype=torch.float64), 1e-7)  # noqa: B023
            close(getattr(transform, way)(x)[1], 3 * factor.log().squeeze(), 1e-7)


# --- Sylvester


def test_sylvester_moves_no_more_directions_than_its_rank():
    for basis in BASES:
        transform = perturbed(Instance("", partial(T.Sylvester, 5, 2, basis=basis), 5))
        x = torch.randn(40, 5, dtype=torch.float64)
        q = transform._basis(None, x)
        close(q.mT @ q, torch.eye(2, dtype=torch.float64))
        assert torch.linalg.matrix_rank(transform(x) - x, rtol=1e-9) == 2


def test_sylvester_does_not_jump():
    """The QR of LAPACK changes its signs where the first entry of a column passes zero; the map may not."""
    transform = perturbed(Instance("", partial(T.Sylvester, 3, 2), 3))
    x, mapped = torch.randn(10, 3, dtype=torch.float64), []
    for entry in (-1e-9, 1e-9):
        with torch.no_grad():
            transform.frame.bias[0, 0] = entry
        mapped.append(transform(x))
    close(*mapped, 1e-7)


# --- block autoregressive


@pytest.mark.parametrize("seed", range(3))
def test_the_range_of_bnaf_is_unbounded(seed):
    """A network of tanh units has a bounded range: points beyond it would have no inverse, and no density."""
    transform = perturbed(Instance("", partial(T.BlockAutoregressive, 3, (4, 4)), 3, param_scale=1.0), seed=seed)
    for size in (1e1, 1e3, 1e6):
        y = size * torch.tensor([[1.0, 1, 1], [-1, -1, -1], [1, -1, 1]], dtype=torch.float64)
        x, ladj = transform.inverse_and_ladj(y)
        assert x.isfinite().all() and ladj.isfinite().all()
        close(transform.forward_and_ladj(x)[0], y)


def test_bnaf_is_autoregressive_and_increasing():
    transform = perturbed(Instance("", partial(T.BlockAutoregressive, 4, (4, 4)), 4, param_scale=2.0))
    jacobian = vmap(jacrev(transform))(2 * torch.randn(200, 4, dtype=torch.float64))
    assert not jacobian.triu(1).any() and (jacobian.tril(-1).abs().amax(0) > 1e-3).sum() == 6
    slopes = jacobian.diagonal(dim1=-2, dim2=-1)
    assert (slopes > 0.5 * MIN_SLOPE).all() and slopes.min() < 0.9 and slopes.max() > 1.1, "it can squeeze and stretch"
