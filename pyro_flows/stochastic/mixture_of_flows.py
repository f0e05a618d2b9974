"""A mixture of whole flows, with an amortised guess at the component."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..nets import MLP
from ..transforms import FlowTransform
from .layer import Branches, DiscreteLayer, Law, Move

__all__ = ["MixtureOfFlows"]


class MixtureOfFlows(DiscreteLayer):
    r"""One of several transforms, chosen at random: :math:`x = f_k(z)` with probability :math:`\pi_k`.

    Up to ``max_paths`` components the density is their sum; beyond, a net :math:`q(k \mid x)` guesses the component and the flow gives a bound.

    Args:
        transforms: the transforms :math:`f_k`, of one size; those with a context share its size. Components that start equal stay equal: perturb
            them, or start them at different points.
        hidden_features: of the net that guesses.

    Cost: all transforms, at every point.

    Raises:
        OptionError: fewer than two transforms. ShapeError: transforms of different sizes.

    Reference: Variational mixture of normalizing flows (Pires & Figueiredo, 2020), https://arxiv.org/abs/2009.00585
    """

    def __init__(self, transforms: Sequence[FlowTransform], hidden_features: Sequence[int] = (32,)) -> None:
        transforms = list(transforms)
        if len(transforms) < 2 or not all(isinstance(t, FlowTransform) for t in transforms):
            raise OptionError("MixtureOfFlows: transforms must hold at least two FlowTransforms")
        dims, contexts = {t.dim for t in transforms}, {t.context_dim for t in transforms}
        if len(dims) > 1 or len(contexts) > 1:
            raise ShapeError(f"MixtureOfFlows: transforms differ in size: dims {sorted(dims)}, context_dims {sorted(contexts)}")
        dim, context_dim = dims.pop(), contexts.pop()
        super().__init__(dim, 1, context_dim)
        self.branch_count = self.choices = len(transforms)
        self.transforms = nn.ModuleList(transforms)
        self.logits = nn.Parameter(torch.zeros(self.choices))
        self.guess = MLP(dim + context_dim, self.choices, hidden_features)

    def _all(self, way: str, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Every component's image ``(*batch, K, D)`` and log determinant ``(*batch, K)``."""
        images, ladjs = zip(*(getattr(t, f"{way}_and_ladj")(value, context) for t in self.transforms), strict=True)
        return torch.stack(images, -2), torch.stack(ladjs, -1)

    def _move(self, way: str, value: Tensor, u: Tensor, context: Tensor | None) -> Move:
        images, ladj = self._all(way, value, context)
        batch = torch.broadcast_shapes(u.shape[:-1], ladj.shape[:-1])
        u = u.expand(*batch, 1)
        image = images.expand(*batch, *images.shape[-2:]).gather(-2, u.unsqueeze(-1).expand(*batch, 1, self.dim)).squeeze(-2)
        return Move(image, ladj.expand(*batch, -1).gather(-1, u).squeeze(-1), self.logits.log_softmax(0)[u.squeeze(-1)])

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        u = dist.Categorical(logits=self.logits, validate_args=False).sample(z.shape[:-1]).unsqueeze(-1)
        return u, self.push(z, u, context)

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        return self._move("forward", z, u, context)

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        return self._move("inverse", x, u, context)

    def branches(self, x: Tensor, context: Tensor | None = None) -> Branches:
        z, ladj = self._all("inverse", x, context)
        return Branches(z, ladj + self.logits.log_softmax(0), self.listing().to(z.device).expand(*z.shape[:-1], 1))

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        """The net's guess; ``law`` plays no part."""
        given = x if context is None else torch.cat([x, context.expand(*x.shape[:-1], -1)], -1)
        return dist.Categorical(logits=self.guess(given).unsqueeze(-2), validate_args=False).to_event(1)

    def best(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        return self.infer(x, context).base_dist.logits.argmax(-1)
