"""Layers that simulate an energy: steps of Langevin dynamics and of Metropolis chains, with the weights that make them exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError
from .layer import Law, Move, StochasticLayer, standard_normal

__all__ = ["Langevin", "Metropolis"]

Energy = Callable[[Tensor], Tensor]  # (*batch, D) -> (*batch,): minus a log density, up to a constant


def _gradient(energy: Energy, x: Tensor) -> Tensor:
    """The energy's gradient at ``x``; differentiable where a gradient is being recorded."""
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(energy(at).sum(), at, create_graph=record)[0]


def _check_step(name: str, step_size: float) -> None:
    if not 0 < step_size < math.inf:
        raise OptionError(f"{name}: step_size must be positive and finite, got {step_size!r}")


class Langevin(StochasticLayer):
    r"""One step of overdamped Langevin dynamics, and the same step back as the inference kernel.

    .. math:: x = z - \epsilon \nabla E(z) + \sqrt{2 \epsilon}\, w, \quad w \sim N(0, I), \qquad
        z = x - \epsilon \nabla E(x) + \sqrt{2 \epsilon}\, u, \quad u \sim q = N(0, I)

    The index is the noise ``u`` of the way back. The ratio of the two kernels is the weight of stochastic normalizing flows,
    :math:`\log q - \log p = (|w|^2 - |u|^2) / 2`.

    Args:
        energy: :math:`E`, from points ``(*batch, D)`` to ``(*batch,)``, differentiable.
        dim: number of coordinates :math:`D`.
        step_size: :math:`\epsilon` at the start; it is learned.

    Cost: two gradients of the energy.

    Reference: Stochastic normalizing flows (Wu, Köhler & Noé, 2020), https://arxiv.org/abs/2002.06707
    """

    def __init__(self, energy: Energy, dim: int, step_size: float = 0.01) -> None:
        super().__init__(dim, dim)
        _check_step("Langevin", step_size)
        self.energy = energy
        self.log_step = nn.Parameter(torch.tensor(float(step_size)).log())

    def _drift(self, x: Tensor) -> Tensor:
        return x - self.log_step.exp() * _gradient(self.energy, x)

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        w, scale = torch.randn_like(z), (2 * self.log_step.exp()).sqrt()
        x = self._drift(z) + scale * w
        return (z - self._drift(x)) / scale, Move(x, z.new_zeros(z.shape[:-1]), standard_normal(w))

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        scale = (2 * self.log_step.exp()).sqrt()
        z = self._drift(x) + scale * u
        return Move(z, z.new_zeros(z.shape[:-1]), standard_normal((x - self._drift(z)) / scale))

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros_like(x), 1.0, validate_args=False).to_event(1)


class Metropolis(StochasticLayer):
    r"""Steps of a Metropolis chain that leaves :math:`e^{-E}` invariant: a random walk, or Hamiltonian dynamics.

    The chain run again is the inference kernel, and the index is the point it came from. By detailed balance the ratio of the two needs no
    density of a step: :math:`\log p(u \mid z) - \log q(u \mid x) = E(z) - E(x)`.

    Args:
        energy: :math:`E`, from points ``(*batch, D)`` to ``(*batch,)``; differentiable if ``leapfrog > 0``.
        dim: number of coordinates.
        step_size: of the proposals.
        steps: proposals, one after the other.
        leapfrog: steps of Hamiltonian dynamics of a proposal; 0 for a normal random walk.

    Draws carry no gradient through what was accepted, so such a flow has no ``rsample``, and bounds train by ``"rws"``.

    Cost: an energy a proposal, or ``leapfrog + 1`` gradients. References: Stochastic normalizing flows (Wu, Köhler & Noé, 2020),
    https://arxiv.org/abs/2002.06707; MCMC using Hamiltonian dynamics (Neal, 2012), https://arxiv.org/abs/1206.1901
    """

    reparameterized = False

    def __init__(self, energy: Energy, dim: int, step_size: float = 0.1, steps: int = 1, leapfrog: int = 0) -> None:
        super().__init__(dim, dim)
        _check_step("Metropolis", step_size)
        for name, value, least in (("steps", steps, 1), ("leapfrog", leapfrog, 0)):
            if not isinstance(value, int) or value < least:
                raise OptionError(f"Metropolis: {name} must be an integer of at least {least}, got {value!r}")
        self.energy, self.step_size, self.steps, self.leapfrog = energy, step_size, steps, leapfrog

    @torch.no_grad()
    def run(self, z: Tensor) -> Tensor:
        """The chain's end."""
        energy = self.energy(z)
        for _ in range(self.steps):
            proposed, kinetic = self._propose(z)
            new = self.energy(proposed)
            accepted = torch.rand_like(energy).log() < energy - new + kinetic  # not a number is refused
            z, energy = torch.where(accepted.unsqueeze(-1), proposed, z), torch.where(accepted, new, energy)
        return z

    def _propose(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A proposal, and what kinetic energy it has lost."""
        momentum = torch.randn_like(z)
        if not self.leapfrog:
            return z + self.step_size * momentum, z.new_zeros(z.shape[:-1])
        before = 0.5 * (momentum**2).sum(-1)
        momentum = momentum - 0.5 * self.step_size * _gradient(self.energy, z)
        for i in range(self.leapfrog):
            z = z + self.step_size * momentum
            share = 0.5 if i == self.leapfrog - 1 else 1.0
            momentum = momentum - share * self.step_size * _gradient(self.energy, z)
        return z, before - 0.5 * (momentum**2).sum(-1)

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        x = z + (self.run(z) - z).detach()  # the step, as a shift that does not depend on z
        return z, Move(x, z.new_zeros(z.shape[:-1]), self.energy(z) - self.energy(x))

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        return Move(u, x.new_zeros(torch.broadcast_shapes(x.shape[:-1], u.shape[:-1])), self.energy(u) - self.energy(x))

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        return _ChainBack(self, x)


class _ChainBack(dist.TorchDistribution):
    """Where the chain came from: its density is left out of both kernels, as their ratio is known."""

    arg_constraints: dict = {}
    support = dist.constraints.real_vector

    def __init__(self, chain: Metropolis, x: Tensor) -> None:
        self.chain, self.x = chain, x
        super().__init__(x.shape[:-1], x.shape[-1:], validate_args=False)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        return self.chain.run(self.x.expand(*sample_shape, *self.x.shape))

    @property
    def mean(self) -> Tensor:
        """Where it is now, as a guess."""
        return self.x

    def log_prob(self, value: Tensor) -> Tensor:
        return value.new_zeros(value.shape[:-1])
