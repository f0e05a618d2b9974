"""Transforms of angles: maps of the circle in the structures of Euclidean flows, with conditioners that see cosines and sines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..nets import MaskedMLP
from ..nets.mlp import Activation
from ..transforms import Coupling, Elementwise
from ..transforms.autoregressive import Ordered
from ..univariate import Univariate
from .geometry import Torus
from .transform import ManifoldTransform, OnManifold

__all__ = ["TorusElementwise", "TorusCoupling", "TorusAutoregressive"]


def _circular(name: str, univariate: Univariate) -> Univariate:
    if not getattr(univariate, "circular", False):
        raise OptionError(f"{name}: {univariate} is a map of the line: give one of the circle, CircularSpline, MobiusMixture or CircularShift")
    return univariate


class TorusElementwise(OnManifold, Elementwise):
    r"""Moves each angle by a map of the circle with free parameters: :math:`\theta'_i = f(\theta_i; \eta_i)`.

    Args:
        univariate: the map, :class:`~pyro_flows.univariate.CircularSpline`, ``MobiusMixture`` or ``CircularShift``.
        dim: number of angles.
        context_dim: size of the context that the parameters may depend on (linearly); 0 for none.

    Angles lie in :math:`[-\pi, \pi]`. Cost: that of the map. Starts at the identity.
    """

    def __init__(self, univariate: Univariate, dim: int, context_dim: int = 0) -> None:
        super().__init__(_circular("TorusElementwise", univariate), dim, context_dim)
        self._live_on(Torus(dim))


class TorusCoupling(OnManifold, Coupling):
    r"""Keeps some angles and moves the others by maps of the circle that depend on cosines and sines of the kept ones.

    Args:
        univariate: the map, :class:`~pyro_flows.univariate.CircularSpline`, ``MobiusMixture`` or ``CircularShift``.
        dim: number of angles.
        moved, context_dim, hidden_features, activation: as in :class:`~pyro_flows.transforms.Coupling`.

    Angles lie in :math:`[-\pi, \pi]`. Cost: one pass of the conditioner in both directions. Starts at the identity.

    Reference: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428
    """

    _inputs_per_kept = 2

    def __init__(
        self,
        univariate: Univariate,
        dim: int,
        moved: Tensor | None = None,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(_circular("TorusCoupling", univariate), dim, moved, context_dim, hidden_features, activation)
        self._live_on(Torus(dim))

    def _seen(self, kept: Tensor) -> Tensor:
        return torch.cat([kept.cos(), kept.sin()], -1)


class TorusAutoregressive(ManifoldTransform, Ordered):
    r"""Moves each angle by a map of the circle that depends on cosines and sines of the angles before it.

    Args:
        univariate: the map, :class:`~pyro_flows.univariate.CircularSpline`, ``MobiusMixture`` or ``CircularShift``.
        dim: number of angles.
        direction: ``"density"`` or ``"sampling"``: which direction takes one pass.
        order: the order of the angles, a permutation of ``0 .. dim-1``.
        context_dim: size of the context; 0 for none.
        hidden_features: widths of the conditioner's hidden layers.
        activation: makes the conditioner's activation.

    Angles lie in :math:`[-\pi, \pi]`. Cost: one pass in the named direction, the same arithmetic in ``dim`` steps in the
    other. Starts at the identity.

    Raises:
        OptionError: a map of the line, or an unknown direction.
        ShapeError: an order that does not hold each of ``0 .. dim-1`` once.

    Reference: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428
    """

    def __init__(
        self,
        univariate: Univariate,
        dim: int,
        direction: Literal["density", "sampling"] = "density",
        order: Tensor | None = None,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(Torus(dim), context_dim)
        self._arrange(dim, direction, order)
        self.univariate = _circular("TorusAutoregressive", univariate)
        # Each angle is two inputs, its cosine and its sine; the outputs of the first of them, which see all angles before it, are its parameters.
        self.net = MaskedMLP(2 * dim, univariate.num_params, hidden_features, context_dim, activation)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, "forward", self.direction == "sampling")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, context, "inverse", self.direction == "density")

    def _map(self, value: Tensor, context: Tensor | None, way: str, one_pass: bool) -> tuple[Tensor, Tensor]:
        apply, value = getattr(self.univariate, way), value.index_select(-1, self.order)
        if one_pass:
            params = self.net(self.manifold.features(value), context)
            moved, log_slope = apply(value, params[..., ::2, :])
        else:
            columns = value.reshape(-1, self.dim).unbind(-1)
            results: list[tuple[Tensor, Tensor]] = []

            def step(i: int, params: Tensor) -> tuple[Tensor, Tensor]:
                if i % 2:
                    return results[-1][0].sin(), torch.zeros_like(results[-1][0])
                results.append(apply(columns[i // 2], params))
                return results[-1][0].cos(), results[-1][1]

            self.net.decode(step, value.shape[:-1], context)
            moved, log_slope = (torch.stack(parts, -1).reshape(value.shape) for parts in zip(*results, strict=True))
        return moved.index_select(-1, self.back), log_slope.sum(-1)
