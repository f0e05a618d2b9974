"""What distributions on manifolds share: parameters with batch shapes, and points checked to lie where they should."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..errors import DtypeError, OptionError, ShapeError
from .manifold import Manifold, can_look

__all__ = ["ManifoldDistribution"]


class ManifoldDistribution(dist.TorchDistribution):
    """A distribution with a density under its manifold's measure. Subclasses set their parameters, and say how many dimensions each has."""

    manifold: Manifold
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    parameter_dims: ClassVar[dict[str, int]] = {}

    def __init__(self, manifold: Manifold, batch_shape: Sequence[int], validate_args: bool | None = None) -> None:
        self.manifold = manifold
        super().__init__(torch.Size(batch_shape), torch.Size([manifold.size]), validate_args=False)
        self._validate_args: bool = torch.distributions.Distribution._validate_args if validate_args is None else validate_args
        if self._validate_args:
            for name in self.parameter_dims:
                check_finite(type(self).__name__, name, getattr(self, name))

    @property
    def support(self) -> constraints.Constraint:
        """The manifold's constraint."""
        return self.manifold.support

    def _validate_sample(self, value: Tensor) -> None:
        self.manifold.validate(value, self)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ManifoldDistribution:
        """A copy with parameters broadcast to another batch shape."""
        new = self._get_checked_instance(type(self), _instance)
        for name, value in self.__dict__.items():
            if name in self.parameter_dims:
                event = self.parameter_dims[name]
                value = value.expand(torch.Size(batch_shape) + value.shape[value.dim() - event :])
            if not name.startswith("_"):
                setattr(new, name, value)
        ManifoldDistribution.__init__(new, self.manifold, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """Reparameterised draws."""
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self).__name__}: draws cannot be differentiated without bias: use sample()")
        return self._draw(self._extended_shape(torch.Size(sample_shape)))

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        """Draws, without gradients."""
        return self._draw(self._extended_shape(torch.Size(sample_shape)))

    def _draw(self, shape: torch.Size) -> Tensor:
        raise NotImplementedError


class UniformOn(ManifoldDistribution):
    """The uniform distribution on a manifold of finite measure."""

    has_rsample = True
    parameter_dims: ClassVar[dict[str, int]] = {"zero": 1}

    def __init__(self, manifold: Manifold, dtype: torch.dtype | None, device: torch.device | str | None, validate_args: bool | None) -> None:
        self.zero = torch.zeros(manifold.size, dtype=dtype, device=device)
        super().__init__(manifold, (), validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return torch.full_like(value[..., 0], -self.manifold.log_volume).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def _draw(self, shape: torch.Size) -> Tensor:
        return self.manifold.random_uniform(shape[:-1], self.zero.dtype, self.zero.device)

    def __repr__(self) -> str:
        batch = f", batch_shape: {self.batch_shape}" if self.batch_shape else ""
        return f"Uniform{type(self.manifold).__name__}({self.manifold.size}{batch})"


def together(name: str, parameters: Mapping[str, tuple[Tensor | float, int]]) -> tuple[list[Tensor], torch.Size]:
    """Parameters, given with how many dimensions each has, broadcast to one batch shape and dtype; and that shape."""
    for key, (value, dims) in parameters.items():
        if not isinstance(value, Tensor | Real):
            raise DtypeError(f"{name}: {key} must be a tensor, got {type(value).__name__}: torch.tensor makes one of numbers")
        if torch.as_tensor(value).dim() < dims:
            raise ShapeError(f"{name}: {key} must have {dims} dimensions or more, got shape {tuple(torch.as_tensor(value).shape)}")
    given = [value for value, _ in parameters.values() if isinstance(value, Tensor)]
    dtype = next((t.dtype for t in given if t.is_floating_point()), torch.get_default_dtype())
    for t in given:
        dtype = torch.promote_types(dtype, t.dtype)
    tensors = {key: torch.as_tensor(value, dtype=dtype, device=given[0].device) for key, (value, _) in parameters.items()}
    events = {key: tensors[key].shape[tensors[key].dim() - dims :] for key, (_, dims) in parameters.items()}
    try:
        batch = torch.broadcast_shapes(*(tensors[key].shape[: tensors[key].dim() - dims] for key, (_, dims) in parameters.items()))
    except RuntimeError:
        shapes = ", ".join(f"{key} {tuple(t.shape)}" for key, t in tensors.items())
        raise ShapeError(f"{name}: parameters do not broadcast: {shapes}") from None
    return [t.expand(batch + events[key]) for key, t in tensors.items()], batch


def require(condition: Tensor, message: str) -> None:
    """An ``OptionError``, unless a condition holds everywhere; silent inside traced graphs."""
    if can_look(condition) and not bool(condition.all()):
        raise OptionError(message)


def check_finite(name: str, what: str, value: Tensor) -> None:
    """An ``OptionError`` for a tensor with entries that are NaN or infinite; silent inside traced graphs."""
    if can_look(value) and not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise OptionError(f"{name}: {what} must be finite, but {bad} of {value.numel()} entries are NaN or infinite: look at where it was computed")


def check_matrix(name: str, what: str, matrix: Tensor, n: int | None = None) -> None:
    """A ``ShapeError`` unless a tensor holds square matrices, of ``n`` rows where that is given."""
    if matrix.shape[-1] != matrix.shape[-2] or n not in (None, matrix.shape[-1]):
        raise ShapeError(f"{name}: {what} must have shape (*batch, {n or 'n'}, {n or 'n'}), got {tuple(matrix.shape)}")


def check_lower(name: str, what: str, matrix: Tensor) -> None:
    """An ``OptionError`` unless matrices are lower triangular; silent inside traced graphs."""
    require(matrix.triu(1) == 0, f"{name}: {what} must be lower triangular: torch.linalg.cholesky(covariance) is")
