"""Models as users write them: every distribution of Pyro as likelihood and as prior, and what stock Pyro runs runs here, captured."""

import functools
from collections import defaultdict

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.errors import DataError, DtypeError, ModelError, PyroFlowsError
from pyro_flows.model.context import running
from pyro_flows.model.inputs import converted
from pyro_flows.training.engine import prepare
from pyro_flows.vi.set_up import set_up

T = torch.tensor
ONES = torch.ones(3)


def n3(value):
    return torch.full((3,), value)


def normal(size, variance=1.0):
    return dist.MultivariateNormal(torch.zeros(size), variance * torch.eye(size))


def noise(scale):
    return dist.Normal(torch.zeros(2).to(scale), scale * torch.ones(2).to(scale)).to_event(1)


DISTRIBUTIONS = {
    "Bernoulli": lambda x: dist.Bernoulli(logits=x * ONES),
    "Beta": lambda x: dist.Beta(n3(2.0) * x, n3(3.0)),
    "BetaBinomial": lambda x: dist.BetaBinomial(n3(2.0) * x, n3(3.0), 10),
    "Binomial": lambda x: dist.Binomial(10, logits=x * ONES),
    "Categorical": lambda x: dist.Categorical(logits=x * torch.arange(3.0).expand(3, 3)),
    "Cauchy": lambda x: dist.Cauchy(n3(0.0), x),
    "Chi2": lambda x: dist.Chi2(n3(3.0) * x),
    "ContinuousBernoulli": lambda x: dist.ContinuousBernoulli(logits=x * ONES),
    "Dirichlet": lambda x: dist.Dirichlet(x * torch.ones(3, 3)),
    "DirichletMultinomial": lambda x: dist.DirichletMultinomial(x * ONES, 10),
    "Exponential": lambda x: dist.Exponential(x * ONES),
    "ExtendedBinomial": lambda x: dist.ExtendedBinomial(10, logits=x * ONES),
    "ExtendedBetaBinomial": lambda x: dist.ExtendedBetaBinomial(n3(2.0) * x, n3(3.0), 10),
    "FisherSnedecor": lambda x: dist.FisherSnedecor(n3(3.0) * x, n3(5.0)),
    "Gamma": lambda x: dist.Gamma(n3(2.0) * x, n3(1.0)),
    "GammaPoisson": lambda x: dist.GammaPoisson(n3(2.0) * x, n3(1.0)),
    "Geometric": lambda x: dist.Geometric(logits=x * ONES),
    "Gumbel": lambda x: dist.Gumbel(n3(0.0), x),
    "HalfCauchy": lambda x: dist.HalfCauchy(x * ONES),
    "HalfNormal": lambda x: dist.HalfNormal(x * ONES),
    "InverseGamma": lambda x: dist.InverseGamma(n3(2.0), x),
    "Kumaraswamy": lambda x: dist.Kumaraswamy(n3(2.0) * x, n3(3.0)),
    "Laplace": lambda x: dist.Laplace(n3(0.0), x),
    "AsymmetricLaplace": lambda x: dist.AsymmetricLaplace(n3(0.0), x, n3(1.5)),
    "SoftAsymmetricLaplace": lambda x: dist.SoftAsymmetricLaplace(n3(0.0), x, n3(1.5)),
    "SoftLaplace": lambda x: dist.SoftLaplace(n3(0.0), x),
    "Logistic": lambda x: dist.Logistic(n3(0.0), x),
    "SkewLogistic": lambda x: dist.SkewLogistic(n3(0.0), x, n3(1.5)),
    "LogNormal": lambda x: dist.LogNormal(n3(0.0), x),
    "LogisticNormal": lambda x: dist.LogisticNormal(torch.zeros(3, 2).to(x), x * torch.ones(3, 2)),
    "LowRankMVN": lambda x: dist.LowRankMultivariateNormal(torch.zeros(3).to(x), x * torch.ones(3, 1), ONES.to(x)),
    "MVN": lambda x: dist.MultivariateNormal(torch.zeros(3).to(x), x * torch.eye(3)),
    "MVStudentT": lambda x: dist.MultivariateStudentT(T(4.0), torch.zeros(3), x * torch.eye(3)),
    "Multinomial": lambda x: dist.Multinomial(10, logits=x * torch.arange(3.0)),
    "NegativeBinomial": lambda x: dist.NegativeBinomial(5, logits=x * ONES),
    "Normal": lambda x: dist.Normal(n3(0.0), x),
    "OneHotCategorical": lambda x: dist.OneHotCategorical(logits=x * torch.arange(3.0)),
    "OrderedLogistic": lambda x: dist.OrderedLogistic(x * torch.ones(4), T([-1.0, 0.0, 1.0])),
    "Pareto": lambda x: dist.Pareto(n3(1.0), x),
    "Poisson": lambda x: dist.Poisson(x * ONES),
    "ProjectedNormal": lambda x: dist.ProjectedNormal(x * torch.ones(3, 3)),
    "RelaxedBernoulli": lambda x: dist.RelaxedBernoulli(T(0.5), logits=x * ONES),
    "RelaxedOneHot": lambda x: dist.RelaxedOneHotCategorical(T(0.5), logits=x * torch.arange(3.0)),
    "Stable": lambda x: dist.Stable(T(1.5), T(0.1), x * ONES),
    "StableWithLogProb": lambda x: dist.StableWithLogProb(T(1.5), T(0.1), x * ONES),
    "StudentT": lambda x: dist.StudentT(4.0, n3(0.0), x),
    "TruncatedPolyaGamma": lambda x: dist.TruncatedPolyaGamma(prototype=ONES),
    "Uniform": lambda x: dist.Uniform(n3(-1.0), 3 + x),
    "VonMises": lambda x: dist.VonMises(n3(0.0), x),
    "VonMises3D": lambda x: dist.VonMises3D(T([0.0, 0.0, 1.0]) * x),
    "Weibull": lambda x: dist.Weibull(x, n3(2.0)),
    "Wishart": lambda x: dist.Wishart(T(5.0), covariance_matrix=x * torch.eye(3)),
    "ZIP": lambda x: dist.ZeroInflatedPoisson(x * ONES, gate=n3(0.3)),
    "ZINB": lambda x: dist.ZeroInflatedNegativeBinomial(n3(5.0), logits=x * ONES, gate=n3(0.3)),
    "ZI": lambda x: dist.ZeroInflatedDistribution(dist.Poisson(x * ONES), gate=n3(0.3)),
    "Mixture": lambda x: dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), dist.Normal(torch.zeros(3, 2), x * torch.ones(3, 2))),
    "MaskedMixture": lambda x: dist.MaskedMixture(T([True, False, True]), dist.Normal(n3(0.0), x), dist.Normal(n3(1.0), x)),
    "Folded": lambda x: dist.FoldedDistribution(dist.Normal(n3(0.0), x)),
    "GaussianHMM": lambda x: dist.GaussianHMM(noise(x), torch.eye(2), noise(x), torch.eye(2), noise(x), duration=4),
    "DiscreteHMM": lambda x: dist.DiscreteHMM(torch.zeros(2), x * torch.eye(2), dist.Normal(T([-1.0, 1.0]), x), duration=4),
    "LinearHMM": lambda x: dist.LinearHMM(noise(x), torch.eye(2), noise(x), torch.eye(2), noise(x), duration=4),
    "GammaGaussianHMM": lambda x: dist.GammaGaussianHMM(
        dist.Gamma(T(2.0), x), normal(2), torch.eye(2), normal(2, x), torch.eye(2), normal(2, x), duration=4
    ),
    "GaussianMRF": lambda x: dist.GaussianMRF(normal(2), normal(4, x).expand([3]), normal(4).expand([3])),
    "MixtureOfDiagNormals": lambda x: dist.MixtureOfDiagNormals(torch.zeros(2, 3), x * torch.ones(2, 3), torch.zeros(2)),
    "MODNSharedCov": lambda x: dist.MixtureOfDiagNormalsSharedCovariance(torch.zeros(2, 3), x * ONES, torch.zeros(2)),
    "OMTMVN": lambda x: dist.OMTMultivariateNormal(torch.zeros(2), torch.eye(2) * x),
    "Delta": lambda x: dist.Delta(x * ONES),
    "CoalescentTimes": lambda x: dist.CoalescentTimes(T([0.0, 0.0, 0.0]), x),
    "ConditionalTransformed": lambda x: dist.TransformedDistribution(dist.Normal(n3(0.0), x), [dist.transforms.ExpTransform()]),
    "Masked": lambda x: dist.Normal(n3(0.0), x).mask(T([True, False, True])),
    "NanMaskedNormal": lambda x: dist.NanMaskedNormal(n3(0.0), x),
    "NanMaskedMVN": lambda x: dist.NanMaskedMultivariateNormal(torch.zeros(3), x * torch.eye(3)),
    "LogNormalNegativeBinomial": lambda x: dist.LogNormalNegativeBinomial(T(5.0), x * ONES, T(0.5)),
    "LKJ": lambda x: dist.LKJ(3, x),
    "LKJCholesky": lambda x: dist.LKJCholesky(3, x),
    "LKJCorrCholesky": lambda x: dist.LKJCorrCholesky(3, x),
    "SineBivariateVonMises": lambda x: dist.SineBivariateVonMises(T(0.0), T(0.0), x, T(2.0), T(0.1)),
    "SineSkewed": lambda x: dist.SineSkewed(dist.VonMises(T([0.0]), x).to_event(1), T([0.1])),
    "ExtendedNB": lambda x: dist.NegativeBinomial(x * ONES, probs=n3(0.5)),
}

# What stock Pyro cannot do either: no density, a density that is not finite here, shapes that are not its own.
NOT_FITTED = {"Delta", "GammaGaussianHMM", "GaussianMRF", "LinearHMM", "VonMises3D"}
# Branches on values, or reads .data: one run of the model a particle, with a reason.
LOOPED = {"DiscreteHMM", "GaussianHMM", "SineBivariateVonMises", "Stable", "StableWithLogProb"}



def prepared(model, *args, dtype=torch.float64):
    """The guide and the log joint density, as a fit has them before its first step."""
    with running(dtype, validate=True):
        return set_up(model, {"flow": None}, *converted(args, {}, dtype), dtype)


@pytest.mark.filterwarnings("ignore")  # of deprecated classes, and of samplers
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_as_a_likelihood(name):
    """It is fitted, or refused by a typed error that says what to do: never a raw one."""

    def model(y):
        x = pyro.sample("x", dist.LogNormal(0.0, 0.3))
        pyro.sample("y", DISTRIBUTIONS[name](x), obs=y)

    try:
        data = DISTRIBUTIONS[name](T(1.0)).sample()
    except NotImplementedError:
        data = torch.ones(3)
    try:
        log_joint = prepared(model, data)[1]
    except PyroFlowsError as error:
        assert name in NOT_FITTED and str(error)
    else:
        assert log_joint.mode == "vmap" or name in LOOPED


@pytest.mark.filterwarnings("ignore")  # of deprecated classes, and of samplers
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_as_a_prior(name):
    def model(y):
        x = pyro.sample("x", DISTRIBUTIONS[name](T(1.0)))
        pyro.sample("y", dist.Normal(x.to(y).sum(), 1.0), obs=y)

    try:
        prepared(model, T(0.0))
    except PyroFlowsError as error:
        assert len(str(error)) > 30


X, LABELS = torch.linspace(-1.0, 1.0, 12), ["b", "a", "c"] * 4


def ordinal(x):
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.OrderedLogistic(slope * x, T([-1.0, 0.0, 1.0])), obs=(x > 0).float())


def filled(x):
    """Tensors that the model makes and fills, by each way to make one."""
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    mean = torch.zeros(len(x))
    mean[:6] = slope * x[:6]
    other, copy = x.new_empty(len(x)), x.clone()
    other[:] = slope
    copy[2:4] = slope
    pyro.sample("y", dist.Normal(mean + other + copy, torch.ones_like(x)).to_event(1), obs=x)


def censored(x):
    """A branch on data, not on a latent value."""
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    for i in range(len(x)):
        if x[i] > 0:
            pyro.sample(f"t{i}", dist.Exponential(rate), obs=x[i])
        else:
            pyro.factor(f"c{i}", -rate)


def counted(x):
    """Sizes that are read off data."""
    group = (x > 0).long() + 2 * (x > 0.5).long() - (x > 0.5).long()
    with pyro.plate("groups", int(group.max()) + 1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(level[group], 1.0), obs=x)


def some_rows(x):
    index = torch.arange(0, 12, 3)
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample=index):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=x[index])


CHECKED = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def prior_made_before(x):
    weights = pyro.sample("weights", CHECKED)
    pyro.sample("y", dist.Normal(weights.sum(-1), 1.0).expand([len(x)]).to_event(1), obs=x)


def single_precision_inside(x):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    kernel = torch.exp(-((x.float()[:, None] - x.float()) ** 2)) * scale.float() + 0.1 * torch.eye(len(x), dtype=torch.float32)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)).to(x), kernel.to(x)), obs=x)


MODELS = (ordinal, filled, censored, counted, some_rows, prior_made_before, single_precision_inside)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_models_that_stay_captured(model):
    """The graph computes what the model does, one particle at a time, values and slopes."""
    guide, log_joint = prepared(model, X)
    assert log_joint.mode == "vmap" and not log_joint.stochastic, log_joint.reason
    z = guide.flow().sample((5,)).detach()
    engine = prepare(lambda z: torch.func.vjp(log_joint, z)[1](torch.ones(5, dtype=z.dtype)) + (log_joint(z),), (z,), "captured", 1)
    slope, value = engine(z + 0.1)
    with running(torch.float64):
        points = (z + 0.1).requires_grad_()
        alone = torch.stack([log_joint._density(point) for point in points])
    wanted = torch.autograd.grad(alone.sum(), points)[0]
    tolerance = 1e-4 if model is single_precision_inside else 1e-9
    torch.testing.assert_close(value, alone.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope, wanted, rtol=tolerance, atol=tolerance)


def test_a_subsampled_plate_that_draws_is_still_random():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), subsample_size=4) as index:
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x[index])

    assert prepared(model, X)[1].stochastic


Y = T([1.0, float("nan"), 3.0, 2.0])


def by_mask(y):
    seen = ~torch.isnan(y)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def by_mask_and_zeros(y):
    seen = ~torch.isnan(y)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.where(seen, y, torch.zeros_like(y)))


def by_distribution(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.NanMaskedNormal(mu, 1.0), obs=y)


def by_masked_distribution(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0).mask(~torch.isnan(y)), obs=y.nan_to_num())


def vectors_by_mask(y):
    rows = torch.stack([y, y], -1)
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)), pyro.poutine.mask(mask=~torch.isnan(y)):
        pyro.sample("y", dist.Normal(mu, 2**0.5).expand([2]).to_event(1), obs=rows)


@pytest.mark.parametrize("closed", [False, True], ids=["argument", "closure"])
@pytest.mark.parametrize("model", [by_mask, by_mask_and_zeros, by_distribution, by_masked_distribution, vectors_by_mask], ids=lambda m: m.__name__)
def test_missing_data_that_the_model_hides(model, closed):
    """The density of mu is that of the three rows that were seen: N(6/4, 1/4) up to a constant."""
    log_joint = prepared(functools.partial(model, Y.double()))[1] if closed else prepared(model, Y)[1]
    z = torch.linspace(-2, 3, 7, dtype=torch.float64).unsqueeze(-1).requires_grad_()
    values = log_joint(z)
    wanted = -0.5 * (z.squeeze(-1) - 1.5) ** 2 * 4
    torch.testing.assert_close(values - values[0], wanted - wanted[0])
    assert torch.autograd.grad(values.sum(), z)[0].isfinite().all()


def test_missing_data_that_nothing_hides():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ModelError, match="argument 0 has 1 NaN.*mask"):
        prepared(model, Y)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("make", [lambda p: dist.Bernoulli(p), lambda p: dist.Binomial(1, p), lambda p: dist.Geometric(p)])
def test_whole_numbers_are_outcomes(make, dtype):
    def model(y):
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", make(p), obs=y)

    y = T([0, 1, 1, 0])
    z = torch.linspace(-1, 1, 5, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(prepared(model, y.to(dtype))[1](z), prepared(model, y.double())[1](z))


def pandas_frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"g": LABELS, "x": X.numpy(), "k": [1] * 12})


def lists():
    return {"g": LABELS, "x": X.tolist(), "k": np.ones(12, int)}


def arrays():
    return {"g": np.array(LABELS), "x": X, "k": [T(1)] * 12}


@pytest.mark.parametrize("make", [pandas_frame, lists, arrays])
def test_tables_of_every_kind(make):
    labels = []
    args, _ = converted((make(),), {}, torch.float64, labels)
    table = args[0]
    assert table["g"].tolist() == [1, 0, 2] * 4 and table["x"].dtype == torch.float64
    torch.testing.assert_close(table["x"], X.double())
    assert labels == [["a", "b", "c"]]


def test_a_frame_as_a_model_sees_it():
    table = converted((pandas_frame(),), {}, torch.float64)[0][0]
    assert len(table) == 12 and table.columns == ["g", "x", "k"] and table.x is table["x"] and not table.k.is_floating_point()
    with pytest.raises(AttributeError, match="no column 'z'"):
        table.z  # noqa: B018


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(2) * 1j, DtypeError, "complex"),
        (torch.ones(2).to_sparse(), DtypeError, "sparse"),
        (torch.ones(2, device="meta"), DtypeError, "meta"),
        (np.array([1.0, 2.0]) * 1j, DtypeError, "complex"),
        (np.array([object()]), DtypeError, "object"),
        (np.array(["a", None], dtype=object), DataError, "1 missing label"),
    ],
)
def test_arguments_that_are_no_numbers(value, error, words):
    with pytest.raises(error, match=f"argument 0.*{words}"):
        converted((value,), {}, torch.float64)


@pytest.mark.parametrize("value", [np.ones(4)[::-1], np.ones((2, 2)).T, np.ones(4, ">f8"), np.ma.array([1.0, 1.0], mask=[0, 0]), [1.0, 1], (1.0,)])
def test_arguments_that_are_numbers_in_disguise(value):
    (got,), _ = converted((value,), {}, torch.float64)
    assert isinstance(got, torch.Tensor) and got.dtype == torch.float64 and bool((got == 1).all())


def test_dicts_stay_what_they_are_and_are_not_changed():
    given = defaultdict(list, {"x": np.ones(2, np.float32)})
    (got,), _ = converted((given,), {}, torch.float64)
    assert type(got) is defaultdict and got["x"].dtype == torch.float64 and isinstance(given["x"], np.ndarray)


def test_masked_entries_are_missing_and_plain_values_stay():
    args, _ = converted((np.ma.array([1.0, 5.0], mask=[0, 1]), 3, "word", [2, 3], None, True), {}, torch.float64)
    assert args[0].isnan().tolist() == [False, True] and args[1:] == (3, "word", [2, 3], None, True)


def test_options_of_a_fit_are_no_arguments_of_the_model():
    def model(seed):
        pyro.sample("x", dist.Normal(seed, 1.0))

    posterior = pf.fit.with_options(progress=False, flow=None, max_steps=20, num_eval=50, seed=4, engine="eager")(model, seed=T(2.0))
    assert posterior.seed == 4 and posterior.log_joint.kwargs["seed"] == 2.0
    assert repr(pf.FlowVI(model, flow="maf", lr=1e-3)).startswith("FlowVI(model, flow='maf', num_particles=128, max_steps=2000, lr=0.001")


class Regression(pyro.nn.PyroModule):
    """Pyro's Bayesian network: priors that are made, in single precision, before any fit."""

    def __init__(self):
        super().__init__()
        self.layer = pyro.nn.PyroModule[torch.nn.Linear](2, 1)
        self.layer.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.layer.bias = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x):
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("rows", len(x)):
            return pyro.sample("y", dist.Normal(mean, 1.0), obs=x.sum(-1))


PRIOR = dist.Gamma(2.0, 1.0)


def constant_prior(x):
    scale = pyro.sample("scale", PRIOR)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(2).to(x), scale * torch.eye(2).to(x)), obs=x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [Regression(), Regression().double(), constant_prior], ids=["network", "double", "constant"])
def test_priors_that_were_made_before_the_fit(model, dtype):
    """Initial values, densities and predictive draws are of the fit's dtype, whatever that of the prior is."""
    x = torch.randn(6, 2)
    guide, log_joint = prepared(model, x, dtype=dtype)
    assert guide.loc.dtype == dtype and log_joint.mode == "vmap"
    posterior = pf.Posterior.from_guide(guide, log_joint=log_joint, num_samples=20)
    assert all(v.dtype == dtype for v in posterior.predictive(num_samples=3).values())


VAGUE = (dist.InverseGamma(0.001, 0.001), dist.Gamma(0.001, 0.001), dist.HalfCauchy(1000.0), dist.Pareto(0.001, 0.001))


@pytest.mark.parametrize("prior", VAGUE, ids=repr)
def test_vague_priors_have_a_start(prior):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
        variance = pyro.sample("variance", prior)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)

    guide, log_joint = prepared(model, X)
    assert log_joint(guide.flow().sample((100,))).isfinite().all()


@pytest.mark.parametrize("make", [lambda loc: dist.Normal(loc, 0.5), lambda loc: dist.LogNormal(loc, 0.5)], ids=["real", "positive"])
def test_a_partly_observed_site_has_coordinates_where_it_is_missing(make):
    """The evidence is that of the rows that were seen, and the guide's Jacobian counts the missing ones alone."""
    seen = X > -0.5

    def model(x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", make(slope * x), obs=x.abs() + 0.1, obs_mask=seen)

    guide, log_joint = prepared(model, X)
    missing = int((~seen).sum())
    site = next(site for site in guide.sites if site.name == "y_unobserved")
    assert guide.latent_dim == 1 + missing and site.size == missing and site.shape == (12,)
    values = guide.unpack(torch.randn(5, guide.latent_dim, dtype=torch.float64))
    torch.testing.assert_close(guide.unpack(guide.pack(values))["y_unobserved"], values["y_unobserved"])
    assert values["y_unobserved"][:, seen].std(0).max() == 0 and values["y_unobserved"][:, ~seen].std(0).min() > 0
    pyro.clear_param_store()
    stock = pyro.infer.Trace_ELBO(num_particles=2).loss(model, guide, X.double())
    assert np.isfinite(stock)
    with torch.no_grad():
        slope = torch.randn(50, 1, dtype=torch.float64)
        law = make(slope * X.double())
        latent = law.sample()
        latent[:, seen] = values["y_unobserved"][0, seen]
        packed = guide.pack({"slope": slope.squeeze(-1), "y_unobserved": latent})
        wanted = dist.Normal(0.0, 1.0).log_prob(slope.squeeze(-1)) + law.log_prob(latent)[:, ~seen].sum(-1)
        wanted = wanted + law.log_prob((X.abs() + 0.1).double())[:, seen].sum(-1)
        torch.testing.assert_close(log_joint(packed) - guide.unpack_ladj(packed), wanted)


def test_a_frozen_parameter_is_named_in_the_verdict():
    def model(y):
        scale = pyro.param("scale", torch.tensor(1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, scale).expand([len(y)]).to_event(1), obs=y)

    posterior = pf.fit.with_options(progress=False, flow=None, num_eval=200, engine="eager")(model, X)
    assert posterior.verdict == "usable" and "pyro.param 'scale'" in posterior.reasons[0]
