"""Diagnostics: how far to trust a fit, and a transform."""

from .importance import Estimate, Evaluation, evaluate
from .invertibility import Invertibility, check_invertibility
from .psis import ess_fraction, khat_limit, psis

__all__ = ["Estimate", "Evaluation", "Invertibility", "check_invertibility", "ess_fraction", "evaluate", "khat_limit", "psis"]
