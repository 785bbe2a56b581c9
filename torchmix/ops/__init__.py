"""Registered operators (L1): each file holds one schema with its reference, fake and autograd.

Importing this package registers ``torch.ops.torchmix.*``. The references are plain PyTorch and run on every
device; a compiled library only adds faster kernels for the same schemas.
"""

from __future__ import annotations

from torchmix.ops.dequantize_rows import dequantize_rows
from torchmix.ops.dequantize_tiles import dequantize_tiles
from torchmix.ops.gather_rows import gather_rows
from torchmix.ops.mixed_grouped_linear import mixed_grouped_linear
from torchmix.ops.mixed_linear import mixed_linear, mixed_linear_quantized
from torchmix.ops.mixed_linear_prepared import mixed_linear_tiled_prepared
from torchmix.ops.mixed_linear_tiled import mixed_linear_tiled, mixed_linear_tiled_quantized
from torchmix.ops.prepare_activation import prepare_activation
from torchmix.ops.quantize_activation import quantize_activation

__all__ = [
    "dequantize_rows",
    "dequantize_tiles",
    "gather_rows",
    "mixed_grouped_linear",
    "mixed_linear",
    "mixed_linear_quantized",
    "mixed_linear_tiled",
    "mixed_linear_tiled_prepared",
    "mixed_linear_tiled_quantized",
    "prepare_activation",
    "quantize_activation",
]
