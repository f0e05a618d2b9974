"""The result of a fit as data: the guide, the log joint density, the evaluation; draws and densities."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
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
    from typing_extensions import Self

__all__ = ["PosteriorCore"]

Tensors = dict[str, Tensor]

_UNFINISHED = "the training did not converge: it was still gaining when it ended, so a larger max_steps may help"


class PosteriorCore:
    """A trained guide with its model's log joint density and an evaluation: draws and densities, and what is known about how far to trust them.

    :class:`~pyro_flows.posterior.Posterior` adds tables, figures and files; its docstring says what the arguments are.
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
        self.guide, self.log_joint = _own_copy(guide).eval(), log_joint  # a posterior does not change when it is asked, or the guide trained again
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
    ) -> Self:
        """Evaluate a trained guide, also one that stock ``SVI`` trained, by fresh draws.

        Args:
            guide: an :class:`~pyro_flows.guides.AutoFlow`, set up.
            args, kwargs: the arguments of the model, unless ``log_joint`` has them.
            log_joint: the model's log joint density over the guide's vector.
            modes: places and scales of modes, where the guide is looked at too, see :func:`~pyro_flows.posterior.missed_mass.missed_modes`.
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
        if log_joint.frozen:
            names = ", ".join(map(repr, log_joint.frozen))
            reason = f"The posterior is that given pyro.param {names} at its initial value, which no data have moved."
            evaluation = evaluation.usable_at_best(reason)
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
        args, kwargs = converted(args, kwargs, self._dtype)
        latents, count = latents_of_runs(self.guide, self.get_samples(num_samples) if samples is None else samples)
        return simulate(self.log_joint.model, args, kwargs, latents, count, self._dtype, parallel)

    @property
    def _dtype(self) -> torch.dtype:
        return self.guide.loc.dtype

    def __repr__(self) -> str:
        shapes = ", ".join([f"{s.name}{list(s.shape) or ''}" for s in self.guide.sites[:6]] + ["..."] * (len(self.guide.sites) > 6))
        evaluated = str(self.evaluation).replace("ELBO", "ELBO (IWHVI)", int(self.bound == "IWHVI")).splitlines()
        lines = [f"Posterior of {shapes} ({self.guide.latent_dim} dimensions)", *("  " + line for line in evaluated)]
        return "\n".join([*lines, *("  warning: " + line for line in self.warnings)])


def _own_copy(guide: AutoFlow) -> AutoFlow:
    """The same guide with a flow of its own; the model, and all else, is shared."""
    own = object.__new__(type(guide))  # copy.copy would ask Pyro's __getstate__, which takes the model from the original
    own.__dict__.update(guide.__dict__)
    own.__dict__["_modules"] = {**guide._modules, "flow": copy.deepcopy(guide._modules["flow"])}
    return own
