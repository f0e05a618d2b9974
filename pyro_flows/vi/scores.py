r"""The score of a flow's density at its own draws, carried forward layer by layer without an inverse.

A layer :math:`y = T(x)` turns a density with score :math:`s = \nabla_x \log q(x)` into one with score
:math:`J^{-\top} (s - \nabla_x \log|\det J|)`. Where the Jacobian is triangular in blocks, as in a coupling, that takes one reverse pass of the layer.

Reference: Fast and unified path gradient estimators for normalizing flows (Vaitl et al., 2024), https://arxiv.org/abs/2403.15881
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import Tensor
from torch.func import vjp

from ..transforms import Compose, ContinuousFlow, Coupling, Elementwise, FlowTransform
from ..univariate import Univariate

__all__ = ["push_score"]

Pushed = tuple[Tensor, Tensor, Tensor]  # the mapped point, the ladj there, the score there


@singledispatch
def push_score(transform: FlowTransform, x: Tensor, score: Tensor) -> Pushed:
    """Map points and the score of their density through an unconditional transform.

    Args:
        transform: the transform; without a rule of its own it is inverted once.
        x: points ``(N, d)``.
        score: gradient of their log density, ``(N, d)``.

    Returns:
        The mapped points, the log-determinant of the map ``(N,)``, and the gradient of the log density of the mapped points ``(N, d)``.
    """
    y, ladj = transform.forward_and_ladj(x)
    (_, inverse_ladj), pull = vjp(transform.inverse_and_ladj, y)  # type: ignore[misc]
    return y, ladj, pull((score, torch.ones_like(inverse_ladj)))[0]


@push_score.register
def _(transform: Compose, x: Tensor, score: Tensor) -> Pushed:
    total = x.new_zeros(x.shape[:-1])
    for part in transform.parts:
        x, ladj, score = push_score(part, x, score)
        total = total + ladj
    return x, total, score


def _move(univariate: Univariate, x: Tensor, params: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The moved coordinates, their log slopes and their score; and what the parameters have to pass on to what they depend on."""
    (y, log_slope), pull = vjp(univariate.forward, x, params)  # type: ignore[misc]
    one = torch.ones_like(log_slope)
    bend = pull((torch.zeros_like(y), one))[0]  # zero for affine maps
    score = (score - bend) * (-log_slope).exp()
    return y, log_slope, score, pull((score, one))[1]


@push_score.register
def _(transform: Elementwise, x: Tensor, score: Tensor) -> Pushed:
    params = transform.params().expand(*x.shape, -1)
    y, log_slope, score, _ = _move(transform.univariate, x, params, score)
    return y, log_slope.sum(-1), score


@push_score.register
def _(transform: Coupling, x: Tensor, score: Tensor) -> Pushed:
    (kept, moved), (kept_score, moved_score) = transform.split(x), transform.split(score)
    params, pull = vjp(lambda kept: transform.params(kept, moved), kept)  # type: ignore[misc]
    moved, log_slope, moved_score, passed = _move(transform.univariate, moved, params, moved_score)
    return transform.join(kept, moved), log_slope.sum(-1), transform.join(kept_score - pull(passed)[0], moved_score)


@push_score.register
def _(transform: ContinuousFlow, x: Tensor, score: Tensor) -> Pushed:
    return transform.forward_with_score(x, score)
