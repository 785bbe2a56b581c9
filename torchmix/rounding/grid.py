"""The grid of one group of inputs (L3), and rounding to nearest on grids that are chosen group by group.

Shapes: N rows, K in_features, g inputs of one group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchmix.primitives import SCALE_DTYPE, code_limits
from torchmix.rounding.rounded_weight import RoundedWeight


@dataclass(frozen=True)
class Grid:
    """What the codes of a group mean: scale, zero point, smallest and largest code, float32 (N, 1) each."""

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor, row_bits: Tensor) -> Grid:
        """The grid of rows of these widths: scale and zero point (N, 1), uint8 (N,)."""
        low, high = code_limits(row_bits)
        return cls(scale, zero_point, low[:, None], high[:, None])

    def nearest(self, columns: Tensor) -> Tensor:
        """Nearest codes as float32: clamp(round(w / scale) + zero_point), of float32 (N, any)."""
        codes = torch.round(columns / self.scale) + self.zero_point
        return torch.minimum(torch.maximum(codes, self.low), self.high)

    def values(self, codes: Tensor) -> Tensor:
        """scale * (code - zero_point)."""
        return self.scale * (codes - self.zero_point)


def round_groups(
    weight: Tensor,
    row_bits: Tensor,
    group_size: int,
    choose: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    method: str,
) -> RoundedWeight:
    """Nearest codes on the grids that ``choose`` gives.

    Args:
        weight: float (N, K).
        row_bits: uint8 (N,).
        group_size: inputs per scale.
        choose: (group (N, g) in float32, its columns) -> scale and zero point, float32 (N, 1) each.
        method: name for the result.
    """
    weight = weight.float()
    codes, grids = [], []
    for start in range(0, weight.shape[1], group_size):
        columns = slice(start, start + group_size)
        grids.append(Grid.of(*choose(weight[:, columns], columns), row_bits))
        codes.append(grids[-1].nearest(weight[:, columns]))
    return RoundedWeight(
        torch.cat(codes, 1).to(torch.int8),
        torch.cat([grid.scale for grid in grids], 1).to(SCALE_DTYPE),
        torch.cat([grid.zero_point for grid in grids], 1).to(torch.uint8),
        group_size,
        method,
    )
