"""Access to the reference posteriors for the tests; skips, with the reason, where their data are absent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

from benchmarks.models import available, folder

needs_posteriors = pytest.mark.skipif(
    not available(), reason=f"no reference posteriors in {folder()}: set PYRO_FLOWS_DATA"
)
