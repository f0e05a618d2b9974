"""What flows of every kind answer, so that what fits and scores them need not ask which kind they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import OptionError

__all__ = ["AbstractFlow"]


class AbstractFlow(nn.Module):
    """A base distribution pushed through layers; calling it, with a context or without, gives the distribution of its points.

    The distribution has ``sample``, ``sample_and_log_prob(shape)`` and, where :attr:`exact`, ``log_prob``; else
    ``log_prob_bound(x, num_particles, gradient)``. The answers below are those of a flow with an exact density; other kinds override them.

    Subclasses implement :attr:`dim`, :attr:`context_dim`, :attr:`layers` and ``forward``.
    """

    base: nn.Module

    @property
    def dim(self) -> int:
        """Number of coordinates of a point."""
        raise NotImplementedError

    @property
    def context_dim(self) -> int:
        """Size of the context; 0 for an unconditional flow."""
        raise NotImplementedError

    @property
    def layers(self) -> Any:
        """The sequence of layers, base to target."""
        raise NotImplementedError

    @property
    def bijective(self) -> bool:
        """Whether the layers are transforms of the points alone, which take a base draw to a point and back."""
        return True

    @property
    def traceable_layers(self) -> Any:
        """The last layers, whose output a point determines: all of them in a bijective flow."""
        return self.layers

    @property
    def has_implicit_layers(self) -> bool:
        """Whether a layer's derivatives are functions of its own making (implicit, or of an estimate), which ``torch.func`` cannot nest."""
        return any(getattr(part, "implicit", False) for part in self.modules())

    @property
    def manifold(self) -> Any:
        """The manifold that points lie on; ``None`` for all of space."""
        return None

    # The density and its bounds

    @property
    def exact(self) -> bool:
        """Whether the density is computed exactly, rather than by a bound."""
        return True

    @property
    def default_objective(self) -> str:
        """What ``fit_density`` fits this flow by when nothing is said."""
        return "likelihood"

    @property
    def gradients(self) -> tuple[str, ...]:
        """The ways in which the bound may be differentiated; empty for an exact density."""
        return ()

    @property
    def inferred_kinds(self) -> set[bool]:
        """Whether the variables that a bound infers are discrete: ``{True}``, ``{False}``, both, or neither where the density is exact."""
        return set()

    @property
    def needs_laws(self) -> bool:
        """Whether a bound depends on what :meth:`fit_laws` measures."""
        return False

    def fit_laws(self, num_samples: int = 4096, context: Tensor | None = None, momentum: float = 0.0) -> None:
        """Measure, on draws, what the inference of a bound depends on; nothing here."""

    # Classes

    @property
    def num_classes(self) -> int:
        """How many classes rows may be labelled with; 0 for a flow without."""
        return 0

    def log_prob_labelled(self, x: Tensor, labels: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of points together with their classes, integers ``(*batch,)``; of the point alone where the class is -1, unknown."""
        raise OptionError(f"this {type(self).__name__} has no classes: use pf.flows.flow_gmm(dim, components)")

    # Competing units

    def usage(self, num_samples: int = 4096, context: Tensor | None = None) -> dict[int, Tensor]:
        """How often each unit wins, on draws: for each layer of competing units, by its position, shares ``(groups, units)``; none here."""
        return {}

    def revive(self, num_samples: int = 4096, threshold: float = 1e-3, context: Tensor | None = None) -> int:
        """Put units that win less often than ``threshold`` to new use; returns how many there were, none here."""
        return 0
