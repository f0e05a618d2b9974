"""The recipes whose layers draw an index, returning a :class:`~pyro_flows.stochastic.StochasticFlow`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..distributions import Gaussian
from ..errors import OptionError
from ..stochastic import ARLWTA, ContinuouslyIndexed, Langevin, LWTACoupling, Metropolis, StochasticFlow, StochasticLayer
from ..transforms import Coupling, FlowTransform
from ..univariate import Affine, Univariate
from . import stacks

__all__ = ["lwta", "ar_lwta", "cif", "snf"]

Layers = list[StochasticLayer | FlowTransform]


def lwta(
    dim: int,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    units: int = 8,
    blocks: int = 2,
    groups: int = 1,
    placement: Literal["base", "interleaved"] = "base",
    spread: float = 2.0,
    univariate: Univariate | None = None,
    base: nn.Module | None = None,
    max_paths: int = 256,
) -> StochasticFlow:
    """Blocks of competing units and affine couplings (local winner takes all).

    Args:
        transforms: number of couplings without competition.
        hidden_features: widths of each conditioner.
        units: competing maps of each block.
        blocks: number of blocks, which take halves of the coordinates in turn.
        groups: local groups of the coordinates that a block moves, each with a competition of its own.
        placement: ``"base"``: all blocks next to the base, where their sum costs least; ``"interleaved"``: two of them there, and the others
            between the couplings.
        spread: how far from zero the units of a block put their coordinates at the start.
        univariate: the map of units and couplings; affine by default.
        max_paths: paths that are summed out exactly, ``units ** (blocks - 1)`` at the least for ``groups=1``, since the block next to the base is
            a small sum.

    Cost: a sample takes one pass; a density as many passes of the lower layers as there are paths. Reference: Nonparametric Bayesian deep networks
    with local competition (Panousis et al., 2019), https://arxiv.org/abs/1805.07624, for the gate
    """
    if placement not in ("base", "interleaved"):
        raise OptionError(f'lwta: placement must be "base" or "interleaved", got {placement!r}')
    if not isinstance(blocks, int) or blocks < 1:
        raise OptionError(f"lwta: blocks must be a positive integer, got {blocks!r}")
    couplings = stacks.couplings(univariate or Affine(), dim, context_dim, transforms, hidden_features)
    first = torch.arange(dim) < (dim + 1) // 2
    layers: Layers = []
    for i in range(blocks):
        moved = first if i % 2 == 0 or dim == 1 else ~first
        layers.append(LWTACoupling(dim, units, univariate, moved, groups, context_dim, hidden_features, spread=spread))
    if placement == "base" or blocks <= 2:
        return StochasticFlow(dim if base is None else base, [*layers, *couplings], max_paths)
    above, share = layers[2:], len(couplings) / (blocks - 1)
    layers = layers[:2]
    for i in range(blocks - 1):
        layers += couplings[round(i * share) : round((i + 1) * share)]
        layers += above[i : i + 1]
    return StochasticFlow(dim if base is None else base, layers, max_paths)


def ar_lwta(
    dim: int,
    context_dim: int = 0,
    transforms: int = 3,
    hidden_features: Sequence[int] = (64, 64),
    units: int = 8,
    univariate: Univariate | None = None,
    base: nn.Module | None = None,
    max_paths: int = 256,
) -> StochasticFlow:
    """One competition a coordinate next to the base, whose ``units ** dim`` winners are a product of small sums, and autoregressive layers.

    Args:
        transforms: number of autoregressive layers above, whose density takes one pass.
        hidden_features: widths of each conditioner.
        units: competing maps of each coordinate.
        univariate: the map of units and layers; affine by default.
        base: base module of independent coordinates, standard normal by default.

    Cost: densities take one pass, samples ``dim`` dependent steps. Reference: Nonparametric Bayesian deep networks with local competition
    (Panousis et al., 2019), https://arxiv.org/abs/1805.07624, for the gate
    """
    order = torch.arange(stacks.check_sizes(dim, 1) and dim)
    layers: Layers = [ARLWTA(dim, units, univariate, order, context_dim, hidden_features)]
    if transforms:
        layers += stacks.autoregressions(univariate or Affine(), "density", dim, context_dim, transforms + 1, hidden_features)[1:]
    return StochasticFlow(dim if base is None else base, layers, max_paths)


def cif(
    dim: int,
    context_dim: int = 0,
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    index_dim: int = 1,
    index_features: Sequence[int] = (16, 16),
    univariate: Univariate | None = None,
    base: nn.Module | None = None,
) -> StochasticFlow:
    """Affine couplings, each behind a move and a scale that a normal index decides (CIF). Densities are lower bounds.

    Args:
        transforms: number of indexed couplings.
        hidden_features: widths of each conditioner.
        index_dim: size of each index.
        index_features: widths of the nets of the index.
        univariate: the couplings' map; affine by default.

    Cost: samples and bounds take one pass for each particle. Reference: Relaxing bijectivity constraints with continuously indexed normalising flows
    (Cornish et al., 2020), https://arxiv.org/abs/1909.13833
    """
    couplings = stacks.couplings(univariate or Affine(), dim, context_dim, transforms, hidden_features)
    layers: Layers = [
        ContinuouslyIndexed(layer, index_dim, index_features) if hasattr(layer, "net") else layer for layer in couplings
    ]
    return StochasticFlow(dim if base is None else base, layers)


def snf(
    dim: int,
    log_density: Callable[[Tensor], Tensor],
    transforms: int = 6,
    hidden_features: Sequence[int] = (64, 64),
    kernel: Literal["metropolis", "hamiltonian", "langevin"] = "metropolis",
    step_size: float = 0.1,
    steps: int = 5,
    univariate: Univariate | None = None,
    base: nn.Module | None = None,
) -> StochasticFlow:
    r"""Affine couplings and steps of Markov chains in turn, from the base's density to a given one (SNF).

    After each coupling chains run on :math:`(1 - \lambda) \log p_0 + \lambda \log p`, with :math:`\lambda` rising to 1. For targets whose
    density is known up to a constant: ``x, log_q = flow().sample_and_log_prob((n,), num_particles=0)`` gives draws whose weights
    ``log_density(x) - log_q`` are exact, in that their mean is the target's constant.

    Args:
        log_density: the target's, up to a constant, ``(*batch, dim) -> (*batch,)``, differentiable for chains with gradients.
        transforms: number of couplings.
        kernel: ``"metropolis"`` (random walks), ``"hamiltonian"`` (five leapfrog steps a proposal) or ``"langevin"``, which is differentiable.
        step_size, steps: of the chains.

    Cost: a pass, and ``steps`` energies or gradients after each coupling. Reference: Stochastic normalizing flows (Wu, Köhler & Noé, 2020),
    https://arxiv.org/abs/2002.06707
    """
    if kernel not in ("metropolis", "hamiltonian", "langevin"):
        raise OptionError(f'snf: kernel must be "metropolis", "hamiltonian" or "langevin", got {kernel!r}')
    start = Gaussian(dim) if base is None else base
    couplings = stacks.couplings(univariate or Affine(), dim, 0, transforms, hidden_features)
    count = sum(isinstance(layer, Coupling) for layer in couplings)
    layers: Layers = []
    done = 0
    for layer in couplings:
        layers.append(layer)
        if not isinstance(layer, Coupling):
            continue
        done += 1
        energy = _Between(start, log_density, done / count)
        if kernel == "langevin":
            layers += [Langevin(energy, dim, step_size**2 / 2) for _ in range(steps)]
        else:
            layers.append(Metropolis(energy, dim, step_size, steps, 5 if kernel == "hamiltonian" else 0))
    return StochasticFlow(start, layers)


class _Between:
    """The energy between a base and a target."""

    def __init__(self, base: nn.Module, log_density: Callable[[Tensor], Tensor], share: float) -> None:
        self.base, self.log_density, self.share = base, log_density, share

    def __call__(self, x: Tensor) -> Tensor:
        return -(1 - self.share) * self.base().log_prob(x) - self.share * self.log_density(x)
