"""The rows that a density is fitted to: checked and converted before any work."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..distributions.abstract_flow import AbstractFlow
from ..errors import DataError, DtypeError, OptionError, ShapeError

__all__ = ["Batches", "Rows", "read_matrix", "read_rows"]

_FEWEST = 10
_BEYOND = 0.05  # fraction of a coordinate's values beyond the splines' bound that is too much


class Rows(NamedTuple):
    """Points, and what belongs to each: a context, a label."""

    x: Tensor
    context: Tensor | None = None
    labels: Tensor | None = None

    def take(self, index: Tensor | slice) -> Rows:
        """Some of the rows."""
        context, labels = (None if part is None else part[index] for part in self[1:])
        return Rows(self.x[index], context, labels)


class Batches:
    """Batches of row numbers without end: a fresh order each time all were seen, a remainder smaller than a batch left out.

    Args:
        count: number of rows.
        size: rows in a batch; all of them where there are no more.
        repeat: repeat rows instead, so that a batch always has ``size``.
    """

    def __init__(self, count: int, size: int, repeat: bool = False) -> None:
        if not isinstance(size, int) or size < 1:
            raise OptionError(f"batch_size must be a positive integer, got {size!r}")
        self.rounds = -(-size // count) if repeat else 1
        self.count, self.size = count, size if repeat else min(size, count)
        self.order, self.position = torch.arange(0), 0

    def draw(self) -> Tensor:
        """The next batch."""
        if self.position + self.size > len(self.order):
            self.order, self.position = torch.cat([torch.randperm(self.count) for _ in range(self.rounds)]), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]


def read_rows(flow: AbstractFlow, x: Any, context: Any = None, labels: Any = None) -> Rows:
    """Data as tensors of the flow's dtype on its device.

    Raises:
        DtypeError: integers or booleans.
        ShapeError: not ``(N, dim)``, or another number of rows or size of the context.
        DataError: values that are not finite, too few rows, a constant column, or values beyond the bound of the flow's splines.
        SupportError: rows off the manifold that the flow lives on.
        OptionError: labels for a flow whose base is not a ``GaussianMixture``, or out of range.
    """
    like = next((t for t in (*flow.parameters(), *flow.buffers()) if t.is_floating_point()), torch.zeros(()))
    x = read_matrix("x", x, flow.dim, like)
    fewest = max(_FEWEST, flow.dim + 1)
    if len(x) < fewest:
        raise DataError(f"x has {len(x)} rows: at least {fewest} are needed for {flow.dim} coordinates")
    if (context is None) != (flow.context_dim == 0):
        raise ShapeError(f"this flow takes {f'a context of shape (N, {flow.context_dim})' if flow.context_dim else 'no context'}")
    if context is not None:
        context = read_matrix("context", context, flow.context_dim, like)
        if len(context) != len(x):
            raise ShapeError(f"x has {len(x)} rows, context has {len(context)}: each row of x needs its own")
    if flow.manifold is not None:
        flow.manifold.check(x, "x")
    constant = (x.amax(0) == x.amin(0)).nonzero()[:, 0].tolist()
    if constant:
        raise DataError(f"columns {constant} of x are constant, so they have no density: leave them out")
    check_bound(flow, x, context)
    return Rows(x, context, None if labels is None else _labels(flow, labels, len(x), like.device))


def read_matrix(name: str, value: Any, columns: int, like: Tensor) -> Tensor:
    """A matrix of real numbers with so many columns, of the dtype and on the device of ``like``; see :func:`read_rows`."""
    value = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if not value.is_floating_point():
        remedy = "add uniform noise to counts and grades (a density has none at single points)" if name == "x" else "one-hot encode classes"
        raise DtypeError(f"{name} holds {value.dtype}, not real numbers: convert measurements with .to(torch.float32), {remedy}")
    if value.dim() != 2 or value.shape[1] != columns:
        raise ShapeError(f"{name} must have shape (N, {columns}), one row a point, got {tuple(value.shape)}")
    value = value.to(like)
    bad = (~torch.isfinite(value)).any(-1).nonzero()[:, 0].tolist()
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise DataError(f"{name} has NaN or infinite values in rows {bad[:10]}{more}: remove or impute them")
    return value


def _labels(flow: AbstractFlow, labels: Any, count: int, device: torch.device) -> Tensor:
    if not flow.num_classes:
        raise OptionError("labels need a flow on a GaussianMixture, one component a class: pf.flows.flow_gmm(dim, components)")
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.shape != (count,):
        raise ShapeError(f"labels must be {count} integers, one a row (-1 for unknown), got {labels.dtype} of shape {tuple(labels.shape)}")
    if not bool(((labels >= -1) & (labels < flow.num_classes)).all()):
        raise OptionError(f"labels must lie in 0..{flow.num_classes - 1}, or be -1 for unknown")
    return labels.long().to(device)


@torch.no_grad()
def check_bound(flow: AbstractFlow, x: Tensor, context: Tensor | None) -> None:
    """Raise a ``DataError`` when much of the data lies where the first splines on their way are the identity."""
    layers = flow.traceable_layers
    bounds = [getattr(getattr(layer, "univariate", None), "bound", None) for layer in layers]
    for i in reversed(range(len(layers))):
        bound = bounds[i]
        if bound is not None:
            beyond = (x.abs() > bound).float().mean(0)
            worst = int(beyond.argmax())
            if float(beyond[worst]) > _BEYOND:
                raise DataError(
                    f"{float(beyond[worst]):.0%} of column {worst} of x lie beyond the flow's bound {bound:g}, where its splines are the identity: "
                    "fit flow.standardized(x), or build the flow with a larger bound"
                )
            return
        if all(other is None for other in bounds[:i]):  # nothing more to look for, which may be dear to find out
            return
        x = layers[i].inverse_and_ladj(x, context if layers[i].context_dim else None)[0]
