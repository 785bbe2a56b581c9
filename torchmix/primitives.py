"""Uniform quantization of weights on a grid of codes (L0): the only place that rounds and clamps weights.

One formula for every row: ``w ~ scale * (code - zero_point)``. Rows of 2 to 7 bits are asymmetric (unsigned
code, zero point inside the code range); rows of 8 bits are symmetric (code in -127..127, zero point 0). All
``group_size`` inputs of a row share a scale and a zero point; the last group of a row may be shorter.

The scale is rounded to bfloat16 before the codes are computed, so a stored weight dequantizes to exactly what
the rounding algorithms saw.

Shapes: N rows, K in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALE_DTYPE = torch.bfloat16
SYMMETRIC_MAX = 127  # -128 is left out: |code| then always fits 7 bits, which sign-magnitude kernels rely on
# A group whose range is below this counts as zero: the scale of a wider group stays a normal bfloat16 number.
MIN_RANGE = 2.0**-100


def code_limits(row_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of each row: two float32 tensors of the shape of ``row_bits``."""
    symmetric = row_bits == 8
    largest = torch.where(symmetric, float(SYMMETRIC_MAX), ((1 << row_bits.int()) - 1).float())
    return torch.where(symmetric, -float(SYMMETRIC_MAX), 0.0), largest


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """View (N, K) as (N, G, group_size), the last group padded with zeros."""
    rows, in_features = weight.shape
    groups = -(-in_features // group_size)
    return pad(weight, (0, groups * group_size - in_features)).view(rows, groups, group_size)


def qparams_from_range(low: Tensor, high: Tensor, row_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups with values in [low, high]; zero always lies on the grid.

    Args:
        low, high: float32 (N, ...), any number of trailing dimensions.
        row_bits: uint8 (N,).

    Returns:
        scale: float32 values that bfloat16 holds exactly, shape of ``low``; zero_point: float32 integers, same shape.
        Below 8 bits scale = (high - low) / (2**bits - 1), zero_point = round(-low / scale)
        (MixLLM, arXiv 2412.14590, section 4.1; here the range always contains zero); at 8 bits
        scale = max(|low|, |high|) / 127, zero_point = 0. A group without range gets scale 1 and zero point 0.
    """
    trailing = (-1,) + (1,) * (low.dim() - 1)
    _, largest = code_limits(row_bits)
    largest, symmetric = largest.view(trailing), (row_bits == 8).view(trailing)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    extent = torch.where(symmetric, torch.maximum(-low, high), high - low)
    scale = (extent / largest).to(SCALE_DTYPE).float()
    scale = torch.where(extent < MIN_RANGE, 1.0, scale)
    zero_point = torch.where(symmetric, 0.0, torch.round(-low / scale)).clamp(min=0.0)
    return scale, torch.minimum(zero_point, largest)


def choose_qparams(weight: Tensor, row_bits: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point from the minimum and maximum of each group.

    Args:
        weight: float (N, K).
        row_bits: uint8 (N,).
        group_size: inputs per group.

    Returns:
        scale bfloat16 (N, G) and zero_point uint8 (N, G).
    """
    groups = split_groups(weight.float(), group_size)
    scale, zero_point = qparams_from_range(groups.amin(-1), groups.amax(-1), row_bits)
    return scale.to(SCALE_DTYPE), zero_point.to(torch.uint8)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, row_bits: Tensor, group_size: int) -> Tensor:
    """Nearest codes: clamp(round(w / scale) + zero_point), half to even.

    Args:
        weight: float (N, K).
        scale, zero_point: (N, G) as :func:`choose_qparams` returns them.
        row_bits: uint8 (N,).
        group_size: inputs per group.

    Returns:
        int8 (N, K).
    """
    smallest, largest = code_limits(row_bits)
    groups = split_groups(weight.float(), group_size)
    codes = torch.round(groups / scale.float()[..., None]) + zero_point.float()[..., None]
    codes = torch.minimum(torch.maximum(codes, smallest[:, None, None]), largest[:, None, None])
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """scale * (code - zero_point) in float32: (N, K) from int8 codes (N, K) and (N, G) parameters."""
    groups = split_groups(codes.float(), group_size)
    values = scale.float()[..., None] * (groups - zero_point.float()[..., None])
    return values.flatten(1)[:, : codes.shape[1]]
