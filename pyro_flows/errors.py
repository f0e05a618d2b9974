"""The errors of pyro_flows: each names the argument or the site that is wrong, and what to do about it."""

from __future__ import annotations

__all__ = [
    "PyroFlowsError",
    "ShapeError",
    "DtypeError",
    "SupportError",
    "ModelError",
    "DataError",
    "OptionError",
    "ParamStoreError",
    "ImportanceError",
    "IntractableError",
    "InversionError",
    "IntegrationError",
    "CaptureError",
    "TrainingError",
    "CheckpointError",
    "ConcurrencyError",
    "CheckpointWarning",
    "ConvergenceWarning",
    "SupportWarning",
]


class PyroFlowsError(Exception):
    """The root of every error that pyro_flows raises on purpose."""


class ShapeError(PyroFlowsError, ValueError):
    """A tensor has the wrong shape: the message says which, and what was expected."""


class DtypeError(PyroFlowsError, TypeError):
    """A tensor has the wrong dtype, or lies on another device than the parameters."""


class SupportError(PyroFlowsError, ValueError):
    """A site's support has no bijection from the reals, or a value lies outside its support."""


class ModelError(PyroFlowsError, ValueError):
    """A model or its data cannot be fitted as they are: no latent site, NaN data, an impossible initial point."""


class DataError(PyroFlowsError, ValueError):
    """Rows that no density can be fitted to as they are: not finite, too few, constant, or beyond the bound of the flow's splines."""


class OptionError(PyroFlowsError, ValueError):
    """An option has a value that is not known or makes no sense."""


class ParamStoreError(PyroFlowsError, RuntimeError):
    """Pyro's parameter store holds another guide's parameters under this guide's names."""


class ImportanceError(PyroFlowsError, RuntimeError):
    """Importance weights are too uneven to be used."""


class IntractableError(PyroFlowsError, NotImplementedError):
    """A random index does not allow what is asked: a density in closed form, a gradient through a discrete choice. The message says what does."""


class InversionError(PyroFlowsError, RuntimeError):
    """A numerical inverse did not converge: the message says how far it got, and where."""


class IntegrationError(PyroFlowsError, RuntimeError):
    """A differential equation could not be solved: the message says at which time, and how large the state was there."""


class CaptureError(PyroFlowsError, RuntimeError):
    """A model cannot be captured as a static graph: the message says why."""


class TrainingError(PyroFlowsError, RuntimeError):
    """Training broke down: the message says what was tried; the last good state is kept."""


class CheckpointError(PyroFlowsError, RuntimeError):
    """A file is not a checkpoint of this model and guide, or is damaged."""


class ConcurrencyError(PyroFlowsError, RuntimeError):
    """Two threads fit at the same time, and would share torch's random numbers and default dtype: use processes instead."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written, as on a full disk; the fit goes on without it."""


class ConvergenceWarning(UserWarning):
    """A fit stopped before it converged, or its diagnostics say not to trust it."""


class SupportWarning(UserWarning):
    """A site's values are taken for what they are not: angles for numbers on a line. The message says which guide knows better."""
