"""What linear layers must give, in int64 and float64, without any code of the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tests.generators import PackedWeight


def oracle(x: Tensor, weight: PackedWeight, bias: Tensor | None, per_token: bool) -> tuple[Tensor, Tensor]:
    """Result and the sum of the magnitudes that were added up, float64 (M, N) each.

    Integers are exact (float64 products of integers below 2**53); codes of the activations by the fixed float32
    formula; everything else in float64.
    """
    total, magnitude, *_ = _sums(x, weight, bias, per_token)
    return total, magnitude


def _sums(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, per_token: bool, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result, sum of magnitudes, that sum where code products and offsets are added up apart, and of offsets alone.

    offsets (N,): what a kernel adds to the centered codes and takes away again at the end; by default zero points.
    """
    size, in_features = weight.group_size, weight.codes.shape[1]
    values, centered = x.float().numpy(), weight.centered.double().numpy()
    zero_points, scale = weight.zero_points.double().numpy(), weight.scale.double().numpy()
    total = np.zeros((len(values), len(centered)))
    magnitude, apart, taken = np.zeros_like(total), np.zeros_like(total), np.zeros_like(total)
    for g, start in enumerate(range(0, in_features, size)):
        part = slice(start, min(start + size, in_features))
        seen = values if per_token else values[:, part]
        absmax = np.abs(seen).max(1, keepdims=True) if len(values) else np.ones((0, 1), np.float32)
        codes = np.rint(values[:, part] * (np.float32(127) / absmax)).clip(-127, 127).astype(np.float64)
        factor = (absmax / np.float32(127)).astype(np.float64) * scale[:, g]
        dots = codes @ centered[:, part].T
        moved = zero_points[:, g] if offsets is None else zero_points[:, g] + offsets.double().numpy()
        correction = codes.sum(1, keepdims=True) * moved
        total, magnitude = total + dots * factor, magnitude + np.abs(dots * factor)
        apart += (np.abs(dots + correction) + np.abs(correction)) * factor
        taken += np.abs(correction) * factor
    if bias is not None:
        offset = bias.double().numpy()
        total, magnitude, apart = total + offset, magnitude + np.abs(offset), apart + np.abs(offset)
    return tuple(torch.from_numpy(part) for part in (total, magnitude, apart, taken))


def assert_close(y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, per_token: bool) -> None:
    """The reference: three float32 roundings per group (two products, one sum), one for the bias, one to the dtype."""
    expected, magnitude = oracle(x, weight, bias, per_token)
    _check(y, expected, (3 * weight.scale.shape[1] + 1) * 2.0**-24 * magnitude)


def assert_close_to_exact(
    y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, per_token: bool
) -> None:
    """Any kernel with exact integers and float32 sums, whatever the order of the sums.

    It may add up code products and zero points apart: 2 G terms and a bias, so at most 2 G roundings of sums on the
    way of a term, and at most three of products (scale, activation scale, zero point), then one to the dtype.
    """
    expected, _, magnitude, _ = _sums(x, weight, bias, per_token)
    _check(y, expected, (2 * weight.scale.shape[1] + 3) * 2.0**-24 * magnitude)


def assert_close_with_offsets(
    y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, per_token: bool
) -> None:
    """A kernel that multiplies codes as they are stored, 8-bit ones plus 128, and takes zero points away afterwards
    (csrc/cuda/hopper.cuh).

    One rounding of a product and one of a sum for each group. Every 16 groups, zero point * scale times sum(codes) *
    scale is taken away on tensor cores, which cut off where they should round: twice the error of a rounding, for
    each of three products and sums. Both factors come in two bfloat16 parts: the second rounding of one (zero point *
    scale fits two parts) and the product that is left out are each at most 2^-16 of a term.
    """
    offsets = torch.where(weight.row_bits == 8, 128, 0)
    expected, _, magnitude, taken = _sums(x, weight, bias, per_token, offsets)
    groups = weight.scale.shape[1]
    _check(
        y, expected, (2 * groups + 12 * -(-groups // 16) + 4) * 2.0**-24 * magnitude + 2 * 2.0**-16 * taken
    )


def assert_close_on(
    device: torch.device, y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None, per_token: bool
) -> None:
    """Whatever kernel a device has."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    (assert_close_with_offsets if hopper else assert_close_to_exact)(y, x, weight, bias, per_token)


def _check(y: Tensor, expected: Tensor, bound: Tensor) -> None:
    """|y - expected| within the bound, 1 % of it for products of roundings, and half a unit of y's last place."""
    bound = 1.01 * bound + expected.abs() * torch.finfo(y.dtype).eps / 2 + torch.finfo(y.dtype).tiny
    excess = (y.cpu().double() - expected).abs() / bound
    assert y.shape == expected.shape
    assert bool((excess <= 1).all()), f"{float(excess.max())} times the bound"
