"""AutoFlow as a module: its sites, its maps, its parameters, what it keeps when it is saved, and what it refuses."""

from __future__ import annotations

import copy
import functools
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.optim import Adam
from torch import nn
from torch.distributions import biject_to, constraints

import pyro_flows as pf
from pyro_flows import AutoFlow
from pyro_flows.errors import ModelError, OptionError, ParamStoreError, ShapeError, SupportError
from pyro_flows.guides.inner_flow import NO_GUIDES
from pyro_flows.transforms import Affine, LowRankLinear, TriangularLinear

NAMES = ("nice", "realnvp", "maf", "iaf", "nsf", "nsf_ar")
own = dist.constraints


def prior(fn):
    """The model that draws one site, ``x``."""
    return lambda *args, **kwargs: pyro.sample("x", fn)


def normal(dim):
    return prior(dist.Normal(torch.zeros(dim), 1.0).to_event(1))


def improper(support, *event):
    return dist.ImproperUniform(support, (), event)


def small(dim):
    return pf.flows.realnvp(dim, transforms=2, hidden_features=(8,))


def perturbed(guide, scale=0.3):
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return guide


def svi(model, guide, lr=1e-2, **options):
    return SVI(model, guide, Adam({"lr": lr}), Trace_ELBO(**options))


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)


# Sites

SITES = {
    "real": lambda: dist.Normal(0.0, 1.0),
    "real matrix": lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
    "positive": lambda: dist.Gamma(2.0, 3.0),
    "half-line": lambda: dist.Pareto(3.0, 2.0),
    "up to a bound": lambda: improper(constraints.less_than(-1.0)),
    "unit interval": lambda: dist.Beta(2.0, 3.0),
    "intervals": lambda: dist.Uniform(torch.tensor([0.0, 10.0]), torch.tensor([1.0, 30.0])).to_event(1),
    "half-open interval": lambda: improper(constraints.half_open_interval(0.0, 2.0)),
    "simplex": lambda: dist.Dirichlet(torch.ones(4)),
    "ordered": lambda: improper(own.ordered_vector, 3),
    "positive ordered": lambda: improper(own.positive_ordered_vector, 3),
    "softplus positive": lambda: improper(own.softplus_positive),
    "correlation Cholesky": lambda: dist.LKJCholesky(3, torch.tensor(2.0)),
    "correlation": lambda: dist.LKJ(3, torch.tensor(2.0)),
    "stacked": lambda: improper(constraints.stack([own.real, own.positive, own.unit_interval], -1), 3),
    "joined": lambda: improper(constraints.cat([own.real, own.positive], -1, [2, 1]), 3),
    "flat": lambda: improper(constraints.independent(own.real, 1), 3),
    "flat positive": lambda: improper(constraints.independent(own.positive, 1), 3),
    "flat simplex": lambda: improper(own.simplex, 3),
}


def free(name, value):
    """As many coordinates of a value as it has degrees of freedom."""
    if "simplex" in name:
        return value[..., :-1]
    if name.startswith("correlation"):
        return value[[1, 2, 2], [0, 0, 1]]
    return value.reshape(-1)


def test_the_table_of_sites_has_every_support_with_a_bijection():
    seen = set()
    for make in SITES.values():
        support = make().support
        seen |= {type(support), type(getattr(support, "base_constraint", support))}
    assert seen >= {kind for kind in biject_to._registry if kind.__module__.startswith(("torch.", "pyro."))}


@pytest.mark.parametrize("name", SITES)
def test_every_support(double, name):
    fn = SITES[name]()
    guide = perturbed(AutoFlow(prior(fn), flow=small).setup())
    value = guide()["x"]
    assert value.shape == fn.shape() and bool(fn.support.check(value).all())

    z = guide.flow().sample((2, 3))
    values = guide.unpack(z)
    assert values["x"].shape == (2, 3) + fn.shape()
    torch.testing.assert_close(guide.pack(values), z)
    jacobians = torch.stack([torch.func.jacrev(lambda u: free(name, guide.unpack(u)["x"]))(u) for u in z.reshape(6, -1)])
    wanted = jacobians.reshape(6, guide.latent_dim, guide.latent_dim).slogdet().logabsdet
    torch.testing.assert_close(guide.unpack_ladj(z), wanted.reshape(2, 3))


def nested(scale=1.0, *, shift=0.0):
    pyro.sample("scalar", dist.Normal(shift, scale))
    outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1)
    with outer:
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    with inner:
        pyro.sample("b", dist.Dirichlet(torch.ones(4)))
    with outer, inner:
        pyro.sample("c", dist.Normal(a.unsqueeze(-1), 1.0).expand(a.shape[:-1] + (3, 2)).to_event(1))


def test_nested_plates_and_keyword_arguments(double):
    guide = perturbed(AutoFlow(nested, flow=small).setup(2.0, shift=1.0))
    assert {s.name: (*s.shape,) for s in guide.sites} == {"scalar": (), "a": (2, 1), "b": (3, 4), "c": (2, 3, 2)}
    assert {s.name: s.plates for s in guide.sites} == {"scalar": (), "a": ("outer",), "b": ("inner",), "c": ("outer", "inner")}
    assert guide.latent_dim == 1 + 2 + 9 + 12

    torch.manual_seed(1)
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=2).loss(nested, guide, 2.0, shift=1.0)
    torch.manual_seed(1)
    z, log_q = guide.flow().rsample_and_log_prob((5,))
    each = []
    for point, density in zip(z, log_q - guide.unpack_ladj(z), strict=True):
        trace = poutine.trace(poutine.condition(nested, guide.unpack(point))).get_trace(2.0, shift=1.0)
        each.append(density - trace.log_prob_sum())
    assert loss == pytest.approx(torch.stack(each).mean().item(), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("setting", ["default", "model"])
def test_dtype_is_that_of_the_sites(dtype, setting):
    if setting == "default":
        torch.set_default_dtype(dtype)
    guide = AutoFlow(prior(dist.Gamma(torch.tensor([2.0, 3.0], dtype=dtype), 1.0).to_event(1))).setup()
    assert guide()["x"].dtype == dtype
    assert {t.dtype for t in guide.state_dict().values() if t.is_floating_point()} == {dtype}


# The flow, the affine layer and the base


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("flow", ["auto", *NAMES])
def test_every_flow_starts_as_a_small_gaussian_and_all_of_it_trains(flow, dim):
    model = normal(dim)
    guide = AutoFlow(model, flow=flow, init_scale=0.2, init_loc_fn=init_to_value(values={"x": torch.arange(1.0, dim + 1)})).setup()
    z, log_q = guide.flow().rsample_and_log_prob((100,))
    torch.testing.assert_close(log_q, dist.Normal(torch.arange(1.0, dim + 1), 0.2).log_prob(z).sum(-1), rtol=1e-4, atol=1e-3)

    before = {k: v.clone() for k, v in guide.named_parameters()}
    step = svi(model, guide, num_particles=4, vectorize_particles=True, max_plate_nesting=0).step
    for _ in range(3):
        step()
    moved = {k for k, v in guide.named_parameters() if not torch.equal(v, before[k])}
    if dim > 1:
        assert moved == before.keys()
    else:  # nothing to condition on: a bias or a scale is all that there is to learn
        assert moved >= {"flow.transform.parts.1.log_diag", "flow.transform.parts.1.shift"}
        layers = {str(i) for i in range(len(guide.inner[0].parts))}
        assert {k.split(".")[5] for k in moved if k.startswith("flow.transform.parts.0.")} == layers
    assert set(pyro.get_param_store()) == {f"AutoFlow.flow$$${k[5:]}" for k in before}


def test_the_flow_may_be_a_function_a_flow_or_a_transform():
    for flow in (small, small(3), small(3).transform, lambda dim: small(dim).transform):
        inner = AutoFlow(normal(3), flow=flow).setup().inner
        assert len(inner) == 1 and [type(p) for p in inner[0].parts] == [type(p) for p in small(3).transform.parts]
    assert AutoFlow(normal(3), flow=None).setup().inner == []


@pytest.mark.parametrize("kind, layer", [("full_rank", TriangularLinear), ("low_rank", LowRankLinear), ("diagonal", Affine)])
def test_affine_kinds(double, kind, layer):
    start = torch.tensor([3.0, -2.0, 1.0])
    guide = AutoFlow(normal(3), flow=None, affine=kind, init_scale=0.01, init_loc_fn=init_to_value(values={"x": start})).setup()
    assert type(guide.affine) is layer
    fn = guide.flow()
    torch.testing.assert_close(fn.log_prob(start + 0.01), dist.Normal(0.0, 0.01).log_prob(torch.full((3,), 0.01)).sum())


def test_auto_affine_goes_by_dimension():
    for dim, layer in ((300, TriangularLinear), (301, LowRankLinear), (2001, Affine)):
        assert type(AutoFlow(normal(dim), flow=None).setup().affine) is layer


def test_bases(double):
    x = torch.tensor([[0.5, 7.0]])
    heavier = functools.partial(pf.distributions.StudentT, df=2.0)
    start = init_to_value(values={"x": torch.zeros(2)})
    for base, fn in ((None, dist.Normal(0.0, 1.0)), ("student_t", dist.StudentT(5.0)), (heavier, dist.StudentT(2.0))):
        guide = AutoFlow(normal(2), base=base, init_scale=1.0, init_loc_fn=start).setup()
        torch.testing.assert_close(guide.flow().log_prob(x), fn.log_prob(x).sum(-1))
    heavy = pf.flows.nice(2, base=pf.distributions.StudentT(2))
    assert AutoFlow(normal(2), flow=heavy).setup().flow.base is heavy.base  # a flow brings its own base,
    assert isinstance(AutoFlow(normal(2), flow=heavy, base="normal").setup().flow.base, pf.distributions.Gaussian)  # unless told otherwise


# Medians and quantiles


def test_median_and_quantiles_of_a_known_posterior(double):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        pyro.sample("s", dist.HalfNormal(1.0))

    start = {"x": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(2.0)}
    guide = AutoFlow(model, flow=None, init_scale=0.5, init_loc_fn=init_to_value(values=start))
    levels = [0.05, 0.5, 0.95]
    found = guide.quantiles(levels, num_samples=20_000)  # sets the guide up
    steps = 0.5 * dist.Normal(0.0, 1.0).icdf(torch.tensor(levels))
    torch.testing.assert_close(found["x"], start["x"] + steps[:, None, None], rtol=0, atol=0.03)
    torch.testing.assert_close(found["s"], 2.0 * steps.exp(), rtol=0.04, atol=0)
    median = guide.median()
    assert {k: v.shape for k, v in median.items()} == {"x": (2, 3), "s": ()} and not median["x"].requires_grad
    torch.testing.assert_close(median["x"], start["x"], rtol=0, atol=0.05)


# Parameters, the parameter store, saving and copying


def test_set_up_is_quiet_and_happens_once():
    guide = AutoFlow(nested)
    trace = poutine.trace(lambda: guide.setup(2.0) and None).get_trace()
    assert [k for k in trace.nodes if not k.startswith("_")] == [] and len(pyro.get_param_store()) == 0
    first = list(guide.parameters())
    guide.setup(2.0)
    guide(2.0)
    assert first and all(a is b for a, b in zip(first, guide.parameters(), strict=True))
    pyro.clear_param_store()
    late = AutoFlow(nested)
    late(2.0)
    assert [p.shape for p in late.parameters()] == [p.shape for p in first]


def test_a_second_guide_says_what_to_do_and_then_trains():
    model, steps = normal(2), {"num_particles": 8, "vectorize_particles": True, "max_plate_nesting": 0}
    svi(model, AutoFlow(model, flow=small), **steps).step()
    second = AutoFlow(model, flow=small)
    with pytest.raises(ParamStoreError, match=r"pyro\.clear_param_store\(\)"):
        svi(model, second, **steps).step()
    pyro.clear_param_store()
    train, before = svi(model, second, lr=0.03, **steps), second.affine.log_diag.clone()
    losses = [train.step() for _ in range(60)]
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 1.0 and bool((second.affine.log_diag > before + 0.2).all())


class Shifted(nn.Module):
    """A base with a parameter of its own."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.loc = dim, nn.Parameter(torch.ones(dim))

    def forward(self, context=None):
        return dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1)


def trained():
    model = prior(dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    guide = AutoFlow(model, flow=lambda dim: small(dim), base=lambda dim: Shifted(dim))
    step = svi(model, guide).step
    for _ in range(3):
        step()
    return model, guide


def draw(guide):
    pyro.clear_param_store()
    torch.manual_seed(7)
    return guide()["x"]


def test_save_and_load_the_guide():
    model, guide = trained()
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(draw(loaded), draw(guide)) and loaded.median()["x"].shape == (2,)
    assert guide.model is not None
    pyro.clear_param_store()
    svi(model, guide).step()  # the original goes on


def test_state_dict_into_a_fresh_guide():
    model, guide = trained()
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = AutoFlow(model, flow=small, base=Shifted).setup()
    assert not torch.equal(draw(fresh), draw(guide))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(draw(fresh), draw(guide))


def test_deepcopy_keeps_the_model_and_trains_apart():
    model, guide = trained()
    twin = copy.deepcopy(guide)
    assert twin.model is guide.model and torch.equal(draw(twin), draw(guide))
    kept = {k: v.clone() for k, v in guide.state_dict().items()}
    pyro.clear_param_store()
    step = svi(model, twin).step
    for _ in range(2):
        step()
    assert all(torch.equal(v, kept[k]) for k, v in guide.state_dict().items()) and not torch.equal(draw(twin), draw(guide))
    pyro.clear_param_store()
    unused = copy.deepcopy(AutoFlow(model))  # before any set-up
    assert unused()["x"].shape == (2,)


# Errors

X3 = functools.partial(AutoFlow, normal(3))


def local():
    with pyro.plate("rows", 10, subsample_size=4):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def looped():
    for i in pyro.plate("rows", 2):
        pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))


def bounded():
    a = pyro.sample("a", dist.HalfNormal(1.0))
    pyro.sample("x", dist.Uniform(0.0, a))


def starts_at(fn, value):
    return lambda: AutoFlow(prior(fn), init_loc_fn=init_to_value(values={"x": torch.as_tensor(value)})).setup()


ERRORS = {
    "no latents": (lambda: AutoFlow(poutine.block(normal(3))).setup(), ModelError, "no continuous latent site"),
    "discrete": (lambda: AutoFlow(prior(dist.Bernoulli(0.5))).setup(), SupportError, "'x' is discrete.*enumerate.*block"),
    "discrete vector": (lambda: AutoFlow(prior(dist.Multinomial(3, torch.ones(2)))).setup(), SupportError, "'x' is discrete"),
    "sphere": (lambda: AutoFlow(prior(dist.ProjectedNormal(torch.ones(3)))).setup(), SupportError, "'x'.*sphere.*AutoManifoldFlow"),
    "matrix": (lambda: AutoFlow(prior(improper(own.positive_definite, 2, 2))).setup(), SupportError, "'x'.*LKJCholesky"),
    "local": (lambda: AutoFlow(local).setup(), ModelError, "'x' lies in plate 'rows', which subsamples 4 of 10"),
    "looped": (lambda: AutoFlow(looped).setup(), ModelError, "'x0' lies in plate 'rows', which is looped over"),
    "moving support": (lambda: AutoFlow(bounded).setup(), SupportError, "support of latent site 'x' depends.*fixed support"),
    "flow name": (lambda: X3(flow="nfs"), OptionError, "flow='nfs'.*nsf"),
    "flow type": (lambda: X3(flow=3), OptionError, "flow must be .* got int"),
    "flow result": (lambda: X3(flow=lambda d: d).setup(), OptionError, "flow= must give .* got int"),
    "flow dim": (lambda: X3(flow=small(4)).setup(), ShapeError, "3 unconstrained numbers.*dim=4"),
    "flow context": (lambda: X3(flow=lambda d: pf.flows.nsf(d, context_dim=2)).setup(), ShapeError, "without a context.*context_dim=2"),
    "affine": (lambda: X3(affine="full"), OptionError, "affine='full'.*'full_rank'"),
    "base name": (lambda: X3(base="cauchy"), OptionError, "base='cauchy'.*student_t"),
    "base type": (lambda: X3(base=3), OptionError, "base=3"),
    "base dim": (lambda: X3(base=lambda d: Shifted(d + 1)).setup(), ShapeError, "base has points of shape .4,.*3,"),
    "scale 0": (lambda: X3(init_scale=0.0), OptionError, "init_scale must be positive and finite, got 0.0"),
    "scale NaN": (lambda: X3(init_scale=float("nan")), OptionError, "init_scale.*got nan"),
    "scale inf": (lambda: X3(init_scale=float("inf")), OptionError, "init_scale.*got inf"),
    "NaN start": (starts_at(dist.Normal(0.0, 1.0), float("nan")), ModelError, "'x' starts at a point.*init_loc_fn="),
    "negative start": (starts_at(dist.Gamma(1.0, 1.0), -1.0), ModelError, "'x' starts at a point.*init_loc_fn="),
    "start on the boundary": (starts_at(dist.Gamma(1.0, 1.0), 0.0), ModelError, "'x' starts at a point.*init_loc_fn="),
    "start above": (starts_at(dist.Uniform(0.0, 1.0), 1.5), ModelError, "'x' starts at a point.*init_loc_fn="),
    "start off the simplex": (starts_at(dist.Dirichlet(torch.ones(3)), [0.5, 0.1, 0.1]), ModelError, "'x' starts at a point.*init_loc_fn="),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_fault_and_the_remedy(case):
    make, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        make()


def test_a_guide_whose_set_up_failed_fails_again():
    for guide in (X3(flow=small(4)), AutoFlow(bounded)):
        for _ in range(2):
            with pytest.raises((ShapeError, SupportError)):
                guide()


def test_the_remedies_work():
    sphere = poutine.reparam(prior(dist.ProjectedNormal(torch.ones(3))), config={"x": ProjectedNormalReparam()})
    draws = Predictive(sphere, guide=AutoFlow(sphere).setup(), num_samples=5, return_sites=["x"])()["x"]
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(5))

    def mixed():
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    assert [s.name for s in AutoFlow(poutine.block(mixed, hide=["k"])).setup().sites] == ["x"]
    assert [s.name for s in AutoFlow(poutine.block(mixed, expose=["x"])).setup().sites] == ["x"]


def test_the_default_flow_starts_from_the_upper_level():
    def levels(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 5):
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        pyro.sample("tau", dist.HalfNormal(1.0))

    def vectors():
        pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("sigma", dist.HalfNormal(1.0))

    for model, args, lower in ((levels, (torch.zeros(5),), [1, 2, 3, 4, 5]), (vectors, (), [0, 1, 2])):
        first, second, _, last, _ = AutoFlow(model).setup(*args).inner[0].parts
        assert first.moved_index.tolist() == last.moved_index.tolist() == lower
        assert sorted(first.moved_index.tolist() + second.moved_index.tolist()) == list(range(first.dim))


@pytest.mark.parametrize("name", NO_GUIDES)
def test_recipes_that_cannot_be_guides_say_why(name):
    with pytest.raises(OptionError, match="cannot be a guide"):
        AutoFlow(normal(2), flow=name)
