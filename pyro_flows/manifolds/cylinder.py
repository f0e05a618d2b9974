"""The autoregressive flow of the sphere, height by height."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..nets import MaskedMLP
from ..nets.mlp import Activation
from ..univariate import CircularSpline, IntervalSpline
from .geometry import Sphere
from .sphere_maps import log_widening
from .transform import ManifoldTransform, widened

__all__ = ["CylinderAutoregressive"]


class CylinderAutoregressive(ManifoldTransform):
    r"""Takes the sphere apart into heights and an angle, and moves each given the ones before it.

    The height :math:`r_n = x_n` leaves a point of a smaller sphere, which has a height :math:`r_{n-1}`, and so on down to a circle with an angle.
    Heights move by splines of :math:`[-1, 1]`, the angle by a circular one, with parameters from a masked network that sees the heights before.

    .. math:: R = g'_2(\theta) \prod_{i=3}^n g_i'(r_i) \left(\frac{1 - g_i^2}{1 - r_i^2}\right)^{(i-3)/2}

    Where an earlier height is at a pole, later ones mean nothing; their parameters are multiplied by :math:`1 - r^2` of the earlier heights, so maps
    end as the identity there and densities are continuous at the poles.

    Args:
        n: number of coordinates.
        context_dim: size of the context; 0 for none.
        direction: ``"density"`` or ``"sampling"``: which direction takes one pass of the network.
        bins: number of bins of each spline.
        hidden_features: widths of the network's hidden layers.
        activation: makes the network's activation.

    Cost: in the named direction one pass; in the other the same arithmetic in :math:`n - 1` steps. Starts at the identity.

    Raises:
        OptionError: an unknown direction.

    Reference: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428
    """

    def __init__(
        self,
        n: int,
        context_dim: int = 0,
        direction: Literal["density", "sampling"] = "density",
        bins: int = 8,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(Sphere(n), context_dim)
        if direction not in ("density", "sampling"):
            raise OptionError(f'CylinderAutoregressive: direction must be "density" or "sampling", got {direction!r}')
        self.direction, self.interval, self.circle = direction, IntervalSpline(bins), CircularSpline(bins)
        self.one_pass = "inverse" if direction == "density" else "forward"
        self.net = MaskedMLP(n - 1, self.interval.num_params, hidden_features, context_dim, activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, direction={self.direction!r}, bins={self.interval.bins}"

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, "forward", self.direction == "sampling")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, context, "inverse", self.direction == "density")

    def _map(self, x: Tensor, context: Tensor | None, way: str, one_pass: bool) -> tuple[Tensor, Tensor]:
        heights, widths, angle = _apart(widened(x)[0])
        columns = [*heights, angle]
        moved: list[Tensor] = []
        slopes: list[Tensor] = []
        factor = torch.ones_like(angle)  # of the parameters: what the conditioner's earlier heights leave of the sphere

        def step(i: int, params: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal factor
            univariate = self.interval if i < len(heights) else self.circle
            params = factor.unsqueeze(-1) * params.to(angle.dtype).view(*angle.shape, params.shape[-1])
            value, log_slope = getattr(univariate, way)(columns[i], params)
            seen = columns[i] if one_pass else value
            factor = factor * ((1 - seen) * (1 + seen)).clamp(min=0)
            moved.append(value)
            slopes.append(log_slope)
            return value.to(x).flatten(), log_slope.to(x).flatten()

        if one_pass:
            for i, params in enumerate(self.net(torch.stack(columns, -1).to(x), context).unbind(-2)):
                step(i, params)
        else:
            self.net.decode(step, x.shape[:-1], context)
        *new_heights, new_angle = moved
        ladj, left, columns = slopes[-1], torch.ones_like(angle), []
        for i, (g, width, log_slope) in enumerate(zip(new_heights, widths, slopes, strict=False)):
            widening = log_widening(g, width, log_slope)
            ladj = ladj + log_slope + (self.dim - i - 3) / 2 * widening
            columns.append(left * g)
            left = left * (width.clamp(min=0) * widening.exp()).clamp(min=torch.finfo(width.dtype).tiny).sqrt()
        columns += [left * new_angle.sin(), left * new_angle.cos()]
        return torch.stack(columns[::-1], -1).to(x), ladj.to(x)


def _apart(x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The heights ``r_n, .., r_3``, the ``1 - r^2`` that go with them, and the angle; at a pole, what is left is put at height or angle zero."""
    columns = x.unbind(-1)
    tiny = torch.finfo(x.dtype).tiny ** 0.5
    heights, widths = [], []
    below = (x[..., :2] * x[..., :2]).sum(-1)
    angle = torch.atan2(columns[1], torch.where(below > tiny, columns[0], torch.ones_like(below)))
    for column in columns[2:]:
        whole = below + column * column
        whole = torch.where(whole > tiny, whole, torch.ones_like(whole))
        heights.append(column / whole.sqrt())
        widths.append(below / whole)
        below = below + column * column
    return heights[::-1], widths[::-1], angle
