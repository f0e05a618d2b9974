"""Numerical methods that know nothing of flows: roots and fixed points, traces and log determinants, quadrature, the normal's tails."""

from .fixed_points import FixedPoint, fixed_point
from .log_det import batch_jacobian, estimate_log_det, hutchinson_trace, log_det, roulette_weights
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
    "roulette_weights",
    "hutchinson_trace",
    "clenshaw_curtis",
    "integrate_from_zero",
    "log_ndtr",
    "mills",
    "ndtri_exp",
]
