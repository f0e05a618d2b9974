"""Maximum likelihood: a flow fitted to rows of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..distributions.abstract_flow import AbstractFlow
from ..errors import DataError, OptionError
from ..numerics.fingerprint import fingerprint
from ..training.processes import Processes
from .catalogue import ObjectiveOptions, objective_of
from .flow_fit import FlowFit
from .flow_training import Plan, Training
from .objective import Objective
from .rows import Batches, Rows, read_rows

__all__ = ["fit_density"]

_CHUNK = 4096  # rows scored at once in a validation


def fit_density(
    flow: AbstractFlow,
    x: Any,
    context: Any = None,
    *,
    labels: Any = None,
    validation: float = 0.1,
    max_steps: int = 3000,
    batch_size: int = 256,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    patience: int | None = None,
    objective: str | Objective = "auto",
    num_particles: int = 8,
    coupling: Literal["independent", "ot"] = "independent",
    kinetic: float = 0.0,
    jacobian: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    checkpoint: str | Path | None = None,
) -> FlowFit:
    r"""Fit a flow to data by maximum likelihood: minimise :math:`-\frac1N\sum_n \log q(x_n \mid c_n)`, in place.

    A flow without an exact density is fitted by a lower bound instead: a :class:`~pyro_flows.stochastic.StochasticFlow` whose paths cannot all be
    summed, or one with extra coordinates. Units that never win are put to new use at every validation.

    Mini-batches, Adam with a cosine schedule and clipped gradients. A validation set decides which state is kept and when to stop. The flow is left
    in evaluation mode.

    Args:
        flow: the flow, which is trained in place. Splines bend a bounded interval only: ``flow.standardized(x)`` brings data of any units there.
        x: the data, shape ``(N, dim)``: a tensor, or what NumPy makes an array of. It is converted to the flow's dtype.
        context: the context of each row, shape ``(N, context_dim)``, for a conditional flow.
        labels: the class of each row, integers of shape ``(N,)``, -1 where unknown, for a flow on a
            :class:`~pyro_flows.distributions.GaussianMixture`: the likelihood is then that of row and class.
        validation: fraction of the rows held out, chosen at random; 0 trains on all, to the end of the schedule.
        max_steps: length of the schedule, in steps.
        batch_size: rows a step, over all processes.
        lr: Adam's learning rate, from which the schedule falls.
        weight_decay: decoupled weight decay, against overfitting.
        patience: steps without a better validation loss after which training stops; half of ``max_steps`` by default, since much of the gain
            comes when the rate has fallen.
        objective: ``"auto"``: the likelihood where the flow has an exact density, else ``"rws"`` for discrete indices, ``"iwae"`` for continuous
            ones and ``"elbo"`` for extra coordinates. ``"likelihood"``. The bounds of a flow without an exact density: ``"elbo"``, ``"stl"`` (the
            ELBO by sticking the landing), ``"iwae"``, ``"dreg"`` (doubly reparameterised) and ``"rws"`` (reweighted wake-sleep), see
            :func:`~pyro_flows.stochastic.lower_bound`. ``"flow_matching"`` for a flow of one :class:`~pyro_flows.transforms.ContinuousFlow`: its
            velocity is fitted to that of straight paths from base draws to rows, which takes no solve and is many times faster a step; losses, the
            validation loss too, are then squared velocities, not nats. Or an :class:`~pyro_flows.density.Objective` of your own.
        num_particles: paths of each row, for the importance-weighted bounds.
        coupling: which base draw a row is paired with in flow matching: ``"independent"``, or ``"ot"``, a close one of the same batch, which makes
            straighter paths.
        kinetic, jacobian: weights of the penalties on the paths of ``ContinuousFlow`` layers, see
            :meth:`~pyro_flows.transforms.ContinuousFlow.regularization`; the validation loss includes them.
        seed: every random number follows from it; the global random state is left alone.
        progress: whether to show a progress bar.
        callbacks: called with a dict of ``step, loss, validation, lr`` after every validation.
        checkpoint: a file to save to, and to resume from where it exists: a resumed run ends with the same numbers as an uninterrupted one.

    Under ``torchrun``, processes that call this with the same arguments share every batch, and end with the same flow as one process would.
    Ctrl-C ends the training and keeps the best state so far.

    Cost: ``max_steps`` gradients of ``batch_size`` densities.

    Raises:
        DtypeError, ShapeError, DataError, OptionError: data or options that cannot be used, before any work.
        SupportError: rows off the manifold of a flow that lives on one, before any work too.
        TrainingError: the loss is not finite, and going back with a smaller rate does not help; the flow is in its best state.
        CheckpointError: the file belongs to another flow or to other data.

    Example:
        >>> import torch, pyro_flows as pf
        >>> x = torch.randn(1000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
        >>> fit = pf.fit_density(pf.flows.realnvp(2, transforms=2), x, max_steps=200, progress=False)
        >>> fit.flow().sample((5,)).shape
        torch.Size([5, 2])
    """
    if not isinstance(flow, AbstractFlow):
        raise OptionError(f"flow must be a pf.Flow or a StochasticFlow, got {type(flow).__name__}")
    chosen = objective_of(flow, objective, ObjectiveOptions(num_particles, coupling, kinetic, jacobian))
    if labels is not None and not chosen.takes_labels:
        raise OptionError(f"labels are of no use to the {chosen.name}: leave them out, or use objective='likelihood' without penalties")
    rows = read_rows(flow, x, context, labels)
    processes = Processes(rows.x.device)
    training = Training(flow, seed, progress, callbacks, checkpoint, "fit_density", chosen.name, processes, chosen.in_nats)
    with training.seeded():
        held_out, kept = _split(rows, validation)
    batches = Batches(len(kept.x), batch_size)
    patience = -(-max_steps // 2) if patience is None else patience
    every = min(100, max(20, len(kept.x) // batches.size))
    plan = Plan(max_steps, lr, weight_decay, every, patience)

    def own_part(batch: Rows) -> Any:
        """What this process computes the loss of."""
        prepared = chosen.prepare(flow, batch)
        return type(prepared)(*(None if tensor is None else processes.share(tensor) for tensor in prepared))

    def loss() -> Tensor:
        return chosen.loss(flow, own_part(kept.take(batches.draw()))).sum() / batches.size

    def validate() -> float:
        chosen.before_validation(flow, held_out)
        with training.seeded(2):  # the same noise each time, where the loss has any
            parts = torch.arange(len(held_out.x)).split(_CHUNK)
            sums = [chosen.validation_loss(flow, own_part(held_out.take(part))).sum() for part in parts]
        return float(processes.sum(torch.stack(sums).sum())) / len(held_out.x)

    same = [fingerprint(tuple(rows), {}), batches.size, max_steps, lr, weight_decay, patience, validation, seed, *chosen.fingerprint()]
    watched = len(held_out.x) > 0
    fit = training.run(loss, validate if watched else None, plan, batches, same, held_out if watched else None)
    with training.seeded(3):
        fit.warnings += chosen.notes(flow, rows)
    return fit


def _split(rows: Rows, validation: float) -> tuple[Rows, Rows]:
    """Rows held out for validation, a fraction chosen at random, and those to train on."""
    if not 0 <= validation < 1:
        raise OptionError(f"validation must be a fraction in [0, 1), got {validation}")
    count = round(validation * len(rows.x))
    if validation and not 2 <= count <= len(rows.x) - 2:
        raise DataError(f"validation={validation} of {len(rows.x)} rows leaves {count} to validate: at least 2 are needed, and 2 to train")
    order = torch.randperm(len(rows.x))
    return rows.take(order[:count]), rows.take(order[count:])
