"""Flows that move points through extra coordinates, whose density is known by a lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..errors import IntractableError, OptionError, ShapeError
from ..nets import MLP
from ..transforms import Standardize
from ..univariate.affine import soft_clamp
from .flow import Flow, FlowDistribution, standardization

__all__ = ["AugmentedDistribution", "AugmentedFlow"]

_LOG_SCALE_BOUND = 8.0  # of q(a | x): far from the data its net would give scales of zero or infinity

GRADIENTS = ("total",)  # of the bound

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]


class AugmentedDistribution(dist.TorchDistribution):
    r"""The first coordinates of a joint distribution; the others are not seen. Draws are exact, densities are bounded from below.

    .. math:: \log p(x) \ge E \log \frac1K \sum_{k=1}^K \frac{p(x, a_k)}{q(a_k \mid x)}, \qquad a_k \sim q(a \mid x)

    Args:
        joint: the distribution of ``(x, a)``.
        dim: size of ``x``.
        encode: location and log scale of the normal ``q(a | x)``.
    """

    exact = False  # the density is not known
    has_rsample = True
    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, joint: FlowDistribution, dim: int, encode: Encoder) -> None:
        super().__init__(joint.batch_shape, torch.Size([dim]), validate_args=False)
        self.joint, self.encode = joint, encode

    def expand(self, batch_shape: Any, _instance: Any = None) -> AugmentedDistribution:
        return AugmentedDistribution(self.joint.expand(torch.Size(batch_shape)), self.event_shape[0], self.encode)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.joint.rsample(torch.Size(sample_shape))[..., : self.event_shape[0]]

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.joint.sample(torch.Size(sample_shape))[..., : self.event_shape[0]]

    def log_prob(self, value: Tensor) -> NoReturn:
        """Not known.

        Raises:
            IntractableError: always.
        """
        raise IntractableError(
            "the density of an augmented flow is an integral over extra coordinates: use log_prob_bound(x, num_particles), a lower bound"
        )

    def log_prob_bound(self, value: Tensor, num_particles: int = 1, gradient: str = "total") -> Tensor:
        """A random lower bound of the log density, ``(*batch,)``: its mean is at most the log density, and rises to it with ``num_particles``.

        Args:
            value: points ``(*batch, dim)``.
            num_particles: draws of the extra coordinates.
            gradient: ``"total"``, that of the bound itself; there is no other here.
        """
        if gradient not in GRADIENTS:
            raise OptionError(f"gradient={gradient!r} is not known to an augmented flow: use {', '.join(GRADIENTS)}")
        if not isinstance(num_particles, int) or num_particles < 1:
            raise OptionError(f"num_particles must be a positive integer, got {num_particles!r}")
        if value.dim() == 0 or value.shape[-1:] != self.event_shape:
            raise ShapeError(f"points must have shape (*batch, {self.event_shape[0]}), got {tuple(value.shape)}")
        q = self._inferred(value)
        return self._log_weights(q, value, q.rsample((num_particles,))).logsumexp(0) - math.log(num_particles)

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: Any = (), num_particles: int = 16) -> tuple[Tensor, Tensor]:
        r"""Draws, and a random upper bound of their log density, which falls to it with ``num_particles``.

        The draw's own extra coordinates :math:`a_0` are averaged with fresh ones:

        .. math:: \log p(x) \le E \log \frac{1}{K+1} \sum_{k=0}^K \frac{p(x, a_k)}{q(a_k \mid x)}

        Reference: Importance weighted hierarchical variational inference (Sobolev & Vetrov, 2019), https://arxiv.org/abs/1905.03290
        """
        value, own = self.joint.sample(torch.Size(sample_shape)).tensor_split([self.event_shape[0]], -1)
        q = self._inferred(value)
        extra = torch.cat([own.unsqueeze(0), q.sample((num_particles,))])
        return value, self._log_weights(q, value, extra).logsumexp(0) - math.log(num_particles + 1)

    def _inferred(self, value: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.encode(value)
        return dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)

    def _log_weights(self, q: dist.TorchDistribution, value: Tensor, extra: Tensor) -> Tensor:
        """``log p(x, a) - log q(a | x)`` at draws ``(K, *batch, extra)``."""
        points = torch.cat([value.expand(*extra.shape[:-1], -1), extra], -1)
        return self.joint.log_prob(points) - q.log_prob(extra)


class AugmentedFlow(Flow):
    r"""A flow of points ``x`` and extra coordinates ``a``, of which only ``x`` is seen.

    A flow is a homeomorphism: on a line it keeps the order of points, and in the plane it cannot part a disc from the ring around it. With extra
    coordinates points move past each other. The density of ``x`` is then an integral; calling the flow gives an :class:`AugmentedDistribution`,
    whose ``exact`` is ``False``, with ``log_prob_bound`` and without ``log_prob``. The normal ``q(a | x)`` of the bound has a net of its own.

    Args:
        flow: the joint flow, of more than ``dim`` coordinates.
        dim: number of coordinates of ``x``, the first ones.
        hidden_features: widths of the net of ``q(a | x)``.

    Raises:
        ShapeError: a joint flow with no coordinate to spare.

    References: Augmented neural ODEs (Dupont et al., 2019), https://arxiv.org/abs/1904.01681;
    Augmented normalizing flows (Huang et al., 2020), https://arxiv.org/abs/2002.07101

    Example:
        >>> import torch, pyro_flows as pf
        >>> flow = pf.flows.cnf(1, augment=1)
        >>> d = flow()
        >>> d.exact, d.sample((5,)).shape, d.log_prob_bound(torch.zeros(5, 1), num_particles=10).shape
        (False, torch.Size([5, 1]), torch.Size([5]))
    """

    def __init__(self, flow: Flow, dim: int, hidden_features: Sequence[int] = (64, 64)) -> None:
        super().__init__(flow.base, flow.transform)
        self._compiler = flow._compiler
        if not isinstance(dim, int) or not 0 < dim < flow.dim:
            raise ShapeError(f"AugmentedFlow: dim must be positive and below the joint flow's {flow.dim}, got {dim!r}")
        self._dim = dim
        self.encoder = MLP(dim + flow.context_dim, 2 * (flow.dim - dim), hidden_features)

    @property
    def dim(self) -> int:
        """Number of coordinates of a point, without the extra ones."""
        return getattr(self, "_dim", self.transform.dim)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a point, without the extra coordinates."""
        return torch.Size([self.dim])

    @property
    def bijective(self) -> bool:
        return False

    @property
    def traceable_layers(self) -> tuple[Any, ...]:
        """None: the extra coordinates of a point are not known."""
        return ()

    @property
    def exact(self) -> bool:
        return False

    @property
    def default_objective(self) -> str:
        return "elbo"

    @property
    def gradients(self) -> tuple[str, ...]:
        return GRADIENTS

    @property
    def inferred_kinds(self) -> set[bool]:
        return {False}

    @property
    def num_classes(self) -> int:
        return 0

    def forward(self, context: Tensor | None = None) -> AugmentedDistribution:
        return AugmentedDistribution(super().forward(context), self._dim, lambda x: self.encode(x, context))

    def encode(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Location and log scale of ``q(a | x)``, each ``(*batch, extra)``."""
        last = self.transform.layers[-1]
        if isinstance(last, Standardize):
            x = last.inverse_and_ladj(self._widened(x))[0][..., : self._dim]
        if context is not None:
            batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
            x = torch.cat([x.expand(*batch, -1), context.expand(*batch, -1)], -1)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        return loc, soft_clamp(log_scale, _LOG_SCALE_BOUND)

    def carry(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Where points go that start with zeros in the extra coordinates, ``(*batch, dim) -> (*batch, dim)``: a map that need not be invertible."""
        return self.transform.forward_and_ladj(self._widened(x), context)[0][..., : self._dim]

    def _widened(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(*x.shape[:-1], self.transform.dim - self._dim)], -1)

    def standardized(self, x: Any) -> AugmentedFlow:
        """As :meth:`Flow.standardized`; the extra coordinates stay as they are."""
        layer = standardization(self, x)
        loc = layer.loc.new_zeros(self.transform.dim)
        scale = torch.eye(self.transform.dim).to(loc)
        loc[: self._dim], scale[: self._dim, : self._dim] = layer.loc, layer.scale_tril
        wide = Flow(self.base, [*self.transform.layers, Standardize(loc, scale)])
        new = AugmentedFlow(wide if self._compiler is None else wide.compiled(), self._dim)
        new.encoder = self.encoder
        return new
