"""Weights of tokens (L3): which tokens count more in a Hessian H = sum_t w_t x_t x_tᵀ.

Two sources: attention (RSQ) and gradients (GuidedQuant without its groups of rows). A squared gradient already
contains how much a token is attended to, so one of the two is chosen, not both.

Shapes: H heads, L tokens of one sequence, T tokens of any number of sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRADIENT_FLOOR = 1e-3  # of the mean squared gradient


def rsq_weights(attention: Tensor, minimum: float = 0.005) -> Tensor:
    """Attention concentration of each token: how much all heads and queries look at it.

    RSQ, arXiv 2503.01820: r_j = sum over heads and queries of A[m, i, j], mapped linearly so that the smallest
    becomes ``minimum`` and the largest 1. As in the authors' code, the result is normalized to mean 1 and enters the
    Hessian with power 1, H = X diag(r) Xᵀ; the paper writes R². The default is that of the authors' scripts. The
    first token of a sequence, which attracts most attention, often gets all of the range for itself.

    Args:
        attention: float (H, L, L), rows (queries) sum to 1.
        minimum: weight of the least attended token before the normalization, 0 < minimum <= 1.

    Returns:
        float32 (L,) with mean 1; ones where all tokens are attended to alike.

    Raises:
        ValueError: the shape is not (H, L, L), or ``minimum`` lies outside its range.
    """
    if attention.dim() != 3 or attention.shape[1] != attention.shape[2]:
        raise ValueError(f"attention must be (heads, tokens, tokens), got {tuple(attention.shape)}")
    if not 0.0 < minimum <= 1.0:
        raise ValueError(f"minimum={minimum} must lie above 0 and not above 1; the authors use 0.005 to 0.1")
    r_L = attention.double().sum((0, 1))
    low, high = r_L.aminmax()
    if not high > low:
        return torch.ones_like(r_L, dtype=torch.float32)
    r_L = minimum + (r_L - low) / (high - low) * (1.0 - minimum)
    return (r_L / r_L.mean()).float()


def gradient_weights(squared_mean: Tensor, power: float = 0.5) -> Tensor:
    """Weights from the squared gradient of a layer's output at each token.

    GuidedQuant, arXiv 2505.07004, weighs token t by the mean over rows of (dL/dy_tn)², for one group of rows; with
    ``power`` 1 this function does too, smaller powers trust the gradients less.

    Args:
        squared_mean: float (T,), mean over rows of the squared gradient; values below 1e-3 of their mean count as
            that, so that no token is forgotten.
        power: exponent, 0 gives ones.

    Returns:
        float32 (T,) with mean 1; ones where all gradients are zero.

    Raises:
        ValueError: a squared gradient is negative or not finite.
    """
    wide = squared_mean.double()
    if not bool(((wide >= 0) & torch.isfinite(wide)).all()):
        raise ValueError(
            "squared gradients of tokens must be finite and not negative; look for NaN in the loss"
        )
    if not wide.any():
        return torch.ones_like(wide, dtype=torch.float32)
    powered = wide.clamp(min=GRADIENT_FLOOR * float(wide.mean())).pow(power)
    return (powered / powered.mean()).float()
