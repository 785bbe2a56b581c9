"""Round to nearest on a hand calculation; the grid itself is tested in test_primitives.py."""

from __future__ import annotations

import torch

from torchmix.rounding import rtn_round


def test_hand_calculation() -> None:
    """Row 0, 2 bits: range [-1, 2], step 1. Row 1, 8 bits: largest magnitude 127, step 1, half to even."""
    weight = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [127.0, 0.5, 1.5, -3.0]])
    rounded = rtn_round(weight, torch.tensor([2, 8], dtype=torch.uint8), 8)
    assert rounded.codes.tolist() == [[0, 1, 2, 3], [127, 0, 2, -3]]
    assert rounded.scale.tolist() == [[1.0], [1.0]]
    assert rounded.zero_point.tolist() == [[1], [0]]
    assert rounded.dequantize().tolist() == [[-1, 0, 1, 2], [127, 0, 2, -3]]
    assert (rounded.method, rounded.note) == ("rtn", "")
    assert (rounded.codes.dtype, rounded.scale.dtype) == (torch.int8, torch.bfloat16)
