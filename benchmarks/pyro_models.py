"""Sixteen reference posteriors as Pyro models; ``benchmarks.models`` pairs each with its data and its reference.

Every model runs on one particle (so that ``torch.func.vmap`` and ``make_fx`` apply) and, with its plates on the
right-most dimensions, on a leading batch of particles (so that ``Trace_ELBO(vectorize_particles=True)`` applies).
Vector parameters live in plates: a coefficient vector is then ``(K,)`` or ``(particles, K)``, and ``coef @ x.T`` is
right for both. Time is eliminated by scans of log2(T) steps where the recursion allows it. All constants take the dtype
of the data.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor


def flat(support: constraints.Constraint, event_shape: tuple[int, ...] = ()) -> dist.ImproperUniform:
    """An improper uniform prior on ``support``."""
    return dist.ImproperUniform(support, (), event_shape)


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    c = y.new_tensor
    mu = pyro.sample("mu", dist.Normal(c(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(c(5.0)))
    with pyro.plate("schools", len(y)):
        eta = pyro.sample("eta", dist.Normal(c(0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta, event_dim=0)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(sigma: Tensor, y: Tensor) -> None:
    c = y.new_tensor
    mu = pyro.sample("mu", dist.Normal(c(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(c(5.0)))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def ar(lags: Tensor, y: Tensor) -> None:
    """An autoregression; ``lags`` is (T, K), the latest value first."""
    c = y.new_tensor
    alpha = pyro.sample("alpha", dist.Normal(c(0.0), 10.0))
    with pyro.plate("lag", lags.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(c(0.0), 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(c(2.5)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(alpha + beta @ lags.T, sigma), obs=y)


def linear_recurrence(decay: Tensor, drive: Tensor) -> Tensor:
    """``v[t] = decay * v[t-1] + drive[t]`` along the last dimension, by doubling: log2(T) steps instead of T."""
    v, shift = drive, 1
    while shift < drive.shape[-1]:
        v = v + F.pad(decay * v[..., :-shift], (shift, 0))
        decay, shift = decay * decay, 2 * shift
    return v


def garch(y: Tensor, sigma1: float) -> None:
    c = y.new_tensor
    mu = pyro.sample("mu", flat(constraints.real))
    alpha0 = pyro.sample("alpha0", flat(constraints.positive))
    alpha1 = pyro.sample("alpha1", dist.Uniform(c(0.0), 1.0))
    share = pyro.sample("share", dist.Uniform(c(0.0), 1.0))
    pyro.factor("jacobian", torch.log1p(-alpha1))  # (alpha1, beta1), not (alpha1, share), is flat
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * share, event_dim=0)
    drive = F.pad(alpha0 + alpha1 * (y[:-1] - mu) ** 2, (1, 0), value=sigma1**2)
    variance = linear_recurrence(beta1, drive)
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


def gp_regr(x: Tensor, y: Tensor) -> None:
    c = y.new_tensor
    rho = pyro.sample("rho", dist.Gamma(c(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(c(2.0)))
    sigma = pyro.sample("sigma", dist.HalfNormal(c(1.0)))  # the noise variance
    rho, alpha, sigma = (v[..., None, None] for v in (rho, alpha, sigma))
    squared_distance = (x[:, None] - x) ** 2
    kernel = alpha**2 * torch.exp(-squared_distance / (2 * rho**2)) + sigma * torch.eye(len(x), dtype=x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(y), kernel), obs=y)


def forward_algorithm(theta1: Tensor, theta2: Tensor, emission: Tensor) -> Tensor:
    """The log-likelihood of a two-state chain, states summed out, from emission log-densities ``(*batch, 2, T)``.

    ``theta1``, ``theta2`` (*batch, 2) are the rows of the transition matrix; the first state has no weight but its
    emission. The T - 1 step matrices are multiplied pairwise, in log2(T) rounds, each product rescaled to sum 1. Time
    is the last dimension, which keeps the kernels long. (dist.DiscreteHMM scans too, but functorch refuses its custom
    logarithm.)
    """
    shift = emission.amax(-2).detach()
    weight = (emission - shift.unsqueeze(-2)).exp()
    steps = torch.stack([theta1, theta2], -2).unsqueeze(-1) * weight[..., None, :, 1:]
    log_scale = shift.sum(-1)
    while (length := steps.shape[-1]) > 1:
        paired = length - length % 2
        a, b, rest = steps[..., 0:paired:2], steps[..., 1:paired:2], steps[..., paired:]
        product = a[..., :, :1, :] * b[..., :1, :, :] + a[..., :, 1:, :] * b[..., 1:, :, :]
        total = product.sum((-3, -2), keepdim=True)
        log_scale = log_scale + total.log().sum((-3, -2, -1))
        steps = torch.cat([product / total, rest], -1)
    return log_scale + (weight[..., :, None, 0] * steps.squeeze(-1)).sum((-2, -1)).log()


def hmm_example(y: Tensor) -> None:
    c = y.new_tensor
    theta1 = pyro.sample("theta1", dist.Dirichlet(c([1.0, 1.0])))
    theta2 = pyro.sample("theta2", dist.Dirichlet(c([1.0, 1.0])))
    mu = pyro.sample("mu", flat(constraints.positive_ordered_vector, (2,)))
    pyro.factor("mu_prior", dist.Normal(c([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    pyro.factor("y", forward_algorithm(theta1, theta2, dist.Normal(mu.unsqueeze(-1), 1.0).log_prob(y)))


def hmm_drive(alpha: Tensor, u: Tensor, v: Tensor) -> None:
    """``alpha`` (2, 2): the Dirichlet concentrations of the rows; ``u``, ``v``: the two observed series."""
    prior = dist.Normal(u.new_tensor([0.0, 3.0]), 1.0)
    theta1 = pyro.sample("theta1", dist.Dirichlet(alpha[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(alpha[1]))
    phi = pyro.sample("phi", flat(constraints.positive_ordered_vector, (2,)))
    lambda_ = pyro.sample("lambda", flat(constraints.positive_ordered_vector, (2,)))
    pyro.factor("rate_prior", (prior.log_prob(phi) + prior.log_prob(lambda_)).sum(-1))
    u_emission = dist.Exponential(phi.unsqueeze(-1)).log_prob(u)
    v_emission = dist.Exponential(lambda_.unsqueeze(-1)).log_prob(v)
    pyro.factor("uv", forward_algorithm(theta1, theta2, u_emission + v_emission))


def gauss_mix(y: Tensor) -> None:
    c = y.new_tensor
    mu = pyro.sample("mu", flat(constraints.ordered_vector, (2,)))
    pyro.factor("mu_prior", dist.Normal(c(0.0), 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(c([2.0, 2.0])).to_event(1))
    theta = pyro.sample("theta", dist.Beta(c(5.0), 5.0))
    component = dist.Categorical(torch.stack([theta, 1 - theta], -1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(component, dist.Normal(mu, sigma)), obs=y)


def lotka_volterra(y_init: Tensor, y: Tensor, step: float = 0.25) -> None:
    """Prey and predator once a year; RK4 on logarithms, where both stay positive.

    With p = log(theta4 z1) and q = log(theta2 z2) the equations are dp = theta1 - exp(q), dq = exp(p) - theta3: no
    parameter but the growth rates enters a step, which keeps the captured gradient short. Time is in units of half a
    step, so that a Runge-Kutta slope is a half step.
    """
    c = y.new_tensor
    with pyro.plate("rate", 4):
        theta = pyro.sample("theta", flat(constraints.positive))
        pyro.factor("theta_prior", dist.Normal(c([1.0, 0.05, 1.0, 0.05]), c([0.5, 0.05, 0.5, 0.05])).log_prob(theta))
    species, years = pyro.plate("species", 2, dim=-1), pyro.plate("year", len(y), dim=-2)
    with species:
        z_init = pyro.sample("z_init", dist.LogNormal(c(10.0).log(), 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(c(-1.0), 1.0))
        pyro.sample("y_init", dist.LogNormal(z_init.log(), sigma), obs=y_init)
    sign = c([[-1.0, 1.0]])
    rates = torch.atleast_2d(theta * (step / 2))
    growth, log_interaction = -sign * rates[..., 0::2], rates[..., 1::2].flip(-1).log()

    def half_step(state: Tensor) -> Tensor:
        return torch.addcmul(growth, sign, state.flip(-1).exp())

    state, solution = torch.atleast_2d(z_init.log()) + log_interaction, []
    for _ in range(len(y)):
        for _ in range(round(1 / step)):
            second = state + half_step(state)
            third = state + half_step(second)
            fourth = state.add(half_step(third), alpha=2)
            state = (second - state + 2 * third + fourth + half_step(fourth)) / 3
        solution.append(state)
    log_z = torch.cat(solution, -2) - log_interaction
    with years, species:
        pyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


def diamonds(x: Tensor, y: Tensor) -> None:
    c = y.new_tensor
    with pyro.plate("predictor", x.shape[-1]):
        b = pyro.sample("b", dist.Normal(c(0.0), 1.0))
    intercept = pyro.sample("Intercept", dist.StudentT(c(3.0), 8.0, 10.0))
    sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(c(3.0), 0.0, 10.0)))
    with pyro.plate("n", len(y)):
        pyro.sample("Y", dist.Normal(intercept + b @ x.T, sigma), obs=y)


def kidiq(x: Tensor, y: Tensor) -> None:
    with pyro.plate("predictor", x.shape[-1]):
        beta = pyro.sample("beta", flat(constraints.real))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    with pyro.plate("n", len(y)):
        pyro.sample("kid_score", dist.Normal(beta @ x.T, sigma), obs=y)


def nes(x: Tensor, y: Tensor) -> None:
    with pyro.plate("predictor", x.shape[-1]):
        beta = pyro.sample("beta", flat(constraints.real))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    with pyro.plate("n", len(y)):
        pyro.sample("partyid7", dist.Normal(beta @ x.T, sigma), obs=y)


def seeds(x1: Tensor, x2: Tensor, total: Tensor, n: Tensor) -> None:
    c = n.new_tensor
    alpha0, alpha1, alpha12, alpha2 = (
        pyro.sample(name, dist.Normal(c(0.0), 1.0)) for name in ("alpha0", "alpha1", "alpha12", "alpha2")
    )
    sigma = pyro.sample("sigma", dist.HalfCauchy(c(1.0)))
    with pyro.plate("plates", len(n)):
        z = pyro.sample("z", dist.Normal(c(0.0), 1.0))
        b = pyro.deterministic("b", sigma * z, event_dim=0)
        logits = alpha0 + alpha1 * x1 + alpha2 * x2 + alpha12 * x1 * x2 + b
        pyro.sample("n", dist.Binomial(total, logits=logits), obs=n)


def radon(x: Tensor, county: Tensor, counties: int, y: Tensor) -> None:
    """``x`` is (N, 2): log uranium and floor; ``county`` the 0-based county of each house."""
    c = y.new_tensor
    mu_alpha = pyro.sample("mu_alpha", dist.Normal(c(0.0), 10.0))
    sigma_alpha = pyro.sample("sigma_alpha", dist.HalfNormal(c(1.0)))
    with pyro.plate("county", counties):
        raw = pyro.sample("raw", dist.Normal(c(0.0), 1.0))
        alpha = pyro.deterministic("alpha", mu_alpha + sigma_alpha * raw, event_dim=0)
    with pyro.plate("predictor", x.shape[-1]):
        beta = pyro.sample("beta", dist.Normal(c(0.0), 10.0))
    sigma_y = pyro.sample("sigma_y", dist.HalfNormal(c(1.0)))
    with pyro.plate("house", len(y)):
        pyro.sample("log_radon", dist.Normal(alpha.index_select(-1, county) + beta @ x.T, sigma_y), obs=y)


def irt_2pl(y: Tensor) -> None:
    """``y`` is (items, persons), 0 or 1."""
    c = y.new_tensor
    items, persons = pyro.plate("item", y.shape[0], dim=-2), pyro.plate("person", y.shape[1], dim=-1)
    sigma_theta = pyro.sample("sigma_theta", dist.HalfCauchy(c(2.0)))
    sigma_a = pyro.sample("sigma_a", dist.HalfCauchy(c(2.0)))
    mu_b = pyro.sample("mu_b", dist.Normal(c(0.0), 5.0))
    sigma_b = pyro.sample("sigma_b", dist.HalfCauchy(c(2.0)))
    with persons:
        z = pyro.sample("z", dist.Normal(c(0.0), 1.0))
        theta = pyro.deterministic("theta", sigma_theta * z, event_dim=0)
    with items:
        z_a = pyro.sample("z_a", dist.Normal(c(0.0), 1.0))
        z_b = pyro.sample("z_b", dist.Normal(c(0.0), 1.0))
        a = pyro.deterministic("a", (sigma_a * z_a).exp(), event_dim=0)
        b = pyro.deterministic("b", mu_b + sigma_b * z_b, event_dim=0)
        with persons:
            pyro.sample("y", dist.Bernoulli(logits=a * (theta - b)), obs=y)


def ionosphere(x: Tensor, y: Tensor) -> None:
    with pyro.plate("predictor", x.shape[-1]):
        w = pyro.sample("w", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=w @ x.T), obs=y)
