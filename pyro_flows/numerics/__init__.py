"""Numerical methods that know nothing of flows: roots and fixed points, traces and log determinants, quadrature, the normal's tails."""

from .fixed_points import FixedPoint, fixed_point
from .log_det import Roulette, batch_jacobian, estimate_log_det, hutchinson_trace, log_det
from .normal import log_ndtr, mills, ndtri_exp
from .quadrature import clenshaw_curtis, integrate_from_zero
from .roots import invert_monotone

__all__ = [
    "invert_monotone",
    "FixedPoint",
    "fixed_point",
    "batch_jacobian",
    "log_det",
    "estimate_log_det",
    "Roulette",
    "hutchinson_trace",
    "clenshaw_curtis",
    "integrate_from_zero",
    "log_ndtr",
    "mills",
    "ndtri_exp",
]
