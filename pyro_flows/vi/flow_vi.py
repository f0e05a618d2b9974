"""The recommended way to a posterior: warm start, affine layer, flow, and an honest evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConvergenceWarning, ModelError, OptionError
from ..guides import AutoFlow
from ..model.context import running
from ..model.inputs import converted
from ..model.log_joint import LogJoint
from ..numerics.fingerprint import fingerprint
from ..numerics.random import seeded
from ..posterior.posterior import Posterior
from ..training.checkpoint import Checkpoint, remedy_of_interrupt
from ..training.progress import Progress
from .objective import Objective
from .options import Options
from .run import Run
from .set_up import set_up
from .stages import run_stages

__all__ = ["FlowVI", "fit"]

Callback = Callable[[dict[str, Any]], None]


class FlowVI:
    """Variational inference with a flow guide, from warm start to diagnostics.

    The stages: several L-BFGS descents and Laplace's approximation, accepted only when its ELBO beats the naive start; the affine layer alone; the
    flow on top, until the averaged ELBO is stationary; fresh draws for ELBO, evidence, ESS and k-hat. The better of affine and
    flow stage is kept.

    Args:
        model: a Pyro model.
        guide: an :class:`~pyro_flows.guides.AutoFlow` of that model, trained in place; when omitted each run makes its own, with ``flow`` and
            ``affine``: an :class:`~pyro_flows.guides.AutoManifoldFlow` if the model has latent directions or angles.
        flow, affine: what guide to make, see :class:`~pyro_flows.guides.AutoFlow`. With ``"auto"`` the flow is trained only where the affine layer
            falls short.
        num_particles: draws a step.
        max_steps: upper bound on the flow's steps (the affine layer has up to four rounds of 300, or of ``max_steps`` if that is less, below
            ``flow="auto"``, and sixteen otherwise); training stops earlier when the averaged ELBO is stationary.
        lr: the flow's learning rate.
        seed: every random number follows from it; the global random state is left alone.
        engine: ``"auto"``, ``"compiled"``, ``"captured"`` or ``"eager"``: how the step runs, never what it computes.
        warm_start: whether to look for modes first.
        objective: ``"path"`` (the ELBO by its path gradient), ``"elbo"`` (total gradient), ``"score"`` (the ELBO by its score-function gradient, that
            of the log variance: it sees how much mass each mode has), ``"iwae"`` or ``"forward_kl"``. ``"auto"`` is ``"score"`` for guides with
            directions or angles, which often have several modes, and up to 20 numbers beside them, and ``"path"`` for others.
        dtype: floating-point type of the whole run; arguments are converted to it.
        progress: whether to show a progress bar.
        callbacks: called with a dict of ``stage, step, elbo, spread, lr`` after every 50 steps.
        checkpoint: a file to save to, and to resume from where it exists: a resumed run ends with the same numbers as an uninterrupted one. All
            options must be those of the first run, but for ``max_steps``: with a larger one a run that ended short of its target goes on, and one
            that was interrupted before its rate began to fall ends as if it had been given from the start.
        num_eval: fresh draws for the evaluation.

    Raises:
        OptionError: an option that is not known.
        ModelError, SupportError, DtypeError: the model or its data cannot be fitted; raised before any training.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = FlowVI(model, progress=False).run(torch.tensor([1.0, 2.0, 3.0]))
        >>> round(posterior.get_samples(4000)["mu"].mean().item(), 1)
        1.5
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoFlow | None = None,
        *,
        flow: Any = "auto",
        affine: str = "auto",
        num_particles: int = 128,
        max_steps: int = 2000,
        lr: float = 4e-3,
        seed: int = 0,
        engine: str = "auto",
        warm_start: bool = True,
        objective: str | Objective = "auto",
        dtype: torch.dtype = torch.float64,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        checkpoint: str | Path | None = None,
        num_eval: int = 10_000,
    ) -> None:
        if not callable(model):
            raise ModelError(f"model must be a Pyro model, that is, callable; got {type(model).__name__}")
        if guide is not None and not isinstance(guide, AutoFlow):
            raise OptionError(f"guide must be an AutoFlow, got {type(guide).__name__}: use stock SVI for other guides")
        saved = None if checkpoint is None else Checkpoint(checkpoint, "FlowVI")
        self.options = Options(
            num_particles, max_steps, lr, seed, engine, warm_start, objective, dtype, progress, tuple(callbacks), saved, num_eval
        )
        self.model, self.guide, self._guide_options = model, guide, {"flow": flow, "affine": affine}
        self._default_flow = (guide or AutoFlow(model, **self._guide_options)).config["flow"] == "auto"  # bad options are refused here

    def __repr__(self) -> str:
        o = self.options
        guide = repr(self._guide_options["flow"]) if self.guide is None else type(self.guide).__name__
        chosen = f"flow={guide}, num_particles={o.num_particles}, max_steps={o.max_steps}, lr={o.lr:g}, seed={o.seed}, dtype={o.dtype}"
        return f"FlowVI({getattr(self.model, '__name__', type(self.model).__name__)}, {chosen})"

    def run(self, *args: Any, **kwargs: Any) -> Posterior:
        """Fit the model to these arguments. Ctrl-C ends the training early and evaluates the best state so far."""
        dtype = self.options.dtype
        labels: list[list[str]] = []
        with seeded(self.options.seed), running(dtype, validate=True):
            posterior = self._run(*converted(args, kwargs, dtype, labels))
        posterior.log_joint.labels = labels
        return posterior

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Posterior:
        options = self.options
        guide, log_joint = set_up(self.model, self.guide or self._guide_options, args, kwargs, options.dtype)
        if options.checkpoint is not None:
            options.checkpoint.fingerprint = [options.fingerprint(), fingerprint(args, kwargs), _fingerprint_of_density(log_joint)]
        run = Run(options, guide, log_joint, self._default_flow)
        with Progress(options.progress) as bar:
            try:
                run_stages(run, bar)
            except KeyboardInterrupt:
                run.converged = False
                run.notes.append(f"interrupted: this is the best state so far; {remedy_of_interrupt(options.checkpoint)}")
            bar.stage("evaluation")
            posterior = Posterior.from_guide(
                guide,
                log_joint=log_joint,
                modes=run.modes,
                num_samples=options.num_eval,
                seed=options.seed,
                history=run.history,
                converged=run.converged,
                warnings=run.warnings(),
                num_log_density_evaluations=run.evaluations + options.num_eval,
                timings=run.timings,
                engines=run.engine_names,
            )
            bar.done(f"ELBO {posterior.elbo}, ESS {posterior.ess:.1%}, k-hat {posterior.khat:.2f}: {posterior.verdict}")
        if posterior.verdict == "poor" or not run.converged:
            text = " ".join([*posterior.warnings, f"Verdict: {posterior.verdict}.", *posterior.reasons])
            warnings.warn(text, ConvergenceWarning, stacklevel=4)
        return posterior


@torch.no_grad()
def _fingerprint_of_density(log_joint: LogJoint) -> list[Any]:
    """What tells a model's density from that of another model with the same sites; nothing where it is random."""
    if log_joint.stochastic:
        return []
    with seeded(0):
        points = torch.randn(4, log_joint.latent_dim).to(log_joint.guide.loc)
    return fingerprint((log_joint(points),), {})


def fit(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Posterior:
    """Fit a Pyro model with the default options, and get its posterior with a verdict.

    What follows the model are the model's own arguments, all of them. Options of the fit go to ``fit.with_options``, where none can be taken for an
    argument of a model that happens to have one of the same name.

    Args:
        model: a Pyro model, with its observations in place.
        args, kwargs: its arguments: tensors, arrays or plain values; floating-point ones are converted to double precision.

    Returns:
        A :class:`~pyro_flows.posterior.Posterior`: draws, densities, summary, plot, verdict.

    Cost: seconds for tens of latent numbers; half a minute for hundreds. Ctrl-C ends the training early and keeps the best state so far.

    Raises:
        ModelError, SupportError, DtypeError, ShapeError: the model or its data cannot be fitted; before any training.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> import pyro_flows as pf
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = pf.fit.with_options(progress=False, seed=1)(model, torch.tensor([1.0, 2.0, 3.0]))
        >>> posterior.verdict
        'good'
    """
    return FlowVI(model).run(*args, **kwargs)


def _with_options(**options: Any) -> Callable[..., Posterior]:
    """:func:`fit` with options of :class:`FlowVI`, such as ``seed=1, progress=False, max_steps=500``: a function of the model and its arguments."""

    def fit_with_options(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Posterior:
        return FlowVI(model, **options).run(*args, **kwargs)

    return fit_with_options


fit.with_options = _with_options  # type: ignore[attr-defined]
