"""Gradient clipping relative to the gradients before, so that it needs no scale."""

from __future__ import annotations

import math
import statistics
from collections import deque

__all__ = ["GradientClip"]

_WINDOW, _IGNORE, _CLIP, _FIRST = 100, 10.0, 2.0, 20


class GradientClip:
    """Says by what to multiply a gradient: 1, less where it is twice as long as the median of the last hundred, 0 where it is to be ignored.

    Reference: Flow annealed importance sampling bootstrap (Midgley et al., 2023), https://arxiv.org/abs/2208.01893
    """

    def __init__(self) -> None:
        self.norms: deque[float] = deque(maxlen=_WINDOW)

    def factor(self, norm: float) -> float:
        """The factor for a gradient of this norm; it is remembered unless it is not finite."""
        if not math.isfinite(norm):
            return 0.0
        factor = 1.0
        if len(self.norms) >= _FIRST:
            median = statistics.median(self.norms) or norm  # zeros say nothing about a usual length
            if norm > _CLIP * median:
                factor = _CLIP * median / norm
            if norm > _IGNORE * median:
                norm, factor = _IGNORE * median, 0.0
        self.norms.append(norm)
        return factor
