"""The block of a guide that lives on a torus: the angles' location, spread and dependence, and a flow of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..manifolds import ManifoldTransform, Torus, TorusCoupling, TorusElementwise
from ..model.sites import LatentSite
from ..nets import Hypernetwork
from ..numerics import triangle
from ..transforms import Compose, FlowTransform
from ..univariate import CircularGather, CircularSpline
from .angle_profiles import AngleProfiles
from .block import Block, Layers, Start, UniformPoints, index_of
from .modes import angle_profiles, far_mass

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AngleBlock", "AngleCentres", "angle_shapes"]

_WIDE = 1.0  # radians: an angle with a larger spread starts evenly
_TAIL = 12.0  # minus the log weight of the tails around a centre, at first
_NEGLIGIBLE = 1e-3  # the share of the mass far away that means another mode
_TURNING_UP_TO = 300  # angles: with more, angles do not depend on each other linearly, which takes one number a pair


class AngleCentres(ManifoldTransform):
    r"""Gathers each of several uniform angles around a centre of its own, and makes each depend on those before.

    .. math:: g_i = \mathrm{gather}(\mathrm{profile}_i(\theta_i); \eta_i(c)), \qquad
        \theta'_i = \mu_i + g_i + \sum_{j<i} (K_{ij} g_j + W_{ij} \sin g_j)

    ``gather`` is :class:`~pyro_flows.univariate.CircularGather`, whose parameters :math:`\eta`, a shift among them, are linear in the context;
    ``profile`` is :class:`~pyro_flows.guides.angle_profiles.AngleProfiles`. A narrow normal distribution of context and angles has nearly this form,
    its correlations included: the integer part :math:`K` of a regression coefficient is exact, and the rest, :math:`|W| \le 1/2`, is nearly so while
    the spread of angles is less than about half a radian. Centres :math:`\mu`, profiles and :math:`K` are buffers; all starts at the identity.

    Args:
        dim: number of angles.
        context_dim: size of the context; 0 for none.

    Cost: one pass forward, which is sampling; ``dim`` short steps and a root back.
    """

    poles: Tensor
    winds: Tensor

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__(Torus(dim), context_dim)
        self.gather, self.profiles = CircularGather(), AngleProfiles(dim)
        self.params = Hypernetwork((dim, self.gather.num_params), context_dim)
        self.turns = nn.Parameter(torch.zeros(dim, dim)) if 1 < dim <= _TURNING_UP_TO else None
        self.register_buffer("poles", torch.zeros(dim))
        self.register_buffer("winds", torch.zeros(dim, dim))  # K, below the diagonal: integers, in the angles' dtype

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.profiles.forward_and_ladj(x)
        y, log_slope = self.gather.forward(x, self.params(context).expand(*x.shape, -1))
        turned = y if self.turns is None else y + self._turn(y, self.turns)
        return self.manifold.project(self.poles + turned), log_slope.sum(-1) + ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = y - self.poles
        if self.turns is not None:
            before = self.manifold.project(y[..., :1])
            for i in range(1, self.dim):
                one = slice(i, i + 1)
                before = torch.cat([before, self.manifold.project(y[..., one] - self._turn(before, self.turns, one))], -1)
            y = before
        x, log_slope = self.gather.inverse(self.manifold.project(y), self.params(context).expand(*y.shape, -1))
        x, ladj = self.profiles.inverse_and_ladj(x)
        return x, log_slope.sum(-1) + ladj

    def _turn(self, g: Tensor, turns: Tensor, turned: slice = slice(None)) -> Tensor:
        """What the first angles add to some others, ``(*batch, k) -> (*batch, turned)``."""
        k = g.shape[-1]
        return g @ self.winds[turned, :k].mT + g.sin() @ turns.tril(-1)[turned, :k].mT

    @torch.no_grad()
    def start_at(self, poles: Tensor, on_context: Tensor | None = None, scale_tril: Tensor | None = None, profiles: Tensor | None = None) -> None:
        """Start as a normal distribution of angles around ``poles (dim,)``.

        Args:
            poles: the centres, radians.
            on_context: regression coefficients of the angles on the context, ``(dim, context_dim)``.
            scale_tril: Cholesky factor of their covariance given the context, ``(dim, dim)``, radians.
            profiles: the log density of each angle given all else, ``(dim, 256)``, from :func:`~pyro_flows.guides.modes.angle_profiles`.

        An angle with a large spread, or with mass far away in its profile, starts with that profile instead, independent of all others; without
        profiles it starts uniform. So do all angles without a ``scale_tril``.
        """
        self.poles.copy_(self.manifold.project(poles))
        for parameter in self.parameters():
            parameter.zero_()
        self.winds.zero_()
        self.profiles.tabulate(torch.zeros_like(self.profiles.density))
        if scale_tril is None or on_context is None:
            return
        spread, own = torch.cat([on_context, scale_tril], -1).norm(dim=-1), scale_tril.diagonal()
        narrow = spread < _WIDE
        if profiles is not None:
            narrow = narrow & (far_mass(profiles, spread) < _NEGLIGIBLE)
            self.profiles.tabulate(torch.where(narrow.unsqueeze(-1), 0.0, profiles))
        both = narrow & narrow.unsqueeze(-1)
        turns = torch.where(both, scale_tril / own, 0.0).tril(-1) * (self.turns is not None)
        self.params.bias.copy_(torch.where(narrow.unsqueeze(-1), self.gather.around(own, _TAIL), 0.0))
        if self.params.linear is not None:  # what angles depend on the context by themselves, not through angles before them
            unit = turns + torch.eye(self.dim).to(turns)
            direct = torch.linalg.solve_triangular(unit, torch.where(narrow.unsqueeze(-1), on_context, 0.0), upper=False, unitriangular=True)
            self.params.linear.weight.view(self.dim, self.gather.num_params, -1)[:, 2] = direct
        if self.turns is not None:
            self.winds.copy_(turns.round())
            self.turns.copy_(turns - turns.round())


def angle_shapes(dim: int, context_dim: int) -> FlowTransform:
    """Couplings of all angles by circular splines, then a spline for each. Starts at the identity."""
    layers: list[FlowTransform] = []
    if dim > 1:
        even = torch.arange(dim) % 2 == 0
        layers = [TorusCoupling(CircularSpline(), dim, moved, context_dim) for moved in (even, ~even, even, ~even)]
    return Compose([*layers, TorusElementwise(CircularSpline(), dim, context_dim)])


@dataclass(frozen=True)
class AngleBlock(Block):
    """All angles of all sites."""

    @classmethod
    def of(cls, sites: Sequence[LatentSite]) -> list[Self]:
        own = [s for s in sites if s.manifold is not None and s.manifold.kind == Torus.kind]
        index = index_of(own) if own else torch.empty(0)
        return [cls(index, Torus(len(index)))] if own else []

    def build(self, sites: Sequence[LatentSite], loc: Tensor, context_dim: int, config: Mapping[str, Any]) -> tuple[nn.Module, Compose]:
        dim = len(self.index)
        centres = AngleCentres(dim, context_dim)
        centres.start_at(loc.to(centres.poles))
        shapes = [angle_shapes(dim, context_dim)] if config["flow"] is not None else []
        return UniformPoints(self.space, self.count), Compose([*shapes, centres])

    def lift(self, run: Tensor) -> tuple[Tensor, float]:
        """Wrapped."""
        return self.space.project(run), 0.0

    def loc(self, layers: Layers) -> Tensor:
        return _centres(layers).poles

    def start_at(self, layers: Layers, start: Start, before: Tensor) -> bool:
        index = self.index.to(start.loc.device)
        joint, k = triangle(start.scale_tril[torch.cat([before, index])]), len(before)
        profiles = None
        if start.log_density is not None:
            profiles = angle_profiles(start.log_density, start.loc, index) * _marginal_power(start, index)
        _centres(layers).start_at(start.loc[index], joint[k:, :k], joint[k:, k:], profiles)
        return False


def _centres(layers: Layers) -> AngleCentres:
    return cast(AngleCentres, layers[-1])


def _marginal_power(start: Start, index: Tensor) -> Tensor:
    """The power that makes a normal density of a coordinate given all others as wide as its marginal one, ``(k, 1)``."""
    return 1 / (start.precision.diagonal()[index] * start.scale_tril[index].square().sum(-1)).unsqueeze(-1)
