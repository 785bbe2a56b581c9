"""A rounded weight stands for scale * (code - zero_point)."""

from __future__ import annotations

import torch

from torchmix.rounding import RoundedWeight


def test_dequantize_by_groups() -> None:
    codes = torch.arange(10, dtype=torch.int8).view(1, 10)
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16)
    zero_point = torch.tensor([[3, 8]], dtype=torch.uint8)
    dense = RoundedWeight(codes, scale, zero_point, 8, "rtn").dequantize()
    assert dense.dtype == torch.float32
    assert dense.tolist() == [[-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 0.0, 2.0]]
