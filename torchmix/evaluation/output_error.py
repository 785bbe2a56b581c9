"""Signal to quantization noise ratio of one tensor (L2, torch only)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio, 20 log10(|reference| / |reference - approximation|), in dB.

    Both tensors have the same shape, any dtype and any device; the norms are taken in float64 over all
    elements. Equal tensors give inf, a zero reference with an error gives -inf, NaN anywhere gives NaN.

    Raises:
        ValueError: the shapes differ, or the tensors are empty.
    """
    if reference.shape != approximation.shape:
        raise ValueError(
            f"sqnr_db compares tensors of one shape, got reference {tuple(reference.shape)} and "
            f"approximation {tuple(approximation.shape)}"
        )
    if reference.numel() == 0:
        raise ValueError(f"sqnr_db needs at least one element, got shape {tuple(reference.shape)}")
    signal = reference.detach().to(torch.float64)
    noise = signal - approximation.detach().to(signal)
    signal_norm = float(torch.linalg.vector_norm(signal))
    noise_norm = float(torch.linalg.vector_norm(noise))
    if noise_norm == 0.0:
        return math.inf
    if signal_norm == 0.0:
        return -math.inf if not math.isnan(noise_norm) else math.nan
    return 20.0 * math.log10(signal_norm / noise_norm)
