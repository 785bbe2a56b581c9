"""``RoundedWeight`` (L3): what every rounding algorithm returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchmix.primitives import dequantize


@dataclass(frozen=True)
class RoundedWeight:
    """Codes of a weight with their grid, and how they came about.

    Attributes:
        codes: int8 (N, K).
        scale: bfloat16 (N, G).
        zero_point: uint8 (N, G).
        group_size: inputs per scale.
        method: the algorithm that was really used, "rtn", "clip", "gptq" or "hqq".
        note: empty, or why the algorithm is another one than asked for, or which damping it needed.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int
    method: str
    note: str = ""

    def dequantize(self) -> Tensor:
        """The weight that these codes stand for: float32 (N, K)."""
        return dequantize(self.codes, self.scale, self.zero_point, self.group_size)
