"""GPTQ (L3): rounding that lets later inputs make up for the error of earlier ones.

GPTQ, arXiv 2210.17323, Algorithm 1, with the choices of MixLLM (arXiv 2412.14590, section 4.1): blocks are the
quantization groups; whole groups are visited by falling diag(H), which keeps each group together in the stored
order; the grid of a group is searched on its already updated weights. All rows are rounded in one pass, each on
the grid of its own width.

Shapes: N rows, K in_features, G groups, g = inputs of one group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchmix.primitives import SCALE_DTYPE
from torchmix.rounding.clip_search import ClipSearch, clip_round, search_grid
from torchmix.rounding.grid import Grid
from torchmix.rounding.rounded_weight import RoundedWeight
from torchmix.rounding.sweep import gptq_group

PERCDAMP = 0.01
DAMPING_STEPS = (1.0, 10.0, 100.0)  # percdamp is multiplied by these until the Cholesky factor exists


def gptq_round(
    weight: Tensor,
    row_bits: Tensor,
    group_size: int,
    hessian: Tensor,
    *,
    percdamp: float = PERCDAMP,
    search: ClipSearch | None = None,
    group_reorder: bool = True,
) -> RoundedWeight:
    """Round a weight with GPTQ, rows of mixed widths at once.

    When the damped Hessian has no Cholesky factor, the damping is raised tenfold, twice; when that does not help,
    or the Hessian is zero or not finite, the weight is rounded with clip search alone. ``note`` of the result says
    so, callers must report it.

    Args:
        weight: float (N, K).
        row_bits: uint8 (N,).
        group_size: inputs per scale.
        hessian: float32 (K, K), (2 / T) * sum of x xᵀ; any factor in front gives the same codes.
        percdamp: this fraction of mean(diag H) is added to the diagonal.
        search: clip factors tried inside GPTQ, by default the paper's.
        group_reorder: visit groups by falling sum of diag(H).
    """
    weight, search = weight.float(), search or ClipSearch()
    hessian = hessian.to(weight.device, torch.float32)
    groups = list(torch.arange(weight.shape[1], device=weight.device).split(group_size))
    visit = list(range(len(groups)))
    if group_reorder:
        sums = [-float(hessian.diagonal()[columns].sum()) for columns in groups]
        visit.sort(key=lambda g: (sums[g], g))
    order = torch.cat([groups[g] for g in visit])
    factor, note = _inverse_cholesky(hessian[order][:, order], percdamp)
    if factor is None:
        rounded = clip_round(weight, row_bits, group_size, None, search)
        return RoundedWeight(rounded.codes, rounded.scale, rounded.zero_point, group_size, "clip", note)

    diagonal = hessian.diagonal()

    def choose_grid(block: Tensor, columns: slice) -> Grid:
        scale, zero_point = search_grid(block, row_bits, diagonal[order[columns]], search)
        return Grid.of(scale, zero_point, row_bits)

    sizes = [len(groups[g]) for g in visit]
    codes, grids = gptq_sweep(weight[:, order], factor, sizes, choose_grid, gptq_group)
    restored = torch.empty_like(codes, dtype=torch.int8)
    restored[:, order] = codes.to(torch.int8)
    in_place = [grids[visit.index(g)] for g in range(len(groups))]
    scale = torch.cat([grid.scale for grid in in_place], 1)
    zero_point = torch.cat([grid.zero_point for grid in in_place], 1)
    return RoundedWeight(
        restored, scale.to(SCALE_DTYPE), zero_point.to(torch.uint8), group_size, "gptq", note
    )


def gptq_sweep(
    W_NK: Tensor,
    U_KK: Tensor,
    block_sizes: list[int],
    choose_grid: Callable[[Tensor, slice], Grid],
    round_block: Callable[[Tensor, Tensor, Grid], tuple[Tensor, Tensor]],
) -> tuple[Tensor, list[Grid]]:
    """Algorithm 1 of GPTQ with lazy updates; the number format is the caller's.

    Args:
        W_NK: float32 (N, K), columns in the order of the visit; overwritten.
        U_KK: float32 (K, K), upper Cholesky factor of the inverse Hessian in the same order.
        block_sizes: inputs per block; the grid is chosen at the start of each block.
        choose_grid: (block (N, g), its columns) -> grid.
        round_block: (block (N, g), its part of U (g, g), grid) -> codes and errors (N, g), as
            :func:`torchmix.rounding.sweep.gptq_group`.

    Returns:
        float32 codes (N, K) and the grid of each block.
    """
    codes, grids, start = [], [], 0
    for size in block_sizes:
        columns = slice(start, start + size)
        grid = choose_grid(W_NK[:, columns], columns)
        codes_Ng, error_Ng = round_block(W_NK[:, columns], U_KK[columns, columns], grid)
        # the columns of later blocks, once per block
        W_NK[:, columns.stop :].addmm_(error_Ng, U_KK[columns, columns.stop :], alpha=-1)
        codes.append(codes_Ng)
        grids.append(grid)
        start += size
    return torch.cat(codes, 1), grids


def _inverse_cholesky(hessian: Tensor, percdamp: float) -> tuple[Tensor | None, str]:
    """Upper Cholesky factor of the damped inverse, or None; and a note when the first damping did not do.

    Computed in float64: a float32 Hessian of correlated inputs is often not positive definite to float32 accuracy.
    """
    mean = float(hessian.diagonal().double().mean())
    if not mean > 0.0 or not torch.isfinite(hessian).all():
        reason = (
            "the Hessian is zero (no calibration token reached it)"
            if mean == 0.0
            else "the Hessian is not finite"
        )
        return None, f"{reason}: rounded with clip search instead of GPTQ"
    wide = hessian.double()
    for step in DAMPING_STEPS:
        damped = wide + percdamp * step * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            note = (
                "" if step == 1.0 else f"GPTQ needed a damping of {percdamp * step:g} instead of {percdamp:g}"
            )
            return upper.float(), note
    highest = percdamp * DAMPING_STEPS[-1]
    return (
        None,
        f"no Cholesky factor even at a damping of {highest:g}: rounded with clip search instead of GPTQ",
    )
