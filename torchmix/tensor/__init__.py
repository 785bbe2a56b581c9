"""The tensor subclass (L2): what a quantized weight is, and which PyTorch operations it takes part in."""

from __future__ import annotations

from torchmix.tensor import dispatch as _dispatch  # registers the operations on the class
from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor

__all__ = ["MixedPrecisionTensor"]
assert _dispatch.REGISTERED, "the operations of MixedPrecisionTensor were not registered"
