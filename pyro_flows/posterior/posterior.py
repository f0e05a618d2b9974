"""The result of a fit: draws, densities, diagnostics, tables, figures, and a file to keep them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diagnostics import Estimate, Evaluation
from ..errors import OptionError
from ..guides import AutoFlow
from ..model.context import running
from ..model.inputs import converted
from ..model.log_joint import LogJoint
from ..model.predictive import simulate
from ..numerics.random import seeded
from .draws import evaluate_guide, latents_of_runs, log_prob, resample

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Posterior"]

Tensors = dict[str, Tensor]

_UNFINISHED = "the training did not converge: it was still gaining when it ended, so a larger max_steps may help"


class Posterior:
    """A fitted posterior, with what is known about how far to trust it.

    Made by :class:`~pyro_flows.vi.FlowVI`, or from any trained :class:`~pyro_flows.guides.AutoFlow` by
    :meth:`from_guide`. Draws use torch's global random numbers: ``pyro.set_rng_seed`` makes them repeatable.

    Args:
        guide: a trained guide, set up.
        log_joint: the model's log joint density over the guide's vector.
        evaluation: what :func:`pyro_flows.diagnostics.evaluate` found.
        history: records of the training, dicts with ``stage``, ``step`` and ``elbo``.
        converged: whether the training ended by itself.
        warnings: what a user should know about the run, in words.
        num_log_density_evaluations: evaluations of the model's density spent, training and diagnostics.
        timings: seconds by stage.
        engines: how each stage ran, ``"eager"``, ``"captured"`` or ``"compiled"``.
        seed: seed of the run.

    Attributes:
        evaluation: all diagnostics; the main ones are also here as ``elbo``, ``log_evidence``, ``khat``, ``ess``,
            ``verdict`` and ``reasons``.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> import pyro_flows as pf
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> data = torch.tensor(1.0)
        >>> posterior = Posterior.from_guide(pf.AutoFlow(model, flow=None).setup(data), data)
        >>> posterior.get_samples(100)["x"].shape, posterior.verdict  # not trained yet
        (torch.Size([100]), 'poor')
    """

    def __init__(
        self,
        guide: AutoFlow,
        log_joint: LogJoint,
        evaluation: Evaluation,
        history: Iterable[Mapping[str, Any]] = (),
        converged: bool = True,
        warnings: Iterable[str] = (),
        num_log_density_evaluations: int = 0,
        timings: Mapping[str, float] | None = None,
        engines: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.guide, self.log_joint = guide.eval(), log_joint  # a posterior does not change when it is asked
        self.evaluation = evaluation if converged else evaluation.unconverged()
        self.history = [dict(record) for record in history]
        self.converged, self.warnings = converged, list(warnings)
        if not converged and _UNFINISHED not in self.warnings:
            self.warnings.append(_UNFINISHED)
        self.num_log_density_evaluations, self.seed = num_log_density_evaluations, seed
        self.timings, self.engines = dict(timings or {}), dict(engines or {})

    @classmethod
    def from_guide(
        cls,
        guide: AutoFlow,
        *args: Any,
        log_joint: LogJoint | None = None,
        modes: Iterable[tuple[Tensor, Tensor]] = (),
        num_samples: int = 10_000,
        seed: int = 0,
        history: Iterable[Mapping[str, Any]] = (),
        converged: bool = True,
        warnings: Iterable[str] = (),
        num_log_density_evaluations: int | None = None,
        timings: Mapping[str, float] | None = None,
        engines: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Evaluate a trained guide, also one that stock ``SVI`` trained, by fresh draws.

        Args:
            guide: an :class:`~pyro_flows.guides.AutoFlow`, set up.
            args, kwargs: the arguments of the model, unless ``log_joint`` has them.
            log_joint: the model's log joint density over the guide's vector.
            modes: places and scales of modes, where the guide is looked at too, see :func:`~pyro_flows.posterior.overlooked.missed_modes`.
            num_samples: number of draws.
            seed: seed of those draws; the global random state is left alone.
            history, converged, warnings, timings, engines: see the class.
            num_log_density_evaluations: see the class; ``num_samples`` when omitted.

        Cost: ``num_samples`` evaluations of the model and of the flow.
        """
        if num_samples < 2:
            raise OptionError(f"num_samples must be at least 2, got {num_samples}")
        with seeded(seed + 2**31):  # away from the streams that trained with this seed
            if log_joint is None:
                with running(guide.setup(*args, **kwargs).flow().sample().dtype, validate=True):
                    log_joint = LogJoint(guide.model, guide, args, kwargs)
            evaluation = evaluate_guide(guide.eval(), log_joint, num_samples, modes)
        warnings = list(warnings)
        if log_joint.stochastic:
            warnings.append(f"the model's density is random, so ESS and k-hat look worse than they are: {log_joint.reason}")
        if any(getattr(layer, "log_det", "") == "estimate" for layer in guide.modules()):
            warnings.append("the guide's density is an estimate, which ESS, k-hat and the evidence suffer from: give its layers log_det='exact'")
        count = num_samples if num_log_density_evaluations is None else num_log_density_evaluations
        return cls(guide, log_joint, evaluation, history, converged, warnings, count, timings, engines, seed)

    @property
    def elbo(self) -> Estimate:
        """Evidence lower bound, nats."""
        return self.evaluation.elbo

    @property
    def log_evidence(self) -> Estimate:
        """Log evidence by importance sampling, nats."""
        return self.evaluation.log_evidence

    @property
    def khat(self) -> float:
        """Tail index of the importance weights: above 0.7 they cannot be used."""
        return self.evaluation.khat

    @property
    def ess(self) -> float:
        """Effective fraction of the draws under importance weighting, in (0, 1]."""
        return self.evaluation.ess

    @property
    def verdict(self) -> str:
        """``"good"``, ``"usable"`` or ``"poor"``."""
        return self.evaluation.verdict

    @property
    def bound(self) -> str:
        """What ``elbo`` is: ``"ELBO"``, or ``"IWHVI"``, a lower bound of it, where the guide's density is itself bounded."""
        return "IWHVI" if getattr(self.guide.flow(), "exact", True) is False else "ELBO"

    @property
    def reasons(self) -> tuple[str, ...]:
        """What the verdict rests on, and what to do about it."""
        return self.evaluation.reasons

    @torch.no_grad()
    def get_samples(self, num_samples: int = 1000, importance: bool = False) -> Tensors:
        """Draws from the posterior, in the constrained space.

        Args:
            num_samples: number of draws.
            importance: resample ten times as many draws by Pareto-smoothed importance weights, which removes what bias
                is left in a guide that covers the posterior. Some draws may repeat.

        Returns:
            site -> ``(num_samples, *site_shape)``, deterministic sites included. Discrete sites that were summed out
            are not: ``pyro.infer.infer_discrete`` draws them.

        Raises:
            ImportanceError: with ``importance=True``, the weights are too uneven (k-hat above
                ``min(1 - 1/log10 S, 0.7)``), or the model's density is random.

        Reference: Pareto smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry, 2024),
        https://arxiv.org/abs/1507.02646
        """
        if num_samples < 1:
            raise OptionError(f"num_samples must be positive, got {num_samples}")
        if importance:
            z = resample(self.guide, self.log_joint, num_samples, self.verdict)
        else:
            z = self.guide.flow().sample((num_samples,))
        return {**self.guide.unpack(z), **self.log_joint.deterministics(z)}

    def log_prob(self, samples: Mapping[str, Tensor]) -> Tensor:
        """Log density of the fitted posterior at constrained values.

        Args:
            samples: every latent site -> ``(*batch, *site_shape)``; other names are passed over.

        Returns:
            ``batch``-shaped log density, nats, with respect to the sites' own measures. Differentiable.

        Raises:
            ShapeError: a latent site is missing or has another shape.
        """
        return log_prob(self.guide, samples)

    def predictive(
        self, *args: Any, num_samples: int = 1000, samples: Tensors | None = None, parallel: bool = False, **kwargs: Any
    ) -> Tensors:
        """Posterior predictive draws: the model run forward from posterior draws, its observations drawn anew.

        Args:
            args, kwargs: arguments of the model, such as new covariates; those of the fit when none are given.
            num_samples: number of runs.
            samples: latent values to run from (as :meth:`get_samples` gives them) instead of fresh draws.
            parallel: all runs at once, for models that declare every batch dimension as a plate.

        Returns:
            site -> ``(num_samples, *shape)`` for observed, deterministic and discrete sites.

        Cost: one run of the model a draw, about a millisecond each; one in all with ``parallel``.

        Raises:
            ModelError: the model fails with these arguments, or ``parallel`` does not suit it.
            ShapeError: ``samples`` lacks a latent site, or has one of another shape.
        """
        if not args and not kwargs:
            args, kwargs = self.log_joint.args, self.log_joint.kwargs
        args, kwargs = converted(args, self._dtype), converted(kwargs, self._dtype)
        latents, count = latents_of_runs(self.guide, self.get_samples(num_samples) if samples is None else samples)
        return simulate(self.log_joint.model, args, kwargs, latents, count, self._dtype, parallel)

    @property
    def _dtype(self) -> torch.dtype:
        return self.guide.loc.dtype

    def summary(self, num_samples: int = 4000, var_names: Sequence[str] | None = None) -> DataFrame:
        """ArviZ's table of means, standard deviations and intervals, under a header that says how far to trust it.

        Those of an angle are counted from its mean direction, and may pass the seam.

        Args:
            num_samples: draws that the table is computed from.
            var_names: sites to show; all when omitted.

        Returns:
            A ``pandas.DataFrame`` with one row a scalar; printing it prints the header too, which is also its
            ``attrs["header"]``.
        """
        from .export import summary

        return summary(self, num_samples, var_names)

    def to_arviz(self, predictive: bool | str | Sequence[str] = (), num_samples: int = 4000) -> Any:
        """Everything as ArviZ wants it: an ``InferenceData`` (ArviZ 0.x) or a ``DataTree`` (1.x).

        Args:
            predictive: ``"posterior"``, ``"prior"`` or both, for the groups of predictive draws; ``True`` means
                ``"posterior"``.
            num_samples: number of draws.

        Returns:
            The groups posterior, sample_stats, log_likelihood, observed_data and what was asked for; dimensions are
            named after the model's plates. Angles are as drawn, in ``[-pi, pi)``: :meth:`summary` and :meth:`plot` alone
            count them from their mean direction.
        """
        from .export import to_arviz

        return to_arviz(self, predictive, num_samples)

    def plot(self, path: str | Path | None = None, num_samples: int = 4000) -> Figure:
        """One figure: the ELBO's course, the tail of the weights, marginals, and the most telling pairs.

        A notebook shows the returned figure as a cell's last value; in a script give ``path``, or call its ``savefig``.

        Args:
            path: where to save it as well, such as ``"posterior.png"``.
            num_samples: draws shown.
        """
        from .plots import plot

        return plot(self, path, num_samples)

    def save(self, path: str | Path) -> None:
        """Write guide, diagnostics and history to a file of plain tensors and numbers; the model stays in your code.

        Raises:
            CheckpointError: the file cannot be written.
        """
        from .files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Posterior:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            model: the model; or an :class:`~pyro_flows.guides.AutoFlow` of it, made with the same options, where these
                were more than names (a flow built by hand, a function).
            args, kwargs: the model's arguments, the same as in the fit: the file does not hold them.

        Raises:
            CheckpointError: the file is damaged, foreign, or belongs to another model, or the arguments are not those of the fit.
        """
        from .files import load

        return load(cls, path, model, args, kwargs)

    def __repr__(self) -> str:
        shapes = ", ".join([f"{s.name}{list(s.shape) or ''}" for s in self.guide.sites[:6]] + ["..."] * (len(self.guide.sites) > 6))
        found = str(self.evaluation).replace("ELBO", "ELBO (IWHVI)", int(self.bound == "IWHVI")).splitlines()
        lines = [f"Posterior of {shapes} ({self.guide.latent_dim} dimensions)", *("  " + line for line in found)]
        return "\n".join([*lines, *("  warning: " + line for line in self.warnings)])
