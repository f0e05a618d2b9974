"""Layers that learn their scale from the data that pass: once, or all the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, OptionError
from ..numerics.introspection import is_traced
from .affine import Affine
from .linear import Linear

__all__ = ["ActNorm", "BatchNorm"]


def _may_look(layer: Linear, value: Tensor) -> bool:
    """Whether a layer may take statistics: in training, at two points or more, whose numbers are at hand."""
    return layer.training and value.numel() >= 2 * layer.dim and not is_traced()


def _statistics(layer: Linear, value: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all batch dimensions.

    A coordinate that does not vary (beyond rounding) has variance 1, so that it is moved and not scaled.
    """
    rows = value.detach().reshape(-1, layer.dim)
    var, mean = torch.var_mean(rows, 0, correction=0)
    if not bool((var.isfinite() & mean.isfinite()).all()):
        bad = (~rows.isfinite().all(-1)).nonzero().flatten().tolist()
        named = f"in rows {bad[:5]}{' and others' if len(bad) > 5 else ''} of the batch: drop them"
        where = named if bad else "in the batch's variance: rescale the data"
        raise ModelError(f"{type(layer).__name__}: numbers that are not finite {where}. The layer is left as it was")
    noise = torch.finfo(rows.dtype).eps * rows.abs().amax(0)
    return mean, torch.where(var.sqrt() > 8 * noise, var, 1.0)


class ActNorm(Affine):
    r"""Moves and scales every coordinate, :math:`y = e^{s} \odot x + t`, where the first batch decides where :math:`s` and :math:`t` start.

    The first batch of at least two points that passes in training mode, in either direction, sets the parameters so that what comes out has mean 0
    and variance 1 over all batch dimensions: in the density direction, :math:`t` and :math:`e^{s}` become the mean and standard deviation of the
    data. From then on they are ordinary parameters. The buffer ``initialized`` says whether that happened; it is part of the state dict, so a
    loaded layer stays as it was saved.

    Under ``vmap`` and the other transforms of ``torch.func``, ``make_fx``, ``torch.jit.trace`` and ``torch.compile`` the layer does not look at its
    points: it acts as its parameters stand, and waits for a batch outside. To draw from a new flow before it has seen data, use ``.eval()``.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that :math:`s` and :math:`t` may depend on (linearly, from zero: the first batch is normalised whatever its
            contexts); 0 for none.

    Cost: :math:`O(D)` a point in both directions. Starts at the identity, until it sees data.

    Raises:
        ModelError: the first batch holds numbers that are not finite.

    Reference: Glow: generative flow with invertible 1x1 convolutions (Kingma & Dhariwal, 2018), https://arxiv.org/abs/1807.03039

    Example:
        >>> import torch
        >>> layer, data = ActNorm(2), torch.tensor([[1.0, 10.0], [3.0, 50.0]])
        >>> layer.inv(data).detach()
        tensor([[-1., -1.],
                [ 1.,  1.]])
        >>> layer.shift.detach()
        tensor([ 2., 30.])
    """

    initialized: Tensor

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def _look(self, value: Tensor, inverse: bool) -> None:
        if not _may_look(self, value) or bool(self.initialized):
            return
        mean, var = _statistics(self, value)
        log_std = 0.5 * var.log()
        self.log_scale.copy_(log_std if inverse else -log_std)
        self.shift.copy_(mean if inverse else -mean * (-log_std).exp())
        self.initialized.fill_(True)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._look(x, inverse=False)
        return super().unchecked_forward(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._look(y, inverse=True)
        return super().unchecked_inverse(y, context)


class BatchNorm(Linear):
    r"""Normalises data by running statistics, back through :math:`y = m + \sqrt{v} \odot (e^{s} \odot x + t)`.

    In training mode, each batch of at least two points that is mapped back (the density direction) first moves the running mean :math:`m` and
    variance :math:`v` towards its own, over all its batch dimensions; the first such batch replaces them. The map then takes :math:`m` and
    :math:`v` as constants, in both modes. So training and evaluation agree, the rows of a batch do not influence each other, the two directions are
    inverses, and the log-determinant is that of the map. (Normalised by each batch's own statistics, as in the paper, the training loss is not the
    log density of any one model.) ``momentum=1`` takes the last batch's statistics. To normalise in the sampling direction, use ``.inv``.

    Under ``torch.func``, tracing and ``torch.compile`` the statistics stand still, as in evaluation.

    Args:
        dim: number of coordinates :math:`D`.
        momentum: weight of a new batch in the running statistics, in (0, 1].

    Cost: :math:`O(D)` a point in both directions. Starts at the identity, until it sees data.

    Raises:
        OptionError: ``momentum`` does not lie in (0, 1].
        ModelError: a batch in training holds numbers that are not finite.

    Reference: Masked autoregressive flow for density estimation (Papamakarios et al., 2017), https://arxiv.org/abs/1705.07057;
    running statistics in training as in Density estimation using real NVP (Dinh et al., 2016), https://arxiv.org/abs/1605.08803
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(self, dim: int, momentum: float = 0.1) -> None:
        super().__init__(dim, log_scale=torch.zeros(dim), shift=torch.zeros(dim))
        if not 0 < momentum <= 1:
            raise OptionError(f"BatchNorm: momentum must lie in (0, 1], got {momentum!r}")
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("batches", torch.tensor(0))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}"

    @torch.no_grad()
    def _look(self, value: Tensor) -> None:
        if not _may_look(self, value):
            return
        mean, var = _statistics(self, value)
        weight = 1 - (1 - self.momentum) * (self.batches > 0).to(value.dtype)
        self.running_mean.lerp_(mean, weight), self.running_var.lerp_(var, weight)
        self.batches.add_(1)

    def _log_scale(self) -> Tensor:
        return self.log_scale + 0.5 * self.running_var.log()

    def _offset(self, at: Any) -> Tensor:
        return self.running_mean + self.running_var.sqrt() * self.shift

    def _log_det(self, at: Any) -> Tensor:
        return self._log_scale().sum()

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return x * self._log_scale().exp()

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return y * (-self._log_scale()).exp()

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._look(y)
        return super().unchecked_inverse(y, None)
