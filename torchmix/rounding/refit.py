"""Refit of the rounding target (L3): let a layer make up for errors that reach it from quantized layers before it.

Shapes: N rows, K in_features, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_REFIT = 0.5


def refit_target(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    shrinkage: float,
    percdamp: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, str]:
    """Weight that reproduces the original outputs from the quantized model's inputs, taken part of the way.

    With X the inputs in the original model and X~ those in the quantized one, min ||X Wᵀ - X~ W'ᵀ|| has the solution
    W' = W G H⁻¹, G = Xᵀ X~, H = X~ᵀ X~ (normal equations; Qronos, arXiv 2505.11695, and GPTAQ, arXiv 2504.02692, take
    the same correction column by column). Both matrices are damped by the same multiple of the identity, so without
    any error W' = W. The result is W + shrinkage * (W' - W): the full step fits the calibration tokens too closely.

    A layer whose output is added to a residual stream R can also make up for the error of that stream: then
    X Wᵀ + R is to be met by X~ W'ᵀ + R~, and D H⁻¹ with D = (R - R~)ᵀ X~ joins W'.

    Tokens may be weighted (:func:`torchmix.salience.gradient_weights`): all sums then carry the tokens' weights.

    Args:
        weight: float32 (N, K).
        hessian: float32 (K, K), sum of x~ x~ᵀ.
        cross: float32 (K, K), sum of x x~ᵀ over the same tokens.
        shrinkage: 0 keeps the weight, 1 is the whole step.
        percdamp: fraction of mean(diag H) added to the diagonals.
        residual: float32 (N, K), sum of (r - r~) x~ᵀ over the same tokens, or None.

    Returns:
        float32 (N, K), and a note: empty, or why the weight was kept.
    """
    if shrinkage == 0.0:
        return weight, ""
    wide = hessian.double()
    damping = percdamp * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    lower, failed = torch.linalg.cholesky_ex(wide + damping)
    if failed or not torch.isfinite(lower).all():
        return weight, "the inputs have no Cholesky factor: rounded without refit"
    right = (cross.double() + damping).T @ weight.double().T
    if residual is not None:
        right += residual.double().T
    refitted = torch.cholesky_solve(right, lower).T.float()
    return weight + shrinkage * (refitted - weight), ""
