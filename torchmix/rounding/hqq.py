"""Half-quadratic rounding (L3): a grid for each group that fits most weights well and lets few fit badly; no data.

After HQQ, Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/
hqq_blog), which minimises sum |w - dequantized w|^p with p < 1 by splitting off a sparse error: alternate

    W_e = shrink_p(W - s (Q - z), beta)          the sparse part of the error
    z   = mean(Q - (W - W_e) / s)                the zero point, given W_e
    beta = kappa * beta

Departures, because of the number format and because they do not cost more:

- The zero point is an integer inside the code range and zero in 8-bit rows, so z is rounded and clamped at the end;
  alone that nearly always gives back the zero point of round to nearest. Therefore the same splitting is then run on
  the scale, s = <W - W_e, Q - z> / <Q - z, Q - z>, with z held fast.
- Errors are measured in steps of the grid (divided by s), so that beta means the same for weights of any size.
- Instead of stopping all groups at once, each row and group keeps the best grid it came by. The first one is that of
  round to nearest, so the result is never worse than round to nearest in the measure of the method.

Shapes: N rows, K in_features, g = inputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchmix.primitives import SCALE_DTYPE, code_limits, qparams_from_range
from torchmix.rounding.grid import Grid, round_groups
from torchmix.rounding.rounded_weight import RoundedWeight


@dataclass(frozen=True)
class HalfQuadratic:
    """Settings of the splitting; the defaults are those of the authors' code (mobiusml/hqq, optimize.py).

    Attributes:
        p: exponent of the error norm, 0 < p <= 1; small exponents ignore a few large errors.
        beta: weight of the quadratic term at first, per step of the grid squared.
        kappa: factor by which beta grows per iteration.
        iterations: alternations for the zero point, and as many for the scale.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0.0 < self.p <= 1.0 or not self.beta > 0.0 or not self.kappa >= 1.0 or self.iterations < 0:
            raise ValueError(
                "HalfQuadratic needs 0 < p <= 1, beta > 0, kappa >= 1 and iterations >= 0, got "
                f"{self.p}, {self.beta}, {self.kappa} and {self.iterations}"
            )

    def betas(self) -> list[float]:
        """beta of each iteration."""
        return [self.beta * self.kappa**i for i in range(self.iterations)]


def shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """sign(x) max(|x| - |x|^(p - 1) / beta, 0): generalized soft thresholding, the sparse part of an error.

    Exactly the minimiser of |e| + beta / 2 (e - x)² for p = 1, an approximation for smaller p (HQQ, as above).

    Args:
        error: float, any shape.
        beta: larger leaves more of the error.
        p: exponent, 0 < p <= 1.
    """
    size = error.abs()
    return error.sign() * (size - size.pow(p - 1.0) / beta).clamp(min=0.0)


def lp_error(block: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, p: float) -> Tensor:
    """sum |w - scale (code - zero_point)|^p over each row: float32 (N, 1); the measure of the method.

    Args:
        block, codes: float32 (N, g).
        scale, zero_point: float32 (N, 1).
        p: exponent.
    """
    return (block - scale * (codes - zero_point)).abs().pow(p).sum(1, keepdim=True)


def solve_grid(block: Tensor, row_bits: Tensor, settings: HalfQuadratic) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one group by half-quadratic splitting, at worst those of round to nearest.

    Args:
        block: float32 (N, g).
        row_bits: uint8 (N,).
        settings: exponent and course of the splitting.

    Returns:
        scale (values that bfloat16 holds) and zero point (integers), float32 (N, 1) each.
    """
    scale, zero_point = qparams_from_range(block.amin(1, keepdim=True), block.amax(1, keepdim=True), row_bits)

    low, high = (limit[:, None] for limit in code_limits(row_bits))

    def measured(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = Grid(scale, zero_point, low, high).nearest(block)
        return lp_error(block, codes, scale, zero_point, settings.p), scale, zero_point

    best = measured(scale, zero_point)
    free = _fit_zero_point(block, scale, zero_point, (low, high), settings)
    zero_point = torch.where(row_bits[:, None] == 8, 0.0, torch.round(free).clamp(min=0.0)).minimum(high)
    best = _better(best, measured(scale, zero_point))
    for beta in settings.betas():
        centered = Grid(scale, zero_point, low, high).nearest(block) - zero_point
        scale = _fit_scale(block, centered, scale, beta, settings.p)
        best = _better(best, measured(scale, zero_point))
    return best[1], best[2]


def _better(
    best: tuple[Tensor, Tensor, Tensor], candidate: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of two (error, scale, zero point), for each row the one of smaller error, the first where they are equal."""
    better = candidate[0] < best[0]
    error, scale, zero_point = (
        torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)
    )
    return error, scale, zero_point


def _fit_zero_point(
    block: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[Tensor, Tensor], settings: HalfQuadratic
) -> Tensor:
    """The method's own alternation for a zero point that need not be an integer: float32 (N, 1)."""
    for beta in settings.betas():
        codes = torch.round(block / scale + zero_point)
        codes = torch.minimum(torch.maximum(codes, limits[0]), limits[1])
        sparse = shrink(block / scale - (codes - zero_point), beta, settings.p)
        zero_point = (codes - block / scale + sparse).mean(1, keepdim=True)
    return zero_point


def _fit_scale(block: Tensor, centered: Tensor, scale: Tensor, beta: float, p: float) -> Tensor:
    """Least squares of W - W_e on code - zero_point, rounded to bfloat16; a useless result keeps the old scale."""
    target = block - scale * shrink(block / scale - centered, beta, p)
    squares = centered.square().sum(1, keepdim=True)
    fitted = (target * centered).sum(1, keepdim=True) / squares
    fitted = fitted.to(SCALE_DTYPE).float()
    return torch.where((fitted > 0.0) & torch.isfinite(fitted), fitted, scale)


def hqq_round(
    weight: Tensor, row_bits: Tensor, group_size: int, settings: HalfQuadratic | None = None
) -> RoundedWeight:
    """Round to nearest on grids found by :func:`solve_grid`; needs no data.

    Args:
        weight: float (N, K).
        row_bits: uint8 (N,).
        group_size: inputs per scale.
        settings: exponent and course of the splitting, by default the authors'.
    """
    chosen = settings or HalfQuadratic()
    return round_groups(
        weight, row_bits, group_size, lambda block, columns: solve_grid(block, row_bits, chosen), "hqq"
    )
