"""The tensor subclass (L2): what a quantized weight is, and which PyTorch operations it takes part in."""

from __future__ import annotations

from torchmix.tensor.dispatch import registered_operations
from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor
from torchmix.tensor.regional import compile_blocks
from torchmix.tensor.registration import register_with_torchao_safetensors

__all__ = [
    "MixedPrecisionTensor",
    "compile_blocks",
    "register_with_torchao_safetensors",
    "registered_operations",
]
