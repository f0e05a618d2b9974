"""A flow: a base distribution and the transforms that shape it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import Transform

from ..errors import DataError, OptionError, ShapeError, SupportError
from ..numerics.introspection import floating_tensor
from ..transforms import Compose, FlowTransform, Standardize
from ..transforms.memory import Remembering
from .abstract_flow import AbstractFlow
from .bases import Gaussian
from .compiled import Compiled, Compiler

__all__ = ["Flow", "FlowDistribution"]

AnyFlow = TypeVar("AnyFlow", bound="Flow")


class FlowDistribution(dist.TransformedDistribution):
    """What a :class:`Flow` gives when it is called: Pyro's ``TransformedDistribution`` with a fused density, and a fused draw-and-score.

    Shapes, support, ``expand``, plates and validation are torch's own.

    Args:
        base_distribution: the base distribution.
        transforms: a transform or a list of them, in the sampling direction.

    Raises:
        SupportError: a transform of directions or compositions after what gives other points, or the other way round.
    """

    def __init__(self, base_distribution: Any, transforms: Transform | list[Transform], validate_args: bool | None = None) -> None:
        super().__init__(base_distribution, transforms, validate_args)
        _check_supports(base_distribution, self.transforms)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """A copy with another batch shape."""
        return super().expand(batch_shape, self._get_checked_instance(FlowDistribution, _instance))

    def _validate_sample(self, value: Tensor) -> None:
        manifold = getattr(self.transforms[-1], "manifold", None) if self.transforms else None
        if manifold is None:
            super()._validate_sample(value)
        else:
            manifold.validate(value, self)  # which says how far from the manifold a point lies, and allows for rounding

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density ``(*batch,)`` at points ``(*batch, *event_shape)``: one pass of each transform's inverse.

        At a draw that the transforms have just made, and remember, nothing is inverted.
        """
        if self._validate_args:
            self._validate_sample(value)
        event_dim = len(self.event_shape)
        log_prob: Tensor | float = 0.0
        for transform in reversed(self.transforms):
            if isinstance(transform, Remembering):
                x, ladj = transform.inverse_and_forward_ladj(value)
            else:
                x = transform.inv(value)
                ladj = transform.log_abs_det_jacobian(x, value)
            event_dim += transform.domain.event_dim - transform.codomain.event_dim
            log_prob = log_prob - sum_rightmost(ladj, event_dim - transform.domain.event_dim)
            value = x
        return log_prob + sum_rightmost(self.base_dist.log_prob(value), event_dim - len(self.base_dist.event_shape))

    def rsample_and_log_prob(self, sample_shape: torch.Size | Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Reparameterised draws of shape ``sample_shape + batch_shape + event_shape``, and their log density, in one pass.

        This is the cheap way to a density at the flow's own draws: nothing is inverted.
        """
        draw = self.base_dist.rsample if self.base_dist.has_rsample or torch.is_grad_enabled() else self.base_dist.sample
        x = draw(torch.Size(sample_shape))  # rsample says that it is not implemented where a gradient would be lost
        event_dim = len(self.event_shape)
        log_prob = self.base_dist.log_prob(x)
        for transform in self.transforms:
            if isinstance(transform, Remembering):
                x, ladj = transform.forward_and_ladj(x)
            else:
                y = transform(x)
                ladj, x = transform.log_abs_det_jacobian(x, y), y
            log_prob = log_prob - sum_rightmost(ladj, event_dim - transform.codomain.event_dim)
        return x, log_prob

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: torch.Size | Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draws and their log density in one pass, without gradients."""
        return self.rsample_and_log_prob(sample_shape)

    def __repr__(self) -> str:
        names = ", ".join(type(t).__name__ for t in self.transforms)
        return f"{type(self).__name__}({self.base_dist}, [{names}], batch_shape: {self.batch_shape}, event_shape: {self.event_shape})"


_CURVED = (type(constraints.sphere), type(constraints.simplex))


def _check_supports(base: Any, transforms: Sequence[Transform]) -> None:
    """Raise a ``SupportError`` where directions or compositions meet a transform of something else: the measures of their densities differ."""
    try:
        current = _core(base.support)
    except NotImplementedError:  # a distribution that does not say
        return
    for transform in transforms:
        if not getattr(transform, "parts", True):  # the identity
            continue
        wanted = _core(transform.domain)
        if isinstance(current, _CURVED) != isinstance(wanted, _CURVED) or (isinstance(wanted, _CURVED) and type(current) is not type(wanted)):
            raise SupportError(
                f"FlowDistribution: {type(transform).__name__} moves points of {getattr(transform, 'manifold', None) or wanted}, and gets such of "
                f"{current}: give a base on the same manifold, such as pf.manifolds.Uniform(manifold)()"
            )
        current = _core(transform.codomain)


def _core(support: Any) -> Any:
    while isinstance(getattr(support, "base_constraint", None), constraints.Constraint):
        support = support.base_constraint
    return support


def standardization(flow: Any, x: Any) -> Standardize:
    """The layer that takes mean and standard deviation of rows ``x``, ``(N, dim)``, in the dtype and on the device of a flow."""
    rows = torch.as_tensor(x).detach()
    if rows.dim() != 2 or rows.shape[1] != flow.dim:
        raise ShapeError(f"standardized: x must have shape (N, {flow.dim}), got {tuple(rows.shape)}")
    like = floating_tensor(flow)
    like = torch.zeros(()) if like is None else like
    scale, loc = torch.std_mean(rows.double(), 0)
    unusable = (~(scale > 0) | ~torch.isfinite(scale)).nonzero()[:, 0].tolist()
    if unusable:
        raise DataError(f"standardized: columns {unusable} of x are constant or not finite")
    return Standardize(loc.to(like), scale.to(like).diag())


def _event_shape(base: nn.Module) -> torch.Size | None:
    """Shape of a base's points, where it says so: as ``event_shape``, or as ``dim`` for vectors."""
    dim = getattr(base, "dim", None)
    shape = getattr(base, "event_shape", None if dim is None else (dim,))
    return None if shape is None else torch.Size(shape)


class Flow(AbstractFlow):
    """A base distribution pushed through transforms, base to target.

    Args:
        base: a module whose call gives the base distribution (:mod:`pyro_flows.distributions`), or an integer for a standard normal of that size.
        transforms: a transform or a sequence of them, in the sampling direction.

    Calling it, ``flow()`` or ``flow(context)``, gives a :class:`FlowDistribution` with the transforms' ``event_shape``, ``(D,)`` for vectors, and the
    context's batch shape.

    Example:
        >>> import torch, pyro_flows as pf
        >>> flow = pf.flows.nsf(2)
        >>> flow().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    Raises:
        ShapeError: base and transforms have points of different shapes, or a context is missing or unexpected.
        SupportError: base and transforms live on different manifolds.
    """

    transform: FlowTransform
    base: nn.Module

    def __init__(self, base: nn.Module | int, transforms: FlowTransform | Sequence[FlowTransform]) -> None:
        super().__init__()
        self.transform = transforms if isinstance(transforms, FlowTransform) else Compose(transforms)
        self.base = Gaussian(base) if isinstance(base, int) else base
        if not isinstance(self.base, nn.Module):
            raise OptionError("Flow: base must be a module that gives a distribution when called (pf.distributions.Gaussian(dim)), or an integer")
        base_shape = _event_shape(self.base)
        if base_shape is not None and base_shape != self.event_shape:
            raise ShapeError(f"Flow: the base has points of shape {tuple(base_shape)}, the transforms of shape {tuple(self.event_shape)}")
        if getattr(self.base, "manifold", None) != self.transform.manifold:
            own, other = getattr(self.base, "manifold", None) or "R^D", self.transform.manifold or "R^D"
            raise SupportError(
                f"Flow: the base lives on {own}, the transforms on {other}: give a base on the same manifold, such as pf.manifolds.Uniform(manifold)"
            )
        self._compiler: Compiler | None = None

    @property
    def dim(self) -> int:
        """Number of coordinates of a point."""
        return self.transform.dim

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a point: ``(dim,)`` for vectors."""
        return self.transform.event_shape

    @property
    def context_dim(self) -> int:
        """Size of the context; 0 for an unconditional flow."""
        return self.transform.context_dim

    @property
    def layers(self) -> tuple[FlowTransform, ...]:
        """The transforms that the flow is composed of, base to target."""
        return self.transform.layers

    @property
    def manifold(self) -> Any:
        return self.transform.manifold

    @property
    def num_classes(self) -> int:
        return getattr(self.base, "components", 0)

    def log_prob_labelled(self, x: Tensor, labels: Tensor, context: Tensor | None = None) -> Tensor:
        if not self.num_classes:
            return super().log_prob_labelled(x, labels, context)
        z, ladj = self.transform.inverse_and_ladj(x, context)
        joint: Tensor = self.base.component_log_prob(z)  # type: ignore[operator]
        known = joint.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(labels >= 0, known, joint.logsumexp(-1)) + ladj

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        if (context is None) != (self.context_dim == 0):
            wanted = f"a context of shape (*batch, {self.context_dim})" if self.context_dim else "no context"
            raise ShapeError(f"Flow: this flow takes {wanted}")
        if context is not None and (context.dim() == 0 or context.shape[-1] != self.context_dim):
            raise ShapeError(f"Flow: expected a context of shape (*batch, {self.context_dim}), got {tuple(context.shape)}")
        transform: Transform = self.transform if context is None else self.transform.condition(context)
        if self._compiler is not None:
            transform = Compiled(self._compiler, context)
        return FlowDistribution(self.base(context), [transform])

    def standardized(self, x: Any) -> Flow:
        """The flow with a fixed last layer that takes the mean and standard deviation of rows ``x``, shape ``(N, dim)``.

        The layers before it then work on standardised points, whatever the units of the target. Parameters are shared with this flow.

        Raises:
            ShapeError: rows of another size.
            DataError: a column that is constant or not finite.
        """
        flow = Flow(self.base, [*self.transform.layers, standardization(self, x)])
        return flow if self._compiler is None else flow.compiled()

    def compiled(self: AnyFlow) -> AnyFlow:
        """The same flow, its parameters shared, whose density and sampling run through ``torch.compile``.

        A direction in which an autoregressive layer works step by step stays as it is: a graph of all steps takes minutes to make and wins little.

        Cost: splines run about half again as fast. Compilation takes up to a minute, and comes at the first call with each kind of input (batch
        size, dtype, with and without gradients). It needs a C++ compiler.

        Raises:
            OptionError: a layer whose steps depend on the values that it meets: a continuous flow with an adaptive solver.

        Example:
            >>> import pyro_flows as pf
            >>> flow = pf.flows.nsf(2).compiled()
            >>> flow().event_shape  # nothing is compiled before the first density or draw
            torch.Size([2])
        """
        for module in self.transform.modules():
            if isinstance(module, FlowTransform):
                module.check_compilable()
        new = copy.copy(self)
        for register in ("_parameters", "_buffers", "_modules"):  # a copy of its own, so that what is set on one flow is not set on the other
            new.__dict__[register] = getattr(self, register).copy()
        new._compiler = Compiler(self.transform)
        return new

    def extra_repr(self) -> str:
        """Sizes at a glance."""
        count = sum(p.numel() for p in self.parameters())
        size = f"dim={self.dim}" if len(self.event_shape) == 1 else f"event_shape={tuple(self.event_shape)}"
        return f"{size}, context_dim={self.context_dim}, parameters={count}"
