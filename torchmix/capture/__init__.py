"""Recording what flows through linear layers during calibration (L2)."""

from __future__ import annotations

from torchmix.capture.linear_calls import LinearCall, LinearCalls
from torchmix.capture.statistics import HessianAccumulator

__all__ = ["HessianAccumulator", "LinearCall", "LinearCalls"]
