"""Diagnostics: how far to trust a fit, and a transform."""

from .importance import Estimate, Evaluation, evaluate
from .invertibility import Invertibility, check_invertibility
from .ode import OdeCheck, check_ode
from .psis import ess_fraction, khat_limit, psis

__all__ = ["Estimate", "Evaluation", "Invertibility", "OdeCheck", "check_invertibility", "check_ode", "ess_fraction", "evaluate", "khat_limit"]
__all__ += ["psis"]
