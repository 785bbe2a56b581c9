"""Round to nearest (L3): minimum and maximum of each group set the grid."""

from __future__ import annotations

from torch import Tensor

from torchmix.primitives import choose_qparams, quantize
from torchmix.rounding.rounded_weight import RoundedWeight


def rtn_round(weight: Tensor, row_bits: Tensor, group_size: int) -> RoundedWeight:
    """Nearest code for every weight on the min-max grid of its group.

    Args:
        weight: float (N, K).
        row_bits: uint8 (N,).
        group_size: inputs per scale.
    """
    scale, zero_point = choose_qparams(weight, row_bits, group_size)
    codes = quantize(weight, scale, zero_point, row_bits, group_size)
    return RoundedWeight(codes, scale, zero_point, group_size, "rtn")
