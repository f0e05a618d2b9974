"""The result of a fit: a :class:`Posterior` with draws, densities, diagnostics, tables, figures and files."""

from .posterior import Posterior

__all__ = ["Posterior"]
