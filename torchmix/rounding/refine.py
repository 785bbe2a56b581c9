"""Refinement after GPTQ (L3): scales by least squares and codes by coordinate descent, in turn.

GPTQ decides each input once and never looks back. With the grid of a row fixed, its squared output error
e H eᵀ, e = w - dequantized w, is a least-squares problem over integers; going over the inputs again and giving each
the code that is best for all the others as they are now can only lower it (coordinate descent as in QuantEase,
arXiv 2309.01885, Algorithm 2). With the codes fixed, it is a linear least-squares problem in the row's scales, G
unknowns with a closed solution. The two steps alternate.

Shapes: N rows, K in_features, G groups, g = inputs of one group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from torchmix.primitives import SCALE_DTYPE
from torchmix.rounding.grid import Grid
from torchmix.rounding.rounded_weight import RoundedWeight
from torchmix.rounding.sweep import descend_group

DEFAULT_REFINE = 3
MAX_SCALE_STEP = 1.25  # a scale moves by at most this factor, so that a flat direction cannot run away
RIDGE = 1e-6  # of the mean diagonal: keeps the scales' equations solvable where a group's codes are all zero


def refine_rounding(
    weight: Tensor,
    rounded: RoundedWeight,
    row_bits: Tensor,
    hessian: Tensor,
    rounds: int,
    percdamp: float,
) -> RoundedWeight:
    """Lower the output error of a rounded weight; each row keeps the best that was seen.

    Args:
        weight: float (N, K), what was rounded.
        rounded: where to start from, for example the result of GPTQ.
        row_bits: uint8 (N,).
        hessian: float32 (K, K); any factor in front gives the same codes.
        rounds: alternations of scales and codes; 0 returns ``rounded``.
        percdamp: this fraction of mean(diag H) is added to the diagonal, as in GPTQ.

    Returns:
        codes and scales whose error e H eᵀ is at most that of ``rounded``, for every row.
    """
    if rounds == 0:
        return rounded
    weight = weight.float()
    hessian = hessian.to(weight.device, torch.float32)
    hessian = hessian + percdamp * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    codes, scale = rounded.codes, rounded.scale
    best = row_losses(weight, rounded, hessian)
    for _ in range(rounds):
        fitted = fit_scales(weight, replace(rounded, codes=codes, scale=scale), hessian)
        moved = descend(weight, replace(rounded, codes=codes, scale=fitted), row_bits, hessian)
        loss = row_losses(weight, replace(rounded, codes=moved, scale=fitted), hessian)
        better = (loss < best)[:, None]
        codes, scale = torch.where(better, moved, codes), torch.where(better, fitted, scale)
        best = torch.minimum(best, loss)
    return replace(rounded, codes=codes, scale=scale)


def row_losses(weight: Tensor, rounded: RoundedWeight, hessian: Tensor) -> Tensor:
    """e H eᵀ of every row: float32 (N,)."""
    error = weight - rounded.dequantize()
    return ((error @ hessian) * error).sum(1)


def fit_scales(weight: Tensor, rounded: RoundedWeight, hessian: Tensor) -> Tensor:
    """The scales that are best for the given codes: bfloat16 (N, G).

    With c_g the row's codes minus zero points in group g and zero elsewhere, the row is sum_g s_g c_g, and
    A s = b with A_gh = c_g H c_hᵀ, b_g = c_g H wᵀ.
    """
    (N, K), G = weight.shape, rounded.scale.shape[1]
    size = rounded.group_size
    spread = rounded.zero_point.float().repeat_interleave(size, 1)[:, :K]
    codes_NK = rounded.codes.float() - spread
    b_NG = _group_sums(codes_NK * (weight @ hessian), G, size)
    A_NGG = weight.new_empty(N, G, G)
    for g in range(G):
        part = slice(g * size, (g + 1) * size)
        A_NGG[:, g] = _group_sums((codes_NK[:, part] @ hessian[part]) * codes_NK, G, size)
    ridge_N = RIDGE * A_NGG.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
    A_NGG += ridge_N[:, None, None] * torch.eye(G, device=A_NGG.device)
    # float64: the groups' inputs are correlated, and G is small
    solved, failed = torch.linalg.solve_ex(A_NGG.double(), b_NG.double())
    old = rounded.scale.float()
    usable = torch.isfinite(solved) & (failed == 0)[:, None]
    scale = torch.where(usable, solved.float(), old)
    return torch.minimum(torch.maximum(scale, old / MAX_SCALE_STEP), old * MAX_SCALE_STEP).to(SCALE_DTYPE)


def _group_sums(values: Tensor, groups: int, group_size: int) -> Tensor:
    """Sum of (N, K) over each group: (N, G); the last group may be shorter."""
    missing = groups * group_size - values.shape[1]
    return torch.nn.functional.pad(values, (0, missing)).unflatten(1, (groups, group_size)).sum(-1)


def descend(weight: Tensor, rounded: RoundedWeight, row_bits: Tensor, hessian: Tensor) -> Tensor:
    """One sweep of coordinate descent over all inputs: int8 codes (N, K).

    The best value of q_k, the others as they are, is q_k + (e H)_k / H_kk; rounding it to the grid is exact, because
    the error is a parabola in q_k.
    """
    codes_NK, quantized_NK = rounded.codes.float(), rounded.dequantize()
    error_NK = weight - quantized_NK
    for g, columns in enumerate(torch.arange(weight.shape[1]).split(rounded.group_size)):
        part = slice(int(columns[0]), int(columns[-1]) + 1)
        pull_Ng = error_NK @ hessian[:, part]  # e H of this group, kept up to date for its later inputs
        scale, zero_point = rounded.scale[:, g : g + 1].float(), rounded.zero_point[:, g : g + 1].float()
        grid, q_Ng = Grid.of(scale, zero_point, row_bits), quantized_NK[:, part]
        codes_NK[:, part], step_Ng = descend_group(pull_Ng, hessian[part, part], q_Ng, grid)
        q_Ng += step_Ng
        error_NK[:, part] = weight[:, part] - q_Ng
    return codes_NK.to(torch.int8)
