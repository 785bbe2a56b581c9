"""Recording what flows through linear layers during calibration (L2)."""

from __future__ import annotations

from torchmix.capture.linear_calls import LinearCall, LinearCalls
from torchmix.capture.replay import Block, NotReplayableError, find_blocks, record_blocks
from torchmix.capture.statistics import HessianAccumulator

__all__ = [
    "Block",
    "HessianAccumulator",
    "LinearCall",
    "LinearCalls",
    "NotReplayableError",
    "find_blocks",
    "record_blocks",
]
