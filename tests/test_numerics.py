"""Root finding: the right root everywhere or an error, and gradients of any order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flows.errors import InversionError, ShapeError
from pyro_flows.numerics import clenshaw_curtis, integrate_from_zero, invert_monotone, log_ndtr, mills, ndtri_exp


def cubic(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    return x + a * x**3, torch.log1p(3 * a * x**2)


def exponential(x: Tensor) -> tuple[Tensor, Tensor]:
    """``sinh``, whose slope spans all magnitudes."""
    return torch.sinh(x), torch.nn.functional.softplus(2 * x.abs()) - x.abs() - math.log(2) + 0 * x


def steps(x: Tensor, steep: Tensor) -> tuple[Tensor, Tensor]:
    """Steps of height one at every odd number, with slope 1e-4 between: Newton alone runs away on these."""
    nearest = 2 * torch.floor(x / 2) + 1
    z = steep * (x - nearest)
    value = 1e-4 * x + (nearest + torch.tanh(z) / torch.tanh(steep))
    return value, torch.log(1e-4 + steep / (torch.cosh(z.clamp(-300, 300)) ** 2 * torch.tanh(steep)))


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SPREAD = doubles(0.0, 1e-8, 0.3, 1.0, 25.0, 1e2, 1e3, 1e4, 1e5, 1e6)
SPREAD = torch.cat([SPREAD, -SPREAD])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_root_is_found_wherever_it_is(dtype):
    """Others return the end of a fixed bracket, silently: ``inv(f(25)) = 10``."""
    tol = 40 * torch.finfo(dtype).eps
    x = SPREAD.to(dtype)
    a = torch.full_like(x, 0.7)
    torch.testing.assert_close(invert_monotone(cubic, cubic(x, a)[0], a), x, rtol=tol, atol=tol)
    y = SPREAD.to(dtype)
    torch.testing.assert_close(cubic(invert_monotone(cubic, y, a), a)[0], y, rtol=tol, atol=tol)
    torch.testing.assert_close(invert_monotone(exponential, y), torch.asinh(y.double()).to(dtype), rtol=tol, atol=tol)
    for slope in (1e-12, 1e-3, 1.0, 1e12):
        line = lambda x, slope=slope: (slope * x, torch.full_like(x, math.log(slope)))  # noqa: E731
        torch.testing.assert_close(invert_monotone(line, y), y / slope, rtol=tol, atol=tol)


@pytest.mark.parametrize("steep", (1.0, 30.0, 1e3, 1e6))
def test_steps_are_climbed(steep):
    y = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    slopes = torch.full_like(y, steep)
    x = invert_monotone(steps, y, slopes)
    below, above = steps(x - 1e-9, slopes)[0], steps(x + 1e-9, slopes)[0]
    assert (below <= y + 1e-12).all() and (y <= above + 1e-12).all()


@given(y=st.floats(-1e6, 1e6), start=st.floats(-1e6, 1e6), a=st.floats(0, 1e3))
def test_any_start_will_do(y, start, a):
    x = invert_monotone(cubic, doubles(y), doubles(a), start=doubles(start))
    assert cubic(x, doubles(a))[0].item() == pytest.approx(y, rel=1e-12, abs=1e-12)


def test_few_evaluations_are_needed():
    calls = []

    def counted(x, a):
        calls.append(x)
        return cubic(x, a)

    y = 5 * torch.randn(1000, dtype=torch.float64)
    invert_monotone(counted, y, torch.rand(1000).double())
    assert len(calls) <= 12


# --- gradients


def test_gradients_of_first_and_second_order():
    y, a = doubles(-3.0, 0.2, 10.0).requires_grad_(), doubles(1.0, 0.5, 2.0).requires_grad_()
    root = lambda y, a: invert_monotone(cubic, y, a)  # noqa: E731
    assert torch.autograd.gradcheck(root, (y, a), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(root, (y, a))
    assert torch.autograd.gradcheck(lambda a: root(y.detach(), a), (a,))
    assert torch.autograd.gradcheck(lambda y: root(y, a.detach()), (y,))


def test_gradients_of_any_order():
    """``sinh`` has a known inverse, and ``y = theta e^x`` would be no map onto the line; ``theta sinh x`` is."""

    def scaled(x, a):
        value, log_slope = exponential(x)
        return a * value, log_slope + a.log()

    y, a = doubles(0.7), doubles(1.3)
    ours: object = lambda y, a: invert_monotone(scaled, y, a).sum()  # noqa: E731
    exact: object = lambda y, a: torch.asinh(y / a).sum()  # noqa: E731
    for order in range(5):
        torch.testing.assert_close(ours(y, a).sum(), exact(y, a).sum(), msg=f"order {order}")
        ours, exact = (lambda y, a, f=f, i=order % 2: grad(lambda *z: f(*z).sum(), i)(y, a) for f in (ours, exact))


def test_function_transforms():
    y, a = doubles(-3.0, 0.2, 10.0, 1e3), doubles(1.0, 0.5, 2.0, 0.1)
    root = lambda y, a: invert_monotone(cubic, y, a)  # noqa: E731
    expected = root(y, a)
    torch.testing.assert_close(vmap(root)(y, a), expected)
    torch.testing.assert_close(vmap(root, (0, None))(y, a[0]), root(y, a[:1].expand(4)))
    torch.testing.assert_close(vmap(root, (None, 0))(y[1], a), root(y[1:2].expand(4), a))
    torch.testing.assert_close(vmap(vmap(root), (1, 1), 1)(y.view(2, 2), a.view(2, 2)), expected.view(2, 2))
    slope = 1 / (1 + 3 * a * expected**2)
    torch.testing.assert_close(vmap(grad(root))(y, a), slope)
    torch.testing.assert_close(jacrev(root)(y, a), slope.diag())
    torch.testing.assert_close(jvp(root, (y, a), (torch.ones(4).double(), torch.zeros(4).double()))[1], slope)
    curvature = -6 * a * expected * slope**3
    torch.testing.assert_close(vmap(hessian(root))(y, a), curvature)
    rows = torch.rand(4, 3).double()  # parameters with dimensions of their own
    mixed = lambda x, p: cubic(x, p.prod(-1))  # noqa: E731
    torch.testing.assert_close(vmap(lambda y, p: invert_monotone(mixed, y, p))(y, rows), root(y, rows.prod(-1)))


def test_graphs():
    y, a = doubles(-3.0, 0.2, 10.0, 1e3), doubles(1.0, 0.5, 2.0, 0.1)

    def value_and_slope(y, a):
        x = invert_monotone(cubic, y, a)
        return x, torch.autograd.grad(x.sum(), y)[0]

    graph = make_fx(value_and_slope)(torch.ones(4).double().requires_grad_(), torch.ones(4).double())
    for got, expected in zip(graph(y, a), value_and_slope(y.requires_grad_(), a), strict=True):
        torch.testing.assert_close(got, expected)
    hopeless = make_fx(lambda y: invert_monotone(bounded, y))(torch.zeros(2))(torch.tensor([0.5, 2.0]))
    assert hopeless.isnan().tolist() == [False, True]  # a graph cannot raise; it does not lie either


def test_compile():
    y, a = doubles(-3.0, 0.0, 10.0, 1e3).requires_grad_(), doubles(1.0, 0.5, 2.0, 0.1).requires_grad_()
    root = lambda y, a: invert_monotone(cubic, y, a)  # noqa: E731
    compiled = torch.compile(root, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(y, a), root(y, a))
    first = [torch.autograd.grad(f(y, a).sum(), (y, a), create_graph=True) for f in (compiled, root)]
    torch.testing.assert_close(*first)
    torch.testing.assert_close(*(torch.autograd.grad(g[0].sum() + g[1].sum(), (y, a)) for g in first))


# --- what is refused


def bounded(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(x), torch.log1p(-(torch.tanh(x) ** 2))


def test_what_is_not_reached_is_an_error():
    y = torch.tensor([[0.5, 2.0], [0.1, 0.0]])
    with pytest.raises(InversionError, match=r"1 of 4 points .* index \(0, 1\): y = 2, reached x = .* f\(x\) - y = -1") as error:
        invert_monotone(bounded, y)
    assert "inf]" in str(error.value)
    with pytest.raises(InversionError, match="2 of 2"):
        vmap(lambda y: invert_monotone(bounded, y))(torch.tensor([3.0, -2.0]))
    with pytest.raises(InversionError):
        invert_monotone(lambda x: (x * math.nan, x), torch.ones(3))
    with pytest.raises(InversionError, match=r"index \(\)"):
        invert_monotone(lambda x: (-x, 0 * x), torch.tensor(1.0))  # decreasing


def test_values_that_are_not_finite_come_back():
    x = invert_monotone(lambda x: (2 * x, torch.full_like(x, math.log(2))), torch.tensor([math.nan, math.inf, -math.inf, 3.0]))
    torch.testing.assert_close(x, torch.tensor([math.nan, math.inf, -math.inf, 1.5]), equal_nan=True)
    assert invert_monotone(cubic, torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_shapes_are_checked():
    for y, a in ((torch.ones(3), torch.ones(())), (torch.ones(2, 3), torch.ones(3)), (torch.ones(3), torch.ones(2))):
        with pytest.raises(ShapeError, match="must begin with the shape of y"):
            invert_monotone(cubic, y, a)


# --- quadrature


@pytest.mark.parametrize("panels", (2, 4, 8, 32))
def test_clenshaw_curtis(panels):
    nodes, weights = clenshaw_curtis(panels, doubles())
    assert (weights > 0).all() and weights.sum().item() == pytest.approx(2)
    for degree in range(panels + 2):  # an odd power is zero by symmetry
        assert (weights * nodes**degree).sum().item() == pytest.approx((1 + (-1) ** degree) / (degree + 1), abs=1e-14)
    assert clenshaw_curtis(panels, torch.zeros(1))[0].dtype == torch.float32


def test_integrals_from_zero():
    x = doubles(-3.0, 0.0, 0.5, 4.0)
    got = integrate_from_zero(lambda t: torch.exp(-t * t / 2), x, 40)
    expected = [integrate.quad(lambda t: math.exp(-t * t / 2), 0, v)[0] for v in x.tolist()]
    torch.testing.assert_close(got, doubles(*expected), rtol=1e-12, atol=1e-14)


# --- the normal distribution's tails


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_normal_tails(dtype):
    tol = 20 * torch.finfo(dtype).eps
    x = torch.tensor([-1e6, -1e3, -30.0, -5.0, -1.0, -1e-3, 0.0, 0.5, 3.0, 7.0, 1e3, 1e6], dtype=dtype, requires_grad=True)
    value = log_ndtr(x)
    exact = torch.from_numpy(stats.norm.logcdf(x.detach().double().numpy())).to(dtype)
    torch.testing.assert_close(value.detach(), exact, rtol=tol, atol=tol)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    near, wide = x.detach().abs() < 25, x.detach().double().numpy()
    hazard = torch.from_numpy(stats.norm.pdf(wide) / np.maximum(stats.norm.cdf(wide), 1e-300)).to(dtype)
    torch.testing.assert_close(slope[near].detach(), hazard[near], rtol=1e-5, atol=tol)
    torch.testing.assert_close(slope[:2].detach(), -x[:2].detach(), rtol=1e-5, atol=0)
    assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()
    log_p = torch.tensor([math.log(0.5), -1.0, -10.0, -59.0, -61.0, -100.0, -1e4, -1e12], dtype=dtype, requires_grad=True)
    q = ndtri_exp(log_p)
    torch.testing.assert_close(log_ndtr(q), log_p, rtol=tol, atol=tol)
    (slope,) = torch.autograd.grad(q.sum(), log_p, create_graph=True)
    torch.testing.assert_close(slope, mills(-q))
    assert torch.autograd.grad(slope.sum(), log_p)[0].isfinite().all()


def test_normal_functions_everywhere():
    x = doubles(-12.0, -3.0, -0.7, 2.0).requires_grad_()
    assert torch.autograd.gradcheck(log_ndtr, x) and torch.autograd.gradgradcheck(log_ndtr, x)
    log_p = doubles(-70.0, -3.0, -0.8).requires_grad_()
    assert torch.autograd.gradcheck(ndtri_exp, log_p) and torch.autograd.gradgradcheck(ndtri_exp, log_p)
    torch.testing.assert_close(vmap(ndtri_exp)(log_p), ndtri_exp(log_p))
    torch.testing.assert_close(vmap(grad(grad(ndtri_exp)))(log_p), jacrev(jacrev(ndtri_exp))(log_p).sum((1, 2)))
    compiled = torch.compile(ndtri_exp, fullgraph=True, backend="eager")
    for f in (compiled, make_fx(ndtri_exp)(log_p)):
        torch.testing.assert_close(f(log_p), ndtri_exp(log_p))
    torch.testing.assert_close(torch.autograd.grad(compiled(log_p).sum(), log_p), torch.autograd.grad(ndtri_exp(log_p).sum(), log_p))
