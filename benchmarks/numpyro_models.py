"""The reference posteriors in NumPyro, as a NumPyro user would write them: the densities and arguments of ``pyro_models``.

Needs numpyro; nothing else in the benchmarks does.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import lax
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints


def flat(support, event_shape=()):
    """An improper uniform prior on ``support``."""
    return dist.ImproperUniform(support, (), event_shape)


def eight_schools(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        eta = numpyro.sample("eta", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def eight_schools_centered(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def ar(lags, y):
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([lags.shape[-1]]))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def garch(y, sigma1):
    mu = numpyro.sample("mu", flat(constraints.real))
    alpha0 = numpyro.sample("alpha0", flat(constraints.positive))
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0, 1))
    share = numpyro.sample("share", dist.Uniform(0, 1))
    numpyro.factor("jacobian", jnp.log1p(-alpha1))
    beta1 = (1 - alpha1) * share

    def step(variance, value):
        following = alpha0 + alpha1 * (value - mu) ** 2 + beta1 * variance
        return following, following

    first = jnp.asarray(sigma1**2, y.dtype)
    _, rest = lax.scan(step, first, y[:-1])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(jnp.concatenate([first[None], rest]))), obs=y)


def gp_regr(x, y):
    rho = numpyro.sample("rho", dist.Gamma(25, 4))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    kernel = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros_like(y), kernel), obs=y)


def diamonds(x, y):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([x.shape[-1]]))
    intercept = numpyro.sample("Intercept", dist.StudentT(3, 8, 10))
    sigma = numpyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3, 0, 10)))
    numpyro.sample("Y", dist.Normal(intercept + x @ b, sigma), obs=y)


def kidiq(x, y):
    beta = numpyro.sample("beta", flat(constraints.real, (x.shape[-1],)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("kid_score", dist.Normal(x @ beta, sigma), obs=y)


def nes(x, y):
    beta = numpyro.sample("beta", flat(constraints.real, (x.shape[-1],)))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    numpyro.sample("partyid7", dist.Normal(x @ beta, sigma), obs=y)


def seeds(x1, x2, total, n):
    alpha0, alpha1, alpha12, alpha2 = (
        numpyro.sample(name, dist.Normal(0, 1)) for name in ("alpha0", "alpha1", "alpha12", "alpha2")
    )
    sigma = numpyro.sample("sigma", dist.HalfCauchy(1))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([len(n)]))
    logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + sigma * z
    numpyro.sample("n", dist.Binomial(total.astype(int), logits=logits), obs=n.astype(int))


def radon(x, county, counties, y):
    mu_alpha = numpyro.sample("mu_alpha", dist.Normal(0, 10))
    sigma_alpha = numpyro.sample("sigma_alpha", dist.HalfNormal(1))
    raw = numpyro.sample("raw", dist.Normal(0, 1).expand([counties]))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([x.shape[-1]]))
    sigma_y = numpyro.sample("sigma_y", dist.HalfNormal(1))
    alpha = mu_alpha + sigma_alpha * raw
    numpyro.sample("log_radon", dist.Normal(alpha[county] + x @ beta, sigma_y), obs=y)


def irt_2pl(y):
    sigma_theta = numpyro.sample("sigma_theta", dist.HalfCauchy(2))
    sigma_a = numpyro.sample("sigma_a", dist.HalfCauchy(2))
    mu_b = numpyro.sample("mu_b", dist.Normal(0, 5))
    sigma_b = numpyro.sample("sigma_b", dist.HalfCauchy(2))
    z = numpyro.sample("z", dist.Normal(0, 1).expand([y.shape[1]]))
    z_a = numpyro.sample("z_a", dist.Normal(0, 1).expand([y.shape[0], 1]))
    z_b = numpyro.sample("z_b", dist.Normal(0, 1).expand([y.shape[0], 1]))
    logits = jnp.exp(sigma_a * z_a) * (sigma_theta * z - (mu_b + sigma_b * z_b))
    numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def ionosphere(x, y):
    w = numpyro.sample("w", dist.Normal(0, 1).expand([x.shape[-1]]))
    numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def forward_algorithm(theta1, theta2, emission):
    """The log-likelihood of a two-state chain from emission log-densities ``(T, 2)``; the first state has no prior weight."""
    transition = jnp.log(jnp.stack([theta1, theta2]))

    def step(log_weight, log_emission):
        return logsumexp(log_weight[:, None] + transition, axis=0) + log_emission, None

    return logsumexp(lax.scan(step, emission[0], emission[1:])[0])


def hmm_example(y):
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", flat(constraints.positive_ordered_vector, (2,)))
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1).log_prob(mu).sum())
    numpyro.factor("y", forward_algorithm(theta1, theta2, dist.Normal(mu, 1).log_prob(y[:, None])))


def hmm_drive(alpha, u, v):
    prior = dist.Normal(jnp.array([0.0, 3.0]), 1)
    theta1 = numpyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(alpha[1]))
    phi = numpyro.sample("phi", flat(constraints.positive_ordered_vector, (2,)))
    lambda_ = numpyro.sample("lambda", flat(constraints.positive_ordered_vector, (2,)))
    numpyro.factor("rate_prior", (prior.log_prob(phi) + prior.log_prob(lambda_)).sum())
    emission = dist.Exponential(phi).log_prob(u[:, None]) + dist.Exponential(lambda_).log_prob(v[:, None])
    numpyro.factor("uv", forward_algorithm(theta1, theta2, emission))


def gauss_mix(y):
    mu = numpyro.sample("mu", flat(constraints.ordered_vector, (2,)))
    numpyro.factor("mu_prior", dist.Normal(0, 2).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5, 5))
    weights = jnp.log(jnp.stack([theta, 1 - theta]))
    numpyro.factor("y", logsumexp(weights + dist.Normal(mu, sigma).log_prob(y[:, None]), axis=-1).sum())


def lotka_volterra(y_init, y, step=0.25):
    """Prey and predator once a year, by RK4 on logarithms."""
    theta = numpyro.sample("theta", flat(constraints.positive, (4,)))
    prior = dist.Normal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]))
    numpyro.factor("theta_prior", prior.log_prob(theta).sum())
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.log(10.0), 1).expand([2]))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1, 1).expand([2]))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=y_init)

    def slope(log_z):
        prey, predator = jnp.exp(log_z)
        return jnp.stack([theta[0] - theta[1] * predator, theta[3] * prey - theta[2]])

    def runge_kutta(log_z, _):
        first = slope(log_z)
        second = slope(log_z + step / 2 * first)
        third = slope(log_z + step / 2 * second)
        fourth = slope(log_z + step * third)
        return log_z + step / 6 * (first + 2 * second + 2 * third + fourth), None

    def year(log_z, _):
        log_z, _ = lax.scan(runge_kutta, log_z, None, length=round(1 / step))
        return log_z, log_z

    _, log_z = lax.scan(year, jnp.log(z_init), None, length=len(y))
    numpyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


MODELS = {
    "eight_schools": eight_schools,
    "eight_schools_centered": eight_schools_centered,
    "arK": ar,
    "garch": garch,
    "gp_regr": gp_regr,
    "hmm_example": hmm_example,
    "hmm_drive": hmm_drive,
    "gauss_mix": gauss_mix,
    "lotka_volterra": lotka_volterra,
    "diamonds": diamonds,
    "kidiq": kidiq,
    "nes": nes,
    "seeds": seeds,
    "radon": radon,
    "irt_2pl": irt_2pl,
    "ionosphere": ionosphere,
}
