"""Numerical methods that know nothing of flows: root finding with implicit gradients."""

from .roots import invert_monotone

__all__ = ["invert_monotone"]
