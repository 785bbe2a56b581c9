"""The tensor subclass (L2): what a quantized weight is, and which PyTorch operations it takes part in."""

from __future__ import annotations

from torchmix.tensor.dispatch import registered_operations
from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor
from torchmix.tensor.regional import compile_blocks

__all__ = ["MixedPrecisionTensor", "compile_blocks", "registered_operations"]
