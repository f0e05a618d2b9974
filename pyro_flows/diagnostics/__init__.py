"""Diagnostics: how far to trust a fit."""

from .importance import Estimate, Evaluation, evaluate
from .psis import ess_fraction, khat_limit, psis

__all__ = ["Estimate", "Evaluation", "ess_fraction", "evaluate", "khat_limit", "psis"]
