"""check_invertibility on transforms whose faults are known: each verdict is given to those that deserve it, and to no others."""

import copy

import pyro.distributions.transforms as stock
import pytest
import torch
from torch import nn
from torch.distributions import AbsTransform, AffineTransform, ComposeTransform, ExpTransform, SigmoidTransform, StickBreakingTransform
from zoo import ZOO, perturbed

import pyro_flows as pf
from pyro_flows.diagnostics import check_invertibility
from pyro_flows.errors import DtypeError, InversionError, OptionError, ShapeError, SupportError
from pyro_flows.transforms import Compose, FlowTransform, Standardize


def points(rows=40, dim=3, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


class Linear(FlowTransform):
    """``y = W x``, with room for faults."""

    ladj_error = 0.0
    ladj_sign = 1.0
    inverse_error = 0.0

    def __init__(self, weight):
        super().__init__(len(weight))
        self.register_buffer("weight", weight)

    def forward_and_ladj(self, x, context=None):
        ladj = self.ladj_sign * torch.linalg.slogdet(self.weight)[1] + self.ladj_error
        return x @ self.weight.mT, ladj.expand(x.shape[:-1])

    def inverse_and_ladj(self, y, context=None):
        x = torch.linalg.solve(self.weight, y.unsqueeze(-1)).squeeze(-1)
        ladj = self.ladj_sign * torch.linalg.slogdet(self.weight)[1] + self.ladj_error
        return x + self.inverse_error, -ladj.expand(y.shape[:-1])


def with_condition(condition, dim=3):
    """A matrix of known singular values, from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return u @ torch.logspace(0, -torch.tensor(condition).log10().item(), dim, dtype=torch.float64).diag() @ v


class Elementwise(FlowTransform):
    """``y = f(x)`` in each coordinate, from three functions."""

    def __init__(self, forward, inverse, log_slope, dim=3):
        super().__init__(dim)
        self.maps = forward, inverse, log_slope

    def forward_and_ladj(self, x, context=None):
        return self.maps[0](x), self.maps[2](x).sum(-1)

    def inverse_and_ladj(self, y, context=None):
        x = self.maps[1](y)
        return x, -self.maps[2](x).sum(-1)


def faulty(**faults):
    transform = Linear(with_condition(10.0))
    transform.__dict__.update(faults)
    return transform


# --- verdicts


def one_of_each():
    return list({type(case.make()): case for case in ZOO}.values())


@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.id)
def test_our_own_transforms_are_sound(case):
    found = check_invertibility(perturbed(case), case.points(12), case.context(12))
    assert found.verdict in ("good", "ill-conditioned"), found


def test_a_good_map_is_good():
    found = check_invertibility(faulty(), points())
    assert found.verdict == "good" and {c.status for c in found.checks} == {"fine"}, found
    assert {(c.quantity, c.dtype) for c in found.checks} == {
        (q, d)
        for q in ("x → y → x", "y → x → y", "log-det (autograd)", "log-det (both ways)")
        for d in (torch.float32, torch.float64)
    }
    assert list(dict.fromkeys(c.points for c in found.checks))[:3] == ["x", "around x", "x · 1e1"]


@pytest.mark.parametrize(
    "faults, quantities",
    [
        ({"ladj_error": 0.3}, {"log-det (autograd)"}),  # consistent both ways: only the Jacobian can tell
        ({"ladj_sign": -1.0}, {"log-det (autograd)"}),
        ({"inverse_error": 1e-3}, {"x → y → x", "y → x → y"}),
        ({"inverse_error": 1e-6}, {"x → y → x", "y → x → y"}),
    ],
    ids=["ladj", "ladj-sign", "inverse", "inverse-slightly"],  # a set has no order, and workers must agree on names
)
@pytest.mark.parametrize("condition", [10.0, 1e5])
def test_wrong_formulas_are_wrong(faults, quantities, condition):
    transform = Linear(with_condition(condition))
    transform.__dict__.update(faults)
    found = check_invertibility(transform, points())
    assert found.verdict == "wrong", found
    assert {c.quantity for c in found.checks if c.status == "failed" and c.dtype == torch.float64} <= quantities
    assert any(next(iter(sorted(quantities))) in r or "log-det" in r for r in found.reasons)


def test_the_inverses_own_log_det_is_compared():
    class Lopsided(Linear):
        def inverse_and_ladj(self, y, context=None):
            x, ladj = super().inverse_and_ladj(y, context)
            return x, ladj + 0.01 * x[..., 0]

    found = check_invertibility(Lopsided(with_condition(10.0)), points())
    failed = {c.quantity for c in found.checks if c.status == "failed"}
    assert found.verdict == "wrong" and failed == {"log-det (both ways)"}


@pytest.mark.parametrize("condition, verdict", [(1e2, "good"), (1e6, "ill-conditioned"), (1e9, "ill-conditioned")])
def test_lost_digits_are_no_bug(condition, verdict):
    """The float32 round trip of a linear map of condition number 1e6 is off by percents, and nobody is to blame."""
    found = check_invertibility(Linear(with_condition(condition)), points())
    worst = max(c.error for c in found.checks if c.quantity == "x → y → x" and c.dtype == torch.float32)
    assert found.verdict == verdict and (worst > 1e-3) == (verdict != "good"), found
    assert found.condition == pytest.approx(condition, rel=1e-4)


def test_digits_lost_between_layers_are_not_explained():
    """Two ill-conditioned layers that undo each other: the whole is the identity, whose conditioning excuses nothing."""
    bad = with_condition(1e6)
    found = check_invertibility(Compose([Linear(bad), Linear(torch.linalg.inv(bad))]), points())
    assert found.verdict == "unstable" and found.condition < 1.001, found
    assert any("float64" in r for r in found.reasons)  # the remedy


def test_so_are_digits_lost_in_float64():
    """A saturated sigmoid and its inverse: off by more than any tolerance in float64 too, but it is rounding, not a wrong formula."""
    found = check_invertibility(ComposeTransform([SigmoidTransform(), SigmoidTransform().inv]), points())
    assert any(c.status == "failed" and c.dtype == torch.float64 for c in found.checks)
    assert found.verdict == "unstable" and any("between layers" in r for r in found.reasons), found


def test_a_bracket_that_ends_is_found_by_stress():
    """An inverse that returns the end of its bracket, without a word, is right at the points and wrong beyond 10."""

    def f(x):
        return x + 0.5 * torch.tanh(x)

    def inverse(y):
        low, high = torch.full_like(y, -10.0), torch.full_like(y, 10.0)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = torch.where(f(middle) < y, middle, low), torch.where(f(middle) < y, high, middle)
        return (low + high) / 2

    def log_slope(x):
        return (1 + 0.5 / torch.cosh(x.clamp(-50, 50)) ** 2).log()

    found = check_invertibility(Elementwise(f, inverse, log_slope), points())
    failed = [c for c in found.checks if c.status == "failed"]
    assert found.verdict == "wrong" and failed and all(c.points.startswith("x · ") for c in failed), found


def test_a_fold_has_no_inverse():
    """The determinant changes its sign: the map is not injective, whatever it says."""
    fold = Elementwise(lambda x: x**2 + x, lambda y: (y + 0.25).clamp(min=0).sqrt() - 0.5, lambda x: (2 * x + 1).abs().log(), dim=1)
    found = check_invertibility(fold, points(dim=1))
    assert found.verdict == "wrong" and "not injective" in found.reasons[0]


def test_an_inverse_that_gives_up_is_unstable():
    def gives_up(y):
        if y.abs().max() > 50:
            raise InversionError("no bracket after 60 doublings")
        return y

    found = check_invertibility(Elementwise(lambda x: x, gives_up, torch.zeros_like), points())
    assert found.verdict == "unstable" and "no bracket" in found.reasons[0], found


def test_overflow_is_reported_where_it_begins():
    found = check_invertibility(ExpTransform(), points().abs() + 1)
    assert found.verdict == "unstable" and "x · 1e3" in found.reasons[0]
    assert not [c for c in found.checks if c.points == "x" and c.status != "fine"]


def test_without_autograd_there_are_differences():
    def blind(x):
        with torch.no_grad():
            return 2 * x + torch.sin(x)

    def inverse(y):
        x = y / 2
        for _ in range(200):
            x = (y - torch.sin(x)) / 2
        return x

    right = Elementwise(blind, inverse, lambda x: (2 + torch.cos(x)).log())
    wrong = Elementwise(blind, inverse, lambda x: (2 + torch.cos(x)).log() + 0.01)
    found = check_invertibility(right, points())
    assert found.verdict == "good", found
    assert any(c.quantity == "log-det (differences)" for c in found.checks)
    assert check_invertibility(wrong, points()).verdict == "wrong"


# --- stock transforms


def test_pyro_planar_has_no_inverse():
    found = check_invertibility(stock.Planar(3), points())
    assert found.verdict == "one-way" and "cache" in found.reasons[0]
    assert {c.quantity for c in found.checks} == {"log-det (autograd)"}
    assert found.plot() is not None


def test_a_truncated_series_is_flagged():
    series = stock.MatrixExponential(3)
    series.weights = nn.Parameter(1.5 * points(3, seed=2))
    assert check_invertibility(series, points()).verdict == "wrong"
    exact = stock.MatrixExponential(3, iterations=60)
    exact.weights = nn.Parameter(1.5 * points(3, seed=2))
    assert check_invertibility(exact, points()).verdict == "good"


@pytest.mark.parametrize(
    "transform, context",
    [
        (AffineTransform(1.0, torch.tensor([2.0, -3.0, 0.5])), None),
        (SigmoidTransform().inv, None),
        (ComposeTransform([AffineTransform(1.0, 0.1), SigmoidTransform(), AffineTransform(1.0, 2.0)]), None),
        (stock.affine_coupling(3), None),
        (stock.Spline(3), None),
        (stock.Permute(torch.tensor([2, 0, 1])), None),
        (stock.affine_autoregressive(3), None),
        (stock.conditional_affine_coupling(3, 2), points(40, 2, seed=3)),
        (stock.conditional_spline(3, 2), points(1, 2, seed=3)[0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sound_stock_transforms(transform, context):
    x = points()
    if type(transform).__name__ == "_InverseTransform":
        x = x.sigmoid()
    found = check_invertibility(transform, x, context)
    assert found.verdict in ("good", "ill-conditioned"), found


# --- numbers


def test_singular_values_are_those_of_the_jacobian():
    weight = with_condition(1e3)
    found = check_invertibility(Linear(weight), points(300))
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(found.singular_values, sigma[[2, 0]].expand(256, 2), rtol=1e-10, atol=0.0)
    assert found.sigma_min == pytest.approx(sigma[2].item()) and found.sigma_max == pytest.approx(sigma[0].item())
    low, high = found.lipschitz
    assert sigma[2] * (1 - 1e-9) <= low < 0.05 and 0.9 < high <= sigma[0] * (1 + 1e-9)


def test_units_do_not_matter():
    """Points and images of any size: the same fault is a fault, and the same map sound."""
    for unit in (1e-8, 1.0, 1e8):
        scaled = [Standardize(torch.zeros(3), unit * torch.eye(3)), faulty(), Standardize(torch.zeros(3), torch.eye(3) / unit)]
        assert check_invertibility(Compose(scaled).double(), points() / unit).verdict == "good"
        off = faulty(inverse_error=1e-3)
        assert check_invertibility(Compose([scaled[0], off, scaled[2]]).double(), points() / unit).verdict == "wrong"


# --- what it takes, and what it leaves alone


def test_flows_and_contexts():
    flow, context = pf.flows.maf(3, context_dim=2), points(1, 2)[0]
    whole = check_invertibility(flow, points(), context)
    assert whole.verdict == "good" and whole.name == "Compose" and whole.num_points == 40
    again = check_invertibility(flow.transform.condition(context), points().reshape(8, 5, 3))
    assert str(again) == str(whole)
    each = check_invertibility(flow, points(), points(40, 2))
    assert each.verdict == "good"
    alone = check_invertibility(flow, points(1), context)
    assert alone.num_points == 1 and alone.verdict == "good" and alone.plot() is not None


def test_what_is_given_is_left_alone():
    transform = pf.flows.nsf(3).transform.train()
    x = points().requires_grad_()
    y = transform(x)
    before, memory = copy.deepcopy(transform.state_dict()), transform._last
    parameters = dict(transform.named_parameters())
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    check_invertibility(transform, x)
    assert transform.training and transform._last is memory and transform.inv(y) is x
    assert all(p is parameters[name] and p.grad is None and p.requires_grad for name, p in transform.named_parameters())
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in transform.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and torch.get_default_dtype() is dtype and torch.is_grad_enabled()
    assert x.grad is None


def test_stock_modules_are_left_alone():
    planar = stock.Planar(3)
    planar(points())
    cached = planar._cached_x_y
    check_invertibility(planar, points(seed=4))
    assert planar._cached_x_y is cached and planar.u.dtype == torch.float32


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: (nn.Linear(2, 2), points()), OptionError, "Linear"),
        (lambda: (AbsTransform(), points()), OptionError, "no bijection"),
        (lambda: (faulty(), points(dim=2)), ShapeError, r"\(\*batch, 3\)"),
        (lambda: (faulty(), points(0)), ShapeError, "at least one point"),
        (lambda: (faulty(), torch.tensor(1.0)), ShapeError, "at least one point"),
        (lambda: (faulty(), torch.ones(4, 3, dtype=torch.long)), DtypeError, "int64"),
        (lambda: (faulty(), torch.tensor([[0.0, 0.0, 0.0], [0.0, torch.nan, 0.0]])), SupportError, "rows 1"),
        (lambda: (faulty(), points(), points()), ShapeError, "takes no context"),
        (lambda: (pf.flows.maf(3, context_dim=2), points()), ShapeError, "needs a context"),
        (lambda: (pf.flows.maf(3, context_dim=2), points(), points(40, 4)), ShapeError, "context"),
        (lambda: (pf.flows.maf(3, context_dim=2), points(), points(7, 2)), ShapeError, "do not broadcast"),
        (lambda: (pf.flows.maf(3, context_dim=2), points(2), torch.full((2, 2), torch.inf)), SupportError, "context is not finite"),
        (lambda: (pf.flows.maf(3, context_dim=2).transform.condition(points(1, 2)), points(), points(1, 2)), ShapeError, "already"),
        (lambda: (stock.conditional_affine_coupling(3, 2), points()), ShapeError, "needs a context"),
        (lambda: (ExpTransform().inv, points()), SupportError, "domain"),
        (lambda: (StickBreakingTransform(), points()), ShapeError, "size 4"),
        (lambda: (stock.Planar(2), points()), ShapeError, "cannot be evaluated"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        check_invertibility(*make())


# --- report and figure


def test_the_report_is_a_table():
    found = check_invertibility(faulty(ladj_error=0.3), points())
    lines = str(found).splitlines()
    assert repr(found) == str(found) and lines[0] == "Invertibility of Linear in 3 dimensions, at 40 points"
    assert lines[1].startswith("Verdict: wrong.") and "3.0e-01" in lines[2]
    for dtype in ("float64", "float32"):
        [head] = [i for i, line in enumerate(lines) if line.startswith(dtype)]
        columns = [lines[head].index(name) for name in ("log-det (autograd)", "x → y → x", "y → x → y", "log-det (both ways)")]
        for line in lines[head + 1 : head + 9]:
            assert all(line[c - 1] == " " and line[c] != " " for c in columns), line
            assert "✗" in line[columns[0] : columns[1]] and "✗" not in line[columns[1] :]


def test_the_figure(tmp_path):
    found = check_invertibility(faulty(inverse_error=1e-3), points())
    figure = found.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    errors, sigma, stress = figure.axes
    assert "wrong".upper() in figure._suptitle.get_text()
    drawn = torch.as_tensor(errors.lines[0].get_ydata())
    torch.testing.assert_close(drawn, found.errors["x → y → x", torch.float64][0])
    assert len(stress.get_xticklabels()) == 7 and sigma.get_yscale() == "log"
