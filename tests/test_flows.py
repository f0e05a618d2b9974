"""Flows and their recipes: densities that integrate to one and belong to their samples, and every coordinate transformed."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn.module import PyroSample, to_pyro_module_
from scipy import stats
from torch import Tensor, nn

import pyro_flows as pf
from pyro_flows import flows
from pyro_flows import transforms as T
from pyro_flows.distributions import Gaussian, StudentT
from pyro_flows.errors import DtypeError, OptionError, ShapeError
from pyro_flows.transforms import Affine, Compose, Permutation

PACKAGE = Path(pf.__file__).parent
RECIPES = {
    "nice": flows.nice,
    "realnvp": flows.realnvp,
    "maf": flows.maf,
    "iaf": flows.iaf,
    "nsf": partial(flows.nsf, bins=5),
    "nsf_ar": partial(flows.nsf_ar, bins=5),
    "residual": partial(flows.residual, transforms=2),
    "cnf": partial(flows.cnf, solver="rk4", steps=32),
    "cinn": partial(flows.cinn, feature_dim=3),
    "naf": partial(flows.naf, units=3),
    "umnn": partial(flows.umnn, units=3, bound=3.0),
    "flowpp": partial(flows.flowpp, components=3),
    "sos": partial(flows.sos, degree=2),
    "bernstein": partial(flows.bernstein, degree=5),
}
WITHOUT_NETS = ("planar", "radial", "sylvester", "gaussianization")  # and so without hidden_features
RECIPES |= {name: partial(lambda make, *args, hidden_features=(), **options: make(*args, **options), getattr(flows, name)) for name in WITHOUT_NETS}
RECIPES["bnaf"] = lambda *args, hidden_features=(3,), **options: flows.bnaf(*args, hidden_factors=[min(n, 3) for n in hidden_features], **options)
ROOTS = ("naf", "umnn", "flowpp", "gaussianization", "sos", "bernstein", "cnf")  # smooth densities, and dear samples
DIMS = range(1, 13)

each_recipe = pytest.mark.parametrize("recipe", RECIPES)
each_context = pytest.mark.parametrize("context_dim", (0, 2))
few_contexts = pytest.mark.parametrize("context_dim", (0, pytest.param(2, marks=pytest.mark.thorough)))  # what the context does shows elsewhere


def build(recipe: str, dim: int, context_dim: int = 0, scale: float = 0.3, **options) -> pf.Flow:
    """A small flow in float64, all its parameters moved by ``scale`` times a standard normal."""
    flow = RECIPES[recipe](dim, context_dim, hidden_features=(8, 8), **options).double()
    with torch.no_grad():
        for p in flow.parameters():
            p += scale * torch.randn_like(p)
    return flow


def given(context_dim: int, *batch: int) -> tuple[Tensor, ...]:
    """The arguments of a flow's call."""
    return (torch.randn(*batch, context_dim).double(),) if context_dim else ()


def test_every_recipe_is_tested():
    elsewhere = {"flow_gmm", "lwta", "ar_lwta", "cif", "snf"}  # no rsample, or no density: see test_density.py, test_stochastic_training.py
    elsewhere |= {"sphere", "simplex", "torus"}  # see test_manifold_flows.py
    assert set(RECIPES) | elsewhere == set(flows.__all__)


# --- densities


def grid(d: dist.TorchDistribution, count: int, draws: int = 20_000) -> tuple[Tensor, Tensor]:
    """The axes of a grid around the draws, shape ``(D, count)``, and the probability of its cells."""
    x = d.sample((draws,))
    margin = 2 * x.std(0)
    low, high = x.amin(0) - margin, x.amax(0) + margin
    step = (high - low) / count
    axes = low[:, None] + step[:, None] * (torch.arange(count) + 0.5)
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    with torch.no_grad():
        return axes, d.log_prob(points).exp() * step.prod()


@few_contexts
@each_recipe
def test_density_and_samples_in_one_dimension(recipe, context_dim):
    d = build(recipe, 1, context_dim, transforms=3)(*given(context_dim))
    axes, mass = grid(d, 20_000, 5000 if recipe in ROOTS else 20_000)
    assert mass.sum().item() == pytest.approx(1, abs=1e-4)
    cdf = mass.cumsum(0) - mass / 2
    index = torch.searchsorted(axes[0], d.sample((4000,))[:, 0]).clamp(max=len(cdf) - 1)
    assert stats.kstest(cdf[index].numpy(), "uniform").pvalue > 1e-3


@few_contexts
@each_recipe
def test_density_and_samples_in_two_dimensions(recipe, context_dim):
    scale, count, draws = (0.1, 250, 5000) if recipe in ROOTS else (0.3, 400, 20_000)  # a milder map, which a coarser grid resolves
    d = build(recipe, 2, context_dim, scale, transforms=2)(*given(context_dim))
    axes, mass = grid(d, count, draws)
    assert mass.sum().item() == pytest.approx(1, abs=2e-3)
    x, cells = d.sample((4000,)), 5  # cells of about equal mass: five columns, each cut into five
    level = torch.arange(1, cells).double() / cells
    column = torch.bucketize(mass.sum(1).cumsum(0), level)
    row = torch.stack([torch.bucketize(mass[column == c].sum(0).cumsum(0) / mass[column == c].sum(), level) for c in range(cells)])
    expected = torch.stack([torch.stack([mass[column == c][:, row[c] == r].sum() for r in range(cells)]) for c in range(cells)])
    i, j = (torch.searchsorted(axis, v.contiguous()).clamp(max=count - 1) for axis, v in zip(axes, x.unbind(-1), strict=True))
    observed = torch.bincount(column[i] * cells + row[column[i], j], minlength=cells**2)
    frequencies = len(x) * expected.flatten() / expected.sum()
    assert stats.chisquare(observed.numpy(), frequencies.numpy()).pvalue > 1e-3


@few_contexts
@each_recipe
def test_rsample_and_log_prob(recipe, context_dim):
    flow, args = build(recipe, 3, context_dim), given(context_dim, 4)
    batch = (4,) if context_dim else ()
    for shape in ((), (5,), (2, 5)):
        d = flow(*args)
        pyro.set_rng_seed(1)
        x, log_prob = d.rsample_and_log_prob(shape)
        pyro.set_rng_seed(1)
        drawn = d.rsample(shape)
        assert x.shape == (*shape, *batch, 3) and log_prob.shape == (*shape, *batch)
        assert x.requires_grad and log_prob.requires_grad
        torch.testing.assert_close(x, drawn)
        for point in (drawn, drawn.detach().clone()):  # remembered and inverted
            torch.testing.assert_close(d.log_prob(point), log_prob, rtol=1e-8, atol=1e-8)
    wide = flow(*args).expand((6, *batch))
    x, log_prob = wide.rsample_and_log_prob((2,))
    torch.testing.assert_close(wide.log_prob(x.clone()), log_prob, rtol=1e-8, atol=1e-8)
    for value in (x, log_prob, wide.log_prob(x)):
        gradients = torch.autograd.grad(value.sum(), list(flow.parameters()), retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in gradients)


def test_rsample_and_log_prob_takes_stock_transforms():
    flow = build("maf", 2)
    stock = [torch.distributions.ExpTransform(), torch.distributions.AffineTransform(0.0, 2.0)]
    d = pf.FlowDistribution(Gaussian(2).double()(), [flow.transform, *stock])
    x, log_prob = d.rsample_and_log_prob((7,))
    torch.testing.assert_close(log_prob, d.log_prob(x.clone()), rtol=1e-8, atol=1e-8)


# --- what a density costs


def calls(f: Callable[[], object]) -> tuple[int, int]:
    """How many Python functions a call enters: of pyro_flows, and of all libraries. Built-in functions, such as torch's operations, do not count."""
    entered = []

    def profile(frame, event, arg):
        if event == "call":  # also the start and every resumption of a generator, and a comprehension where Python makes a function of it
            entered.append(Path(frame.f_code.co_filename))

    sys.setprofile(profile)
    try:
        f()
    finally:
        sys.setprofile(None)
    return sum(PACKAGE in path.parents for path in entered), len(entered)


@pytest.mark.parametrize("context_dim", (0, 2))
def test_a_density_takes_few_calls(context_dim):
    """Checks are made once, and nothing is stamped: 1,107 calls, 648 of them in pyro_flows, before that."""
    flow, x = flows.nsf(2, context_dim), torch.randn(64, 2)
    d = flow(torch.randn(64, context_dim)) if context_dim else flow()
    d.log_prob(x)
    own, all_of_them = calls(lambda: d.log_prob(x))
    print(own, all_of_them)
    assert own <= 150
    assert all_of_them <= 450  # torch's modules, and the operators of tensors with numbers


def test_a_density_of_a_draw_inverts_nothing():
    flow = build("naf", 2)
    d = flow()
    x = d.rsample((5,))
    own, _ = calls(lambda: d.log_prob(x))
    assert own <= 20
    with torch.no_grad():
        x.add_(1.0)
    torch.testing.assert_close(d.log_prob(x), d.log_prob(x.detach().clone()))  # not what was remembered


# --- coordinates


@pytest.mark.parametrize("dim", [dim if dim in (1, 2, 7) else pytest.param(dim, marks=pytest.mark.thorough) for dim in DIMS])
@each_context
@each_recipe
def test_every_coordinate_is_transformed(recipe, context_dim, dim):
    """Random permutations leave some coordinates standard normal in half of all seeds, silently."""
    x, context = torch.randn(20, dim).double(), given(context_dim, 20)
    first, second = (build(recipe, dim, context_dim) for _ in range(2))
    for way in ("forward_and_ladj", "inverse_and_ladj"):
        y, other = (getattr(flow.transform, way)(x, *context)[0] for flow in (first, second))
        for untouched in (y - x, y - other):  # by the flow; by its parameters
            assert (untouched.abs().amax(0) > 1e-3).all()
        if context_dim:
            elsewhere = getattr(first.transform, way)(x, *given(context_dim, 20))[0]
            assert ((elsewhere - y).abs().amax(0) > 1e-3).all()


@pytest.mark.parametrize("dim", (2, 3, 8))
@each_recipe
def test_coordinates_interact(recipe, dim):
    """No output ignores every other input."""
    transform = build(recipe, dim).transform
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: transform.forward_and_ladj(x)[0]))
    depends = jacobian(torch.randn(20, dim).double()).abs().amax(0).fill_diagonal_(0) > 1e-6
    assert depends.any(0).all() and depends.any(1).all()


@each_context
@each_recipe
def test_a_flow_starts_at_its_base(recipe, context_dim):
    flow = RECIPES[recipe](3, context_dim).double()
    x, context = torch.randn(7, 3).double(), given(context_dim, 7)
    torch.testing.assert_close(flow(*context).log_prob(x), dist.Normal(0, 1).log_prob(x).sum(-1))


@pytest.mark.parametrize("transforms", (1, 2, 3, 7))
@each_recipe
def test_any_number_of_transforms(recipe, transforms):
    flow = build(recipe, 4, transforms=transforms)
    x, log_prob = flow().rsample_and_log_prob((5,))
    torch.testing.assert_close(flow().log_prob(x.clone()), log_prob, rtol=1e-8, atol=1e-8)
    assert sum(p.numel() for p in flow.parameters()) > sum(p.numel() for p in build(recipe, 4, transforms=1).parameters()) * 0.99


# --- conditional flows


@each_recipe
def test_context_batches(recipe):
    flow = build(recipe, 3, 2)
    for batch in ((), (1,), (4,), (3, 4)):
        (context,) = given(2, *batch)
        d = flow(context)
        assert d.batch_shape == batch and d.event_shape == (3,)
        assert d.sample().shape == (*batch, 3) and d.sample((5,)).shape == (5, *batch, 3)
        x = torch.randn(*batch, 3).double()
        rows = [flow(c).log_prob(v) for c, v in zip(context.view(-1, 2), x.view(-1, 3), strict=True)]
        torch.testing.assert_close(d.log_prob(x), torch.stack(rows).view(batch))
        z, ladj = flow.transform.inverse_and_ladj(x, context)
        torch.testing.assert_close(d.log_prob(x), dist.Normal(0, 1).log_prob(z).sum(-1) + ladj)
        assert (d.log_prob(x) - flow(context + 1).log_prob(x)).abs().min() > 1e-4
    x = torch.randn(6, 1, 3).double()
    assert flow(given(2, 4)[0]).log_prob(x).shape == (6, 4)


# --- in Pyro


@each_context
@each_recipe
def test_in_a_plate(recipe, context_dim):
    flow, args = build(recipe, 3, context_dim), given(context_dim, 4)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("outer", 5, dim=-2), pyro.plate("rows", 4, dim=-1):
            return pyro.sample("x", flow(*args))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x = trace.nodes["x"]["value"]
    assert x.shape == (5, 4, 3) and trace.nodes["x"]["log_prob"].shape == (5, 4)
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], flow(*args).log_prob(x.clone()))
    assert len(pyro.get_param_store()) == len(list(flow.parameters()))


@few_contexts
@each_recipe
def test_stock_inference_runs(recipe, context_dim):
    """A flow as a likelihood and as a guide, under stock SVI; losses fall and no memory of the last step is stale."""
    prior, guide_flow = build(recipe, 2, context_dim, 0.05, transforms=2), build(recipe, 2, context_dim, 0.05, transforms=2)
    args, data = given(context_dim, 3), torch.randn(20, 3, 2).double() + 2

    def model():
        pyro.module("prior", prior)
        with pyro.plate("rows", 3, dim=-1):
            z = pyro.sample("z", prior(*args))
            with pyro.plate("data", 20, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)

    def guide():
        pyro.module("guide", guide_flow)
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("z", guide_flow(*args))

    svi = pyro.infer.SVI(
        model, guide, pyro.optim.Adam({"lr": 0.02}), pyro.infer.Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=2)
    )
    losses = [svi.step() for _ in range(20)]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < sum(losses[:5])


def test_parameters_can_be_random():
    flow = build("realnvp", 2, transforms=2)
    to_pyro_module_(flow)
    for name, p in list(flow.transform[0].net[0].named_parameters()):
        prior = dist.Normal(torch.zeros_like(p), 1.0).to_event(p.dim())
        setattr(flow.transform[0].net[0], name, PyroSample(prior))
    first, second = (pyro.poutine.trace(lambda: flow().log_prob(torch.ones(2).double())).get_trace() for _ in range(2))
    assert {name for name, site in first.nodes.items() if site["type"] == "sample"} == {f"transform.parts.0.net.0.{k}" for k in ("weight", "bias")}
    assert first.nodes["_RETURN"]["value"] != second.nodes["_RETURN"]["value"]


def test_distribution_is_pyros():
    d = build("nsf", 3)()
    assert isinstance(d, dist.TransformedDistribution) and isinstance(d.expand((4,)), pf.FlowDistribution)
    assert d.has_rsample and d.support.event_dim == 1
    assert d.expand((4,)).to_event(1).event_shape == (4, 3)
    assert d.expand((4,)).mask(torch.tensor([True, False, True, True])).log_prob(d.sample((4,)))[1] == 0
    with pytest.raises(ValueError):
        d.log_prob(torch.tensor([0.0, math.nan, 1.0]).double())


# --- modules and dtypes


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@each_recipe
def test_dtypes(recipe, dtype):
    flow, exact = (build(recipe, 4, 2, base=StudentT(4)) for _ in range(2))
    flow.load_state_dict(exact.state_dict())
    flow.to(dtype)
    context = torch.randn(6, 2).double()
    x, log_prob = flow(context.to(dtype)).rsample_and_log_prob()
    assert x.dtype == log_prob.dtype == flow(context.to(dtype)).log_prob(x.detach()).dtype == dtype
    torch.testing.assert_close(log_prob.double(), exact(context).log_prob(x.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("df", (3.0, torch.tensor([2.0, 30.0])), ids=("shared", "each"))
def test_student_t_base(df):
    flow = build("realnvp", 2, base=StudentT(2, df))
    x = torch.randn(5, 2).double()
    z, ladj = flow.transform.inverse_and_ladj(x)
    expected = stats.t(df if isinstance(df, float) else df.numpy()).logpdf(z.detach().numpy()).sum(-1) + ladj.detach().numpy()
    torch.testing.assert_close(flow().log_prob(x).detach(), torch.from_numpy(expected))
    drawn = flow.base().sample((20_000,)).double()
    for i in range(2):
        nu = df if isinstance(df, float) else df[i].item()
        assert stats.kstest(drawn[:, i].numpy(), stats.t(nu).cdf).pvalue > 1e-3
    assert flow().sample((3,)).shape == (3, 2) and "base.df" in flow.state_dict()


@each_recipe
def test_copies_and_state(recipe):
    flow = build(recipe, 3, 2)
    (context,) = given(2, 5)
    x = flow(context).rsample()
    expected = flow(context).log_prob(x)
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    loaded = build(recipe, 3, 2)
    assert not torch.equal(loaded(context).log_prob(x), expected)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (loaded, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(other(context).log_prob(x.detach()), expected, rtol=1e-8, atol=1e-8)
    copied = copy.deepcopy(flow(context))
    torch.testing.assert_close(copied.log_prob(x.detach()), expected, rtol=1e-8, atol=1e-8)


def test_repr_and_sizes():
    flow = build("maf", 3, 2)
    count = sum(p.numel() for p in flow.parameters())
    assert (flow.dim, flow.context_dim) == (3, 2) and f"dim=3, context_dim=2, parameters={count}" in repr(flow)
    assert "MaskedMLP" in repr(flow) and "Gaussian" in repr(flow)
    text = repr(build("nsf", 3)())
    assert "event_shape: torch.Size([3])" in text and "[Compose]" in text and "Normal" in text


def test_layers_answer_for_themselves():
    solved, residual = T.ContinuousFlow(2, solver="rk4", steps=1), T.ContractiveResidual(2)
    flow = pf.Flow(2, [Compose([Affine(2), residual]), Compose([solved, Affine(2)]).inv])
    layers = flow.transform.layers
    assert layers[0] is flow.transform[0][0] and layers[1] is residual and layers[3] is solved.inv and len(layers) == 4
    assert [layer.ode for layer in layers] == [None, None, None, (solved, True)] and solved.ode == (solved, False)
    assert [layer.implicit for layer in layers] == [False, True, False, False]
    flow.transform.prefer_exact()
    assert residual.log_det == "exact"
    estimated = T.ContractiveResidual(2, log_det="estimate")
    estimated.prefer_exact()
    assert estimated.log_det == "estimate"  # as was asked for


# --- construction and errors


def test_a_flow_of_parts():
    parts = [Affine(2), Permutation(torch.tensor([1, 0]))]
    x = torch.randn(4, 2)
    for transforms in (parts, tuple(parts), Compose(parts)):
        for base in (2, Gaussian(2)):
            torch.testing.assert_close(pf.Flow(base, transforms)().log_prob(x), dist.Normal(0, 1).log_prob(x).sum(-1))
    assert pf.Flow(2, parts[0]).transform is parts[0]


class Nameless(nn.Module):
    """A base that does not say its size."""

    def forward(self, context=None):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)


def test_a_base_of_the_users():
    assert pf.Flow(Nameless(), Affine(2))().log_prob(torch.zeros(3, 2)).shape == (3,)


BROKEN = {
    "base-size": (lambda: pf.Flow(3, Affine(2)), ShapeError),
    "base-type": (lambda: pf.Flow(dist.Normal(0, 1), Affine(2)), OptionError),
    "no-parts": (lambda: pf.Flow(2, []), OptionError),
    "stock-part": (lambda: pf.Flow(2, [torch.distributions.ExpTransform()]), OptionError),
    "part-sizes": (lambda: pf.Flow(2, [Affine(2), Affine(3)]), ShapeError),
    "part-contexts": (lambda: pf.Flow(2, [Affine(2, 1), Affine(2, 3)]), ShapeError),
    "gaussian-size": (lambda: Gaussian(0), ShapeError),
    "student-size": (lambda: StudentT(-1), ShapeError),
    "df-shape": (lambda: StudentT(3, torch.ones(2)), ShapeError),
    "df-sign": (lambda: StudentT(2, 0.0), OptionError),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_parts_are_refused(what):
    make, error = BROKEN[what]
    with pytest.raises(error):
        make()


@each_recipe
def test_broken_options_are_refused(recipe):
    make = RECIPES[recipe]
    for options, error in (
        ({"dim": 0}, ShapeError),
        ({"dim": 2.0}, ShapeError),
        ({"dim": 2, "context_dim": -1}, ShapeError),
        ({"dim": 2, "transforms": 0}, OptionError),
        ({"dim": 2, "transforms": 1.5}, OptionError),
        ({"dim": 2, "hidden_features": (0,)}, OptionError),
        ({"dim": 2, "base": Gaussian(3)}, ShapeError),
    ):
        if recipe in WITHOUT_NETS and "hidden_features" in options:
            continue
        with pytest.raises(error):
            make(**options)


@each_recipe
def test_broken_calls_are_refused(recipe):
    plain, conditional = build(recipe, 3), build(recipe, 3, 2)
    (context,) = given(2, 4)
    for call, error in (
        (lambda: plain(context), ShapeError),
        (lambda: conditional(), ShapeError),
        (lambda: conditional(context[:, :1]), ShapeError),
        (lambda: conditional(context.sum()), ShapeError),
        (lambda: conditional(context.long()), DtypeError),
        (lambda: conditional(context.float()), DtypeError),
        (lambda: plain().log_prob(torch.zeros(4, 2).double()), ValueError),  # torch's own validation
        (lambda: plain().log_prob(torch.zeros(4, 3)), DtypeError),
    ):
        with pytest.raises(error):
            call()


# --- training


@pytest.mark.parametrize("recipe", ("maf", "nsf"))
def test_training_finds_a_banana(recipe):
    """Maximum likelihood on y ~ N(x^2 / 2, 0.3), x ~ N(0, 1), whose entropy is known: the loss reaches it, and not less."""
    entropy = math.log(2 * math.pi * math.e) + math.log(0.3)

    def draw(n: int) -> Tensor:
        x, e = torch.randn(2, n)
        return torch.stack([x, x**2 / 2 + 0.3 * e], -1)

    flow = flows.__dict__[recipe](2, transforms=2, hidden_features=(32, 32))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    steps = 200
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, steps)
    start = -flow().log_prob(draw(4000)).mean().item()
    for _ in range(steps):
        optimizer.zero_grad()
        (-flow().log_prob(draw(256)).mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss = -flow().log_prob(draw(20_000)).mean().item()
    print(recipe, start, loss, entropy)
    assert start > entropy + 0.5
    assert entropy - 0.03 < loss < entropy + 0.08
