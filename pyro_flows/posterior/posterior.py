"""The result of a fit: draws, densities, diagnostics, tables, figures, and a file to keep them in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import export, files, plots
from .core import PosteriorCore

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Posterior"]


class Posterior(PosteriorCore):
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
        return export.summary(self, num_samples, var_names)

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
        return export.to_arviz(self, predictive, num_samples)

    def plot(self, path: str | Path | None = None, num_samples: int = 4000) -> Figure:
        """One figure: the ELBO's course, the tail of the weights, marginals, and the most telling pairs.

        A notebook shows the returned figure as a cell's last value; in a script give ``path``, or call its ``savefig``.

        Args:
            path: where to save it as well, such as ``"posterior.png"``.
            num_samples: draws shown.
        """
        return plots.plot(self, path, num_samples)

    def save(self, path: str | Path) -> None:
        """Write guide, diagnostics and history to a file of plain tensors and numbers; the model stays in your code.

        Raises:
            CheckpointError: the file cannot be written.
        """
        files.save(self, path)

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
        return files.load(cls, path, model, args, kwargs)
