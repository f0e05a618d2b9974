"""The gradient of a log-determinant from a map and its inverse, without a determinant: what free-form flows are trained by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jvp, vjp

__all__ = ["free_form_log_det"]

Map = Callable[[Tensor], Tensor]


def free_form_log_det(f: Map, inverse: Map, x: Tensor, probe: Tensor) -> Tensor:
    r"""A number for each row whose **gradient** estimates that of :math:`\log|\det F|`, :math:`F = \partial f/\partial x`, without bias.

    .. math:: \nabla\log|\det F| = \operatorname{tr}(F^{-1}\,\nabla F) = E_v\bigl[v^\top\,\mathrm{sg}(G)\,(\nabla F)\,v\bigr], \qquad G = F^{-1}

    :math:`G` is the Jacobian of the inverse map, held fixed (sg), so only one vector-Jacobian and one Jacobian-vector product are needed whatever the
    map. The gradient is by everything that ``f`` depends on, and by ``x``. The value itself says nothing: its mean is the dimension. On a manifold
    take tangent probes, and an ``inverse`` that first projects its argument: the gradient is then that of the log ratio of volumes.

    Args:
        f: the map, on batches ``(*batch, D)`` whose rows do not influence each other.
        inverse: its inverse. If it is learned and not exact, the gradient is biased by its error.
        x: points.
        probe: random vectors of the shape of ``x`` with :math:`E vv^\top = I`, or the projection onto the tangent space.

    Returns:
        ``(*batch,)``.

    Cost: a pass of ``f`` and of ``inverse`` with one product each.

    Example:
        >>> a = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> free_form_log_det(lambda x: a * x, lambda y: y / a, torch.zeros(2), torch.tensor([1.0, -1.0])).backward()
        >>> a.grad  # of log a_1 + log a_2
        tensor([0.5000, 0.3333])

    Reference: Learning distributions on manifolds with free-form flows (Sorrenson et al., 2023), https://arxiv.org/abs/2312.09852
    """
    y, pushed = jvp(f, (x,), (probe,))  # type: ignore[misc]  # F v
    with torch.no_grad():
        (pulled,) = vjp(inverse, y.detach())[1](probe)  # v' G
    return (pulled.detach() * pushed).sum(-1)
