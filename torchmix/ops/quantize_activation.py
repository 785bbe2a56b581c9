"""``torchmix::quantize_activation`` (L1): dynamic int8 quantization of the inputs of a linear layer.

Shapes: M tokens, K in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmix.primitives import MIN_RANGE, SYMMETRIC_MAX, split_groups

torch.library.define(
    "torchmix::quantize_activation",
    "(Tensor x, int group_size, bool per_token=False) -> (Tensor, Tensor, Tensor)",
)


def quantize_activation(x: Tensor, group_size: int, per_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize each token symmetrically to int8, per group of inputs.

    The formula is fixed, so that every implementation gives the same integers:
    ``codes = clamp(rint(x * (127 / absmax)), -127, 127)`` in IEEE float32, half to even, and
    ``scale = absmax / 127`` (MixLLM, arXiv 2412.14590, section 3.1.2, with float32 instead of float16 arithmetic).
    A group with absmax below 2**-100 is zero (scale 0, codes 0). A group that holds a non-finite value gets the
    scale NaN and codes 0, which makes the outputs of its token NaN and of no other.

    Args:
        x: float32, bfloat16 or float16 (M, K).
        group_size: inputs per group.
        per_token: take absmax over the whole token; all its groups then share one scale, shapes stay the same.

    Returns:
        codes int8 (M, K); scale float32 (M, G); group_sum int32 (M, G), the sum of the codes of each group, with
        which a kernel takes the weights' zero points into account.
    """
    return torch.ops.torchmix.quantize_activation(x, group_size, per_token)


@torch.library.impl("torchmix::quantize_activation", "CompositeExplicitAutograd")
def _reference(x: Tensor, group_size: int, per_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    groups = split_groups(x.float(), group_size)
    absmax = groups.abs().amax(-1) if x.shape[1] else groups.new_zeros(groups.shape[:2])
    if per_token and absmax.shape[1]:
        absmax = absmax.amax(-1, keepdim=True).expand_as(absmax)
    finite = torch.isfinite(absmax)
    zero = absmax < MIN_RANGE
    # A tensor on the same device: with a Python number, 127 / absmax is computed as 127 * (1 / absmax), and
    # absmax / 127 on CUDA as absmax * (1 / 127), which round twice.
    largest = absmax.new_full((), float(SYMMETRIC_MAX))
    factor = torch.where(zero | ~finite, 0.0, largest / absmax)
    groups = torch.where(finite[..., None], groups, 0.0)
    codes = torch.round(groups * factor[..., None]).clamp(-SYMMETRIC_MAX, SYMMETRIC_MAX).to(torch.int8)
    scale = torch.where(zero, 0.0, absmax / largest)
    scale = torch.where(finite, scale, float("nan"))
    group_sum = codes.sum(-1, dtype=torch.int32)
    return codes.flatten(1)[:, : x.shape[1]].contiguous(), scale, group_sum


@torch.library.register_fake("torchmix::quantize_activation")
def _fake(x: Tensor, group_size: int, per_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    tokens, in_features = x.shape
    shape = (tokens, (in_features + group_size - 1) // group_size)
    return (
        x.new_empty((tokens, in_features), dtype=torch.int8),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
    )
