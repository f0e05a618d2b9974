"""The verdict on guides whose true errors are known, and the estimates that it rests on."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, StudentT

from pyro_flows.diagnostics import Estimate, ess_fraction, evaluate, khat_limit, psis
from pyro_flows.diagnostics.verdict import MomentErrors, judge
from pyro_flows.errors import ShapeError

N = 10_000


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


# Pairs of target and guide with exact densities: every guide is an affine map of normals, bent as the target is or not.


@dataclass
class Case:
    family: str
    mean: Tensor  # of the target
    sd: Tensor
    log_p: Tensor
    log_q: Tensor
    z: Tensor

    def __post_init__(self):
        self.found = evaluate(self.log_p, self.log_q, self.z)
        m, s = self.z.mean(0), self.z.std(0)
        self.e_mean = ((m - self.mean).abs() / self.sd).max().item()
        self.e_sd = (s / self.sd - 1).abs().max().item()

    @property
    def passes(self):
        return self.e_mean < 0.1 and self.e_sd < 0.15

    @property
    def bad(self):
        return self.e_mean > 0.3


def gauss(x, loc, chol):
    u = torch.linalg.solve_triangular(chol, (x - loc).T, upper=False)
    return -0.5 * (u**2).sum(0) - chol.diag().log().sum() - len(loc) / 2 * math.log(2 * math.pi)


def correlated(dim, strength):
    a = torch.randn(dim, max(1, dim // 3))
    cov = strength * a @ a.T / a.shape[1] + torch.eye(dim)
    sd = cov.diag().sqrt()
    return cov / sd[:, None] / sd


def gaussian_cases():
    for i in range(40):
        dim = [2, 5, 10, 20, 50][i % 5]
        cov = correlated(dim, [0.0, 0.3, 1.0][i % 3])
        chol = torch.linalg.cholesky(cov)
        mean_field = (1 / torch.linalg.inv(cov).diag()).sqrt().diag()  # the optimum of reverse KL
        loc, scale = torch.zeros(dim), chol
        kind = i // 5
        if kind == 0:
            scale = mean_field
        elif kind in (1, 2):
            loc[0] = [0.45, 0.9][kind - 1]
        elif kind == 3:
            loc = 0.4 * torch.randn(dim)
        elif kind == 4:
            scale = chol * torch.empty(()).uniform_(0.7, 0.9)
        elif kind == 5:
            scale, loc[-1] = mean_field, 0.6
        else:  # what a trained full-rank guide looks like
            loc, scale = 0.02 * torch.randn(dim), chol * torch.empty(()).uniform_(0.97, 1.03)
        z = loc + torch.randn(N, dim) @ scale.T
        zeros = torch.zeros(dim)
        yield Case("gauss", zeros, zeros + 1, gauss(z, zeros, chol), gauss(z, loc, scale), z)


def heavy_tail_cases():
    for nu in (5.0, 10.0, 30.0):
        for dim in (2, 10):
            target = StudentT(nu)
            sd = math.sqrt(nu / (nu - 2))
            guides = (Normal(0.0, 1.1), 0.0), (Normal(0.0, 1.1), 0.8), (StudentT(nu + 3), 0.02), (StudentT(nu), 0.5)
            for guide, shift in guides:
                x = guide.sample((N, dim))
                z = x + shift
                zeros = torch.zeros(dim)
                yield Case("tails", zeros, zeros + sd, target.log_prob(z).sum(-1), guide.log_prob(x).sum(-1), z)


def funnel_cases():
    def log_density(z, loc, sd, tilt):
        v = z[:, 0]
        return Normal(loc, sd).log_prob(v) + Normal(0.0, (tilt * v / 2).exp()[:, None]).log_prob(z[:, 1:]).sum(-1)

    for dim in (2, 5, 10):
        for sd in (0.5, 1.0, 1.5):
            moments = torch.zeros(dim), torch.cat([torch.tensor([sd]), torch.full((dim - 1,), math.exp(sd**2 / 4))])
            # the last guide is the mean-field optimum: tilt 0
            shrunk = (1 / (1 / sd**2 + (dim - 1) / 2)) ** 0.5
            near = (0.02, sd, 1.0), (0.0, 1.03 * sd, 0.98)
            off = (0.6 * sd, sd, 1.0), (-sd, 0.8 * sd, 0.7), (0.0, shrunk, 0.0)
            for loc, scale, tilt in near + off:
                v = loc + scale * torch.randn(N, 1)
                z = torch.cat([v, torch.randn(N, dim - 1) * (tilt * v / 2).exp()], 1)
                yield Case("funnel", *moments, log_density(z, 0.0, sd, 1.0), log_density(z, loc, scale, tilt), z)


def banana_cases():
    def log_density(z, bend, loc):
        y = z[:, 1] - bend * (z[:, 0] ** 2 - 1) - loc
        return Normal(0.0, 1.0).log_prob(z[:, 0]) + Normal(0.0, 1.0).log_prob(y)

    for bend in (0.2, 0.7, 1.5):
        mean, sd = torch.zeros(2), torch.tensor([1.0, math.sqrt(1 + 2 * bend**2)])
        for other, loc in ((bend, 0.03), (0.97 * bend, 0.0), (bend, 0.8), (0.5 * bend, 0.7), (0.0, -0.5)):
            z = torch.randn(N, 2)
            z[:, 1] += other * (z[:, 0] ** 2 - 1) + loc
            yield Case("banana", mean, sd, log_density(z, bend, 0.0), log_density(z, other, loc), z)


def skewed_cases():
    """Logs of Gamma variables against normals: the guides of many scale parameters."""
    for shape, dim in ((0.5, 2), (2.0, 2), (2.0, 10), (10.0, 10), (30.0, 20)):
        a = torch.tensor(shape)
        mean, sd = torch.digamma(a), torch.polygamma(1, a).sqrt()
        for shift, factor in ((0.0, 1.0), (0.4, 1.0), (-0.8, 0.9), (0.0, 0.8)):
            guide = Normal(mean + shift * sd, factor * sd)
            z = guide.sample((N, dim))
            log_p = (a * z - z.exp() - torch.lgamma(a)).sum(-1)
            yield Case("skewed", mean.expand(dim), sd.expand(dim), log_p, guide.log_prob(z).sum(-1), z)


@pytest.fixture(scope="module")
def cases():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    families = (gaussian_cases, heavy_tail_cases, funnel_cases, banana_cases, skewed_cases)
    found = [case for family in families for case in family()]
    torch.set_default_dtype(before)
    return found


def rate(cases, condition):
    return sum(map(condition, cases)) / len(cases)


def test_bad_fits_are_flagged_and_good_ones_are_not(cases):
    bad, passing = [c for c in cases if c.bad], [c for c in cases if c.passes]
    assert len(bad) >= 40 and len(passing) >= 30
    assert {c.family for c in bad} == {c.family for c in passing} == {"gauss", "tails", "funnel", "banana", "skewed"}
    assert rate(bad, lambda c: c.found.verdict == "poor") >= 0.95
    assert rate(passing, lambda c: c.found.verdict == "poor") <= 0.05
    assert rate(passing, lambda c: c.found.verdict != "good") <= 0.10


def test_khat_or_ess_alone_would_not_do(cases):
    """Why the verdict measures moments: no limit on either number reaches both rates."""
    bad, passing = [c for c in cases if c.bad], [c for c in cases if c.passes]
    for number in (lambda c: c.found.khat, lambda c: -c.found.ess):
        scores = np.array([number(c) for c in bad]), np.array([number(c) for c in passing])
        limit = np.quantile(scores[0], 0.05)  # flags 95 % of the bad ones
        assert (scores[1] > limit).mean() > 0.10


def test_the_error_estimates_are_near_the_truth_where_weights_are_usable(cases):
    usable = [c for c in cases if c.found.ess > 0.3 and c.found.khat < 0.5]
    assert len(usable) > 40
    assert rate(usable, lambda c: abs(c.found.mean_error - c.e_mean) < 0.06) >= 0.95
    assert rate(usable, lambda c: abs(c.found.sd_error - c.e_sd) < 0.06) >= 0.9


def test_the_evidence_is_zero_and_the_elbo_never_beats_it(cases):
    """All targets are normalised: their log evidence is 0."""
    for case in cases:
        assert case.found.elbo.mean < 4 * case.found.elbo.se + 1e-12
    usable = [c for c in cases if c.found.ess > 0.3 and c.found.khat < 0.5]
    inside = rate(usable, lambda c: abs(c.found.log_evidence.mean) < 3 * c.found.log_evidence.se + 1e-6)
    assert inside >= 0.95


def test_a_lost_mode_is_invisible_and_the_reasons_say_so():
    """Documented blindness: nothing that is computed from the guide's own draws can see it."""
    z = torch.randn(N, 2)
    log_q = Normal(0.0, 1.0).log_prob(z).sum(-1)
    other = Normal(torch.tensor([20.0, 0.0]), 1.0).log_prob(z).sum(-1)
    found = evaluate(torch.logaddexp(log_q, other) - math.log(2), log_q, z)
    assert found.verdict == "good" and found.ess == pytest.approx(1.0)
    assert found.log_evidence.mean == pytest.approx(-math.log(2))
    assert any("several seeds" in reason for reason in found.reasons)


def test_an_overlapping_second_mode_is_seen():
    z = torch.randn(N, 2)
    log_q = Normal(0.0, 1.0).log_prob(z).sum(-1)
    other = Normal(torch.tensor([3.0, 0.0]), 1.0).log_prob(z).sum(-1)
    assert evaluate(torch.logaddexp(log_q, other) - math.log(2), log_q, z).verdict == "poor"


def test_an_exact_guide_is_good_with_nothing_to_report():
    z = torch.randn(N, 3)
    log_q = Normal(0.0, 1.0).log_prob(z).sum(-1)
    found = evaluate(log_q + 5.0, log_q, z)
    assert found.verdict == "good" and found.khat == 0.0 and found.ess == pytest.approx(1.0)
    assert max(found.mean_error, found.sd_error) < 1e-12 and found.num_nonfinite == 0
    assert found.elbo.mean == pytest.approx(5.0) and found.elbo.se == pytest.approx(0.0, abs=1e-12)
    assert found.log_evidence.mean == pytest.approx(5.0) and found.log_evidence.se == pytest.approx(0.0, abs=1e-6)


def test_high_khat_on_nearly_equal_weights_is_good_but_forbids_importance():
    """Weights 1 + a little of a Pareto law of index .9: a heavy tail that carries next to nothing."""
    z = torch.randn(N, 2)
    log_q = Normal(0.0, 1.0).log_prob(z).sum(-1)
    found = evaluate(log_q + torch.log1p(1e-3 * torch.rand(N) ** -0.9), log_q, z)
    assert found.khat > 0.7 and found.ess > 0.99
    assert found.verdict == "good" and any("importance=True" in reason for reason in found.reasons)


def test_a_small_measured_error_clears_nothing_where_the_weights_cannot_be_used():
    """A high k-hat with a low ESS says that the measurement itself is not to be trusted."""
    small = MomentErrors(0.05, "x", 0.05, "x")
    verdict, reasons = judge(0.13, 0.74, 1.0, small, N, 0)
    assert verdict == "poor" and "k-hat" in reasons[0]
    assert judge(0.13, 0.60, 1.0, small, N, 0)[0] == judge(0.95, 0.74, 0.2, small, N, 0)[0] == "good"


def test_reasons_name_the_column_and_the_remedy():
    z = torch.randn(N, 3)
    log_q = Normal(0.0, 1.0).log_prob(z).sum(-1)
    target = Normal(torch.tensor([0.0, 0.6, 0.0]), 1.0).log_prob(z).sum(-1)
    found = evaluate(target, log_q, z, names=["a", "b", "c"])
    assert found.verdict == "poor"
    assert "mean of b is off by about 0.6" in found.reasons[0] and "richer flow" in found.reasons[0]
    wide = evaluate(Normal(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.7])).log_prob(z).sum(-1), log_q, z)
    assert any("spread of column 2" in reason for reason in wide.reasons)
    assert "verdict: poor" in str(wide) and "k-hat" in str(wide)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_weights_are_dropped_counted_and_too_many_are_poor(value):
    z = torch.randn(N, 2)
    log_q = Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_p = log_q.clone()
    log_p[:5] = value
    few = evaluate(log_p, log_q, z)
    assert few.num_nonfinite == 5 and few.verdict == "good" and few.elbo.mean == pytest.approx(0.0)
    log_p[:50] = value
    assert evaluate(log_p, log_q, z).verdict == "usable"
    log_p[: N // 2] = value
    many = evaluate(log_p, log_q, z)
    assert many.verdict == "poor" and "5000 of 10000" in many.reasons[0]
    assert many.log_evidence.mean == pytest.approx(-math.log(2))  # weight zero, not no draw
    none = evaluate(torch.full_like(log_q, value), log_q, z)
    assert none.verdict == "poor" and none.ess == 0.0 and "finite weight" in none.reasons[0]


def test_without_draws_the_ess_bounds_the_error():
    z = torch.randn(N)
    log_q = Normal(0.0, 1.0).log_prob(z)
    at = {shift: evaluate(Normal(shift, 1.0).log_prob(z), log_q) for shift in (0.1, 0.5, 2.0)}
    assert [at[s].verdict for s in at] == ["good", "usable", "poor"]
    assert math.isnan(at[0.5].mean_error)
    assert "0.5" in at[0.5].reasons[0]  # sqrt(exp(.25) - 1) = .53


def test_ess_fraction():
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ess_fraction(w.log() + 1000) == pytest.approx(100 / 30 / 4)
    assert ess_fraction(torch.tensor([0.0, -math.inf, math.nan, -math.inf])) == pytest.approx(0.25)
    assert ess_fraction(torch.full((3,), math.nan)) == 0.0


@pytest.mark.parametrize("k", [0.2, 0.5, 0.9])
def test_psis_finds_the_tail_index(k):
    """Weights from a Pareto law of index k (log weights k times a standard exponential)."""
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(3))
    smoothed, khat = psis(-k * u.log())
    assert khat == pytest.approx(k, abs=0.08)
    assert smoothed.exp().sum().item() == pytest.approx(1.0)
    rank = torch.argsort(torch.argsort(smoothed))
    assert torch.corrcoef(torch.stack([rank, torch.argsort(torch.argsort(-u))]).double())[0, 1] > 0.999


TAILS = {
    "pareto": lambda k, n: -k * torch.rand(n).log(),
    "lognormal": lambda k, n: (0.01 + 5 * k) * torch.randn(n),
    "student": lambda k, n: StudentT(1 + 3 * k).sample((n,)),
    "bounded": lambda k, n: -k * torch.rand(n),
}


@pytest.mark.parametrize("n", (25, 100, 1000, 10_000))
@pytest.mark.parametrize("tail", TAILS)
def test_psis_is_arvizs(tail, n):
    """ArviZ as oracle: the same weights and k-hat to rounding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ 0.23 announces its successor on import
        import arviz
    if not hasattr(arviz, "psislw"):
        pytest.skip("ArviZ 1.x keeps it elsewhere, with other conventions of sign and scale")
    for k in torch.linspace(0.1, 1.5, 5):
        log_w = TAILS[tail](k, n)
        smoothed, khat = psis(log_w)
        with np.errstate(over="ignore"):
            expected, expected_khat = arviz.psislw(log_w.numpy().copy())
        if math.isfinite(expected_khat):  # else fewer than five weights stand out
            assert khat == pytest.approx(float(expected_khat), abs=1e-10)
        torch.testing.assert_close(smoothed, torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


def test_a_fit_imports_no_plotting_library():
    code = """
        import sys, torch, pyro, pyro.distributions as dist, pyro_flows as pf
        def model():
            pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))
        posterior = pf.fit(model)
        assert posterior.verdict == "good", posterior.reasons
        print(*(name for name in ("arviz", "matplotlib", "pandas", "xarray") if name in sys.modules))
    """
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert not run.stdout.split(), f"a fit imports {run.stdout.strip()}"


def test_psis_edge_cases():
    log_w = torch.randn(1000)
    kept = log_w.clone()
    first, k = psis(log_w)
    torch.testing.assert_close(log_w, kept)
    second, k_shifted = psis(log_w + 500.0)
    assert k_shifted == pytest.approx(k, abs=1e-6)
    torch.testing.assert_close(first, second)
    assert psis(torch.full((100,), 3.0))[1] == 0.0
    assert psis(torch.randn(10))[1] == math.inf
    level = torch.zeros(1000)
    level[:500] = -1.0  # the whole upper tail is one value
    assert psis(level)[1] <= 0.7
    smoothed, _ = psis(torch.randn(500, dtype=torch.float32))
    assert smoothed.dtype == torch.float64
    with pytest.raises(ShapeError, match="finite"):
        psis(torch.tensor([0.0, math.nan] * 20))


def test_khat_limit():
    assert khat_limit(100) == pytest.approx(0.5)
    assert khat_limit(10**6) == 0.7


def test_columns_that_cannot_be_judged_are_passed_over():
    z = torch.randn(N, 1)
    log_q = Normal(0.0, 1.0).log_prob(z[:, 0])
    overflow = (1e3 * z).exp()
    draws = torch.cat([z, torch.ones(N, 1), overflow], 1)
    assert torch.isinf(overflow).any()
    found = evaluate(Normal(0.5, 1.0).log_prob(z[:, 0]), log_q, draws)
    assert found.mean_error == pytest.approx(0.5, abs=0.03) and "column 0" in found.reasons[0]
    only = evaluate(log_q, log_q, torch.ones(N, 1))
    assert only.verdict == "good" and only.mean_error == 0.0


def test_a_mean_far_from_zero_keeps_its_digits():
    z = torch.randn(N, 1)
    log_q = Normal(0.0, 1.0).log_prob(z[:, 0])
    near, far = (evaluate(Normal(0.3, 1.0).log_prob(z[:, 0]), log_q, z + at) for at in (0.0, 1e8))
    assert far.mean_error == pytest.approx(near.mean_error, abs=1e-5)


def test_bad_shapes():
    with pytest.raises(ShapeError, match="log_p"):
        evaluate(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ShapeError, match="log_q"):
        evaluate(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ShapeError, match="draws"):
        evaluate(torch.zeros(3), torch.zeros(3), torch.zeros(3))
    with pytest.raises(ShapeError):
        evaluate(torch.zeros(0), torch.zeros(0))


def test_estimate_is_a_pair():
    mean, se = Estimate(1.0, 0.5)
    assert (mean, se) == (1.0, 0.5) and str(Estimate(1.0, 0.5)) == "1.000 ± 0.500"
