"""The tensor subclasses (L2): what a quantized weight is, and which PyTorch operations it takes part in."""

from __future__ import annotations

from torchmix.tensor.dispatch import registered_operations
from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor
from torchmix.tensor.packed_tensor import PackedTensor
from torchmix.tensor.regional import compile_blocks
from torchmix.tensor.registration import register_with_torchao_safetensors
from torchmix.tensor.tiled_tensor import TiledTensor

__all__ = [
    "MixedPrecisionTensor",
    "PackedTensor",
    "TiledTensor",
    "compile_blocks",
    "register_with_torchao_safetensors",
    "registered_operations",
]
