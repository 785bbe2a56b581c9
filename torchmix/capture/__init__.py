"""Recording what flows through linear layers during calibration (L2)."""

from __future__ import annotations

from torchmix.capture.linear_calls import LinearCall, LinearCalls
from torchmix.capture.quantized_inputs import QuantizedInputs, fake_quantize
from torchmix.capture.replay import (
    Block,
    NotReplayableError,
    chunk_samples,
    find_blocks,
    hidden_states_device,
    record_blocks,
    short_circuit,
)
from torchmix.capture.residual_adds import ResidualAdds
from torchmix.capture.statistics import HessianAccumulator

__all__ = [
    "Block",
    "HessianAccumulator",
    "LinearCall",
    "LinearCalls",
    "NotReplayableError",
    "QuantizedInputs",
    "ResidualAdds",
    "chunk_samples",
    "fake_quantize",
    "find_blocks",
    "hidden_states_device",
    "record_blocks",
    "short_circuit",
]
