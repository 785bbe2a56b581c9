"""Clip search (L3): shrink the range of each group where that lowers the error of the layer's output.

Shapes: N rows, K in_features, G groups, g = inputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchmix.primitives import code_limits, qparams_from_range
from torchmix.rounding.grid import Grid, round_groups
from torchmix.rounding.rounded_weight import RoundedWeight
from torchmix.rounding.sweep import has_kernel


@dataclass(frozen=True)
class ClipSearch:
    """Grid of factors by which minimum and maximum of a group are shrunk together.

    The defaults are the paper's: 80 to 100 % in steps of 2 % (MixLLM, arXiv 2412.14590, section 4.1).

    Attributes:
        grid_points: factors tried, evenly spaced from 1 down.
        max_shrink: the smallest factor is ``1 - max_shrink`` (dimensionless).
    """

    grid_points: int = 11
    max_shrink: float = 0.2

    def __post_init__(self) -> None:
        if self.grid_points < 1 or not 0.0 <= self.max_shrink < 1.0:
            raise ValueError(
                f"ClipSearch needs grid_points >= 1 and 0 <= max_shrink < 1, got {self.grid_points} and "
                f"{self.max_shrink}"
            )

    def factors(self) -> list[float]:
        """Factors in the order in which they are tried; of equal errors the first wins."""
        steps = max(self.grid_points - 1, 1)
        return [1.0 - self.max_shrink * i / steps for i in range(self.grid_points)]


NO_CLIP = ClipSearch(grid_points=1, max_shrink=0.0)


def search_grid(
    block: Tensor, row_bits: Tensor, diagonal: Tensor | None, search: ClipSearch
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one group, with the least error over the factors of ``search``.

    The error of a row is sum_k e_k² H_kk with e = w - dequantized w and H_kk the mean square of input k
    (the paper's activation-weighted error, MixLLM, arXiv 2412.14590, section 4.1); without it, sum_k e_k². The full
    quadratic form e H eᵀ is dearer and no better in front of GPTQ, which goes on to cancel the errors that it counts:
    2 % more KL divergence on a 5-million-parameter model.

    Args:
        block: float32 (N, g).
        row_bits: uint8 (N,).
        diagonal: float32 (g,), H_kk of the group's inputs, or None.
        search: factors to try.

    Returns:
        scale and zero point, float32 (N, 1) each.
    """
    if search.grid_points > 1 and has_kernel(block):
        from torchmix.rounding import sweep_triton

        return sweep_triton.search_group(block, code_limits(row_bits), diagonal, search.factors())
    low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor in search.factors():
        scale, zero_point = qparams_from_range(low * factor, high * factor, row_bits)
        if search.grid_points == 1:
            return scale, zero_point
        grid = Grid.of(scale, zero_point, row_bits)
        squares = (block - grid.values(grid.nearest(block))).square_()
        loss = squares.sum(1, keepdim=True) if diagonal is None else squares @ diagonal[:, None]
        if best is None:
            best = (loss, scale, zero_point)
            continue
        better = loss < best[0]
        best = (
            torch.where(better, loss, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, zero_point, best[2]),
        )
    assert best is not None, "a ClipSearch has at least one factor"
    return best[1], best[2]


def clip_round(
    weight: Tensor,
    row_bits: Tensor,
    group_size: int,
    hessian: Tensor | None = None,
    search: ClipSearch | None = None,
) -> RoundedWeight:
    """Round to nearest on grids found by :func:`search_grid`.

    Args:
        weight: float (N, K).
        row_bits: uint8 (N,).
        group_size: inputs per scale.
        hessian: float32 (K, K) or None.
        search: factors to try, by default the paper's.
    """

    def choose(block: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        diagonal = None if hessian is None else hessian.diagonal()[columns].to(block)
        return search_grid(block, row_bits, diagonal, search or ClipSearch())

    return round_groups(weight, row_bits, group_size, choose, "clip")
