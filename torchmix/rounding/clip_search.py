"""Clip search (L3): shrink the range of each group where that lowers the error of the layer's output.

Shapes: N rows, K in_features, G groups, g = inputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchmix.primitives import SCALE_DTYPE, code_limits, qparams_from_range
from torchmix.rounding.rounded_weight import RoundedWeight


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


def round_columns(
    columns: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[Tensor, Tensor]
) -> Tensor:
    """Nearest codes as float32: clamp(round(w / scale) + zero_point).

    Args:
        columns: float32 (N, g).
        scale, zero_point: float32 (N, 1).
        limits: smallest and largest code, float32 (N, 1) each.
    """
    codes = torch.round(columns / scale) + zero_point
    return torch.minimum(torch.maximum(codes, limits[0]), limits[1])


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
    low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
    limits = tuple(limit[:, None] for limit in code_limits(row_bits))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor in search.factors():
        scale, zero_point = qparams_from_range(low * factor, high * factor, row_bits)
        if search.grid_points == 1:
            return scale, zero_point
        codes = round_columns(block, scale, zero_point, (limits[0], limits[1]))
        error = block - scale * (codes - zero_point)
        squares = error.square_()
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
    weight = weight.float()
    limits = tuple(limit[:, None] for limit in code_limits(row_bits))
    codes, scales, zero_points = [], [], []
    for start in range(0, weight.shape[1], group_size):
        part = slice(start, start + group_size)
        diagonal = None if hessian is None else hessian.diagonal()[part].to(weight)
        scale, zero_point = search_grid(weight[:, part], row_bits, diagonal, search or ClipSearch())
        codes.append(round_columns(weight[:, part], scale, zero_point, (limits[0], limits[1])))
        scales.append(scale)
        zero_points.append(zero_point)
    return RoundedWeight(
        torch.cat(codes, 1).to(torch.int8),
        torch.cat(scales, 1).to(SCALE_DTYPE),
        torch.cat(zero_points, 1).to(torch.uint8),
        group_size,
        "clip",
    )
