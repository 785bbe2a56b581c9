"""``torchmix::dequantize_rows`` (L1): packed rows of mixed widths back to a dense weight.

Shapes: N out_features (or E experts of N), K in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmix.packing import unpack_rows, unpack_zero_points
from torchmix.primitives import dequantize, split_groups

torch.library.define(
    "torchmix::dequantize_rows",
    "(Tensor qdata, Tensor scale, Tensor zero_point, Tensor row_bits, int in_features, int group_size, "
    "ScalarType dtype) -> Tensor",
)


def dequantize_rows(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """``scale * (code - zero_point)`` for every weight.

    Args:
        qdata: uint8 1-D, packed codes (:mod:`torchmix.packing`).
        scale: bfloat16 (N, G) or (E, N, G).
        zero_point: uint8 1-D, packed.
        row_bits: uint8 (N,) or (E, N).
        in_features: K.
        group_size: inputs per scale.
        dtype: dtype of the result; float32 is exact.

    Returns:
        ``dtype`` (N, K) or (E, N, K).
    """
    return torch.ops.torchmix.dequantize_rows(
        qdata, scale, zero_point, row_bits, in_features, group_size, dtype
    )


@torch.library.impl("torchmix::dequantize_rows", "CompositeExplicitAutograd")
def _reference(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    flat_bits = row_bits.flatten()
    codes = unpack_rows(qdata, flat_bits, in_features)
    zero_points = unpack_zero_points(zero_point, flat_bits, scale.shape[-1])
    weight = dequantize(codes, scale.reshape(-1, scale.shape[-1]), zero_points, group_size)
    # contiguous: where the last group is padded, the weight is a view of a wider matrix
    return weight.to(dtype).contiguous().view(*row_bits.shape, in_features)


@torch.library.register_fake("torchmix::dequantize_rows")
def _fake(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    in_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return scale.new_empty((*row_bits.shape, in_features), dtype=dtype)


def centered_codes(
    qdata: Tensor, zero_point: Tensor, row_bits: Tensor, in_features: int, group_size: int
) -> Tensor:
    """``code - zero_point`` of every weight as float32 integers, by group: (N, G, group_size).

    Inputs as in :func:`dequantize_rows` with N rows; the padding of the last group is 0.
    """
    groups = -(-in_features // group_size)
    codes = split_groups(unpack_rows(qdata, row_bits, in_features).float(), group_size)
    centered = codes - unpack_zero_points(zero_point, row_bits, groups).float()[..., None]
    if in_features % group_size:
        centered[:, -1, in_features % group_size :] = 0.0
    return centered
