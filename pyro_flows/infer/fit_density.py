"""Maximum likelihood: a flow fitted to rows of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..distributions import Flow
from ..errors import DataError, OptionError
from .context import seeded
from .descent import Plan
from .flow_fit import FlowFit
from .flow_matching import FlowMatching
from .flow_training import Training
from .inputs import fingerprint
from .processes import Processes
from .regularized import Regularized
from .rows import Batches, Rows, read_rows

__all__ = ["fit_density"]

_CHUNK = 4096  # rows scored at once in a validation


def fit_density(
    flow: Flow,
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
    objective: Literal["likelihood", "flow_matching"] = "likelihood",
    coupling: Literal["independent", "ot"] = "independent",
    kinetic: float = 0.0,
    jacobian: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    checkpoint: str | Path | None = None,
) -> FlowFit:
    r"""Fit a flow to data by maximum likelihood: minimise :math:`-\frac1N\sum_n \log q(x_n \mid c_n)`, in place.

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
        objective: ``"likelihood"``, or ``"flow_matching"`` for a flow of one :class:`~pyro_flows.transforms.ContinuousFlow`: its velocity is
            fitted to that of straight paths from base draws to rows, which takes no solve and is many times faster a step. Losses, the validation
            loss too, are then squared velocities, not nats.
        coupling: which base draw a row is paired with in flow matching: ``"independent"``, or ``"ot"``, a close one of the same batch, which makes
            straighter paths.
        kinetic, jacobian: weights of the penalties on the paths of ``ContinuousFlow`` layers, see
            :meth:`~pyro_flows.transforms.ContinuousFlow.regularization`; the validation loss includes them.
        seed: every random number follows from it; the global random state is left alone.
        progress: whether to show a progress bar.
        callbacks: called with a dict of ``step, loss, validation, lr`` after every validation.
        checkpoint: a file to save to, and to resume from where it exists: a resumed run ends with the same numbers as an uninterrupted one.

    Under ``torchrun``, processes that call this with the same arguments share every batch, and end with the same flow as one process would.
    Ctrl-C ends the training and keeps the best state so far. A flow whose density is known by a bound (``exact = False``) is fitted by the bound.

    Cost: ``max_steps`` gradients of ``batch_size`` densities.

    Raises:
        DtypeError, ShapeError, DataError, OptionError: data or options that cannot be used, before any work.
        TrainingError: the loss is not finite, and going back with a smaller rate does not help; the flow is in its best state.
        CheckpointError: the file belongs to another flow or to other data.

    Example:
        >>> import torch, pyro_flows as pf
        >>> x = torch.randn(1000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
        >>> fit = pf.fit_density(pf.flows.realnvp(2, transforms=2), x, max_steps=200, progress=False)
        >>> fit.flow().sample((5,)).shape
        torch.Size([5, 2])
    """
    if not isinstance(flow, Flow):
        raise OptionError(f"flow must be a pf.Flow, got {type(flow).__name__}")
    if not 0 <= validation < 1:
        raise OptionError(f"validation must be a fraction in [0, 1), got {validation}")
    if objective not in ("likelihood", "flow_matching"):
        raise OptionError(f"objective={objective!r} is not known: choose 'likelihood' or 'flow_matching'")
    if objective == "likelihood" and coupling != "independent":
        raise OptionError(f'coupling={coupling!r} pairs base draws with rows, which only objective="flow_matching" does')
    matching = FlowMatching(flow, coupling) if objective == "flow_matching" else None
    regularized = Regularized(flow, kinetic, jacobian)
    if regularized and (matching or labels is not None):
        raise OptionError("kinetic= and jacobian= are penalties of maximum likelihood without labels: leave them at 0")
    if matching and labels is not None:
        raise OptionError('objective="flow_matching" has no use for labels: leave them out')
    rows = read_rows(flow, x, context, labels)
    processes = Processes(rows.x.device)
    loss_name = "flow matching loss" if matching else "penalised negative log-likelihood" if regularized else "negative log-likelihood"
    training = Training(flow, seed, progress, callbacks, checkpoint, "fit_density", loss_name, processes, matching is None)
    count = round(validation * len(rows.x))
    if validation and not 2 <= count <= len(rows.x) - 2:
        raise DataError(f"validation={validation} of {len(rows.x)} rows leaves {count} to validate: at least 2 are needed, and 2 to train")
    with training.seeded():
        order = torch.randperm(len(rows.x))
    held_out, kept = rows.take(order[:count]), rows.take(order[count:])
    batches = Batches(len(kept.x), batch_size)
    patience = -(-max_steps // 2) if patience is None else patience
    every = min(100, max(20, len(kept.x) // batches.size))
    plan = Plan(max_steps, lr, weight_decay, every, patience)

    def likelihood_loss(part: Rows) -> Tensor:
        return regularized.loss(part) if regularized else -log_likelihood(flow, part)

    def loss() -> Tensor:
        index = batches.draw()
        if matching:  # every process draws for the whole batch, so that all use the same noise
            return matching.loss(kept.take(index), processes.share).sum() / batches.size
        return likelihood_loss(kept.take(processes.share(index))).sum() / batches.size

    def validate() -> float:
        with seeded(seed + 2**32):  # the same noise each time, where the loss has any
            if matching:
                parts = torch.arange(count).split(_CHUNK)
                sums = [matching.loss(held_out.take(index), processes.share).sum() for index in parts]
            else:
                parts = processes.share(torch.arange(count)).split(_CHUNK)
                sums = [likelihood_loss(held_out.take(index)).sum() for index in parts]
        total = torch.stack(sums).sum() if sums else rows.x.new_zeros(())
        return float(processes.sum(total)) / count

    same: list[Any] = [fingerprint(tuple(rows), {}), batches.size, max_steps, lr, weight_decay, patience, validation, seed]
    if matching or regularized:
        same += [objective, coupling, kinetic, jacobian]
    return training.run(loss, validate if count else None, plan, batches, same, held_out if count else None)


def log_likelihood(flow: Flow, rows: Rows) -> Tensor:
    """Log density of each row, or its bound; of row and class, where the class is known."""
    if rows.labels is None:
        distribution = flow(rows.context)
        return distribution.log_prob(rows.x) if getattr(distribution, "exact", True) else distribution.log_prob_bound(rows.x)
    z, ladj = flow.transform.inverse_and_ladj(rows.x, rows.context)
    joint = flow.base.component_log_prob(z)  # type: ignore[operator]
    known = joint.gather(-1, rows.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(rows.labels >= 0, known, joint.logsumexp(-1)) + ladj
