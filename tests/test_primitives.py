"""The quantization grid: zero lies on it, scales are bfloat16, errors stay within half a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.generators import WIDTHS, random_codes, row_bits
from torchmix.primitives import (
    MIN_RANGE,
    choose_qparams,
    code_limits,
    dequantize,
    qparams_from_range,
    quantize,
    split_groups,
)

# Half a step, and float32 rounding of w / scale (at most 127 + 1/2, so 2**-17 steps).
HALF_STEP = 0.5 + 2.0**-16


def largest_code(bits: Tensor) -> Tensor:
    return torch.tensor([127.0 if b == 8 else 2.0**b - 1 for b in bits.tolist()])


def rounded(weight: Tensor, bits: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale, zero point and dequantized weight of round-to-nearest."""
    scale, zero_point = choose_qparams(weight, bits, group_size)
    codes = quantize(weight, scale, zero_point, bits, group_size)
    return codes, scale, zero_point, dequantize(codes, scale, zero_point, group_size)


def per_weight(values: Tensor, in_features: int, group_size: int) -> Tensor:
    """(N, G) -> (N, K)."""
    return values.repeat_interleave(group_size, 1)[:, :in_features]


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_code_limits_are_exact(rows: int, device: torch.device) -> None:
    for bits in WIDTHS:
        smallest, largest = code_limits(torch.full((rows,), bits, dtype=torch.uint8, device=device))
        assert set(largest.tolist()) == {127.0 if bits == 8 else 2.0**bits - 1}
        assert set(smallest.tolist()) == {-127.0 if bits == 8 else 0.0}


def test_the_last_group_is_padded_with_zeros() -> None:
    groups = split_groups(torch.arange(1.0, 11).view(1, 10), 8)
    assert groups.tolist() == [[[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 0, 0, 0, 0, 0, 0]]]


def test_grid_of_a_hand_calculation() -> None:
    """[-1, 2] at 2 bits: scale = 3 / 3, zero point 1, codes of -1, 0, 2 are 0, 1, 3; at 8 bits scale = 2 / 127."""
    scale, zero_point = qparams_from_range(
        torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 2.0]), torch.tensor([2, 8], dtype=torch.uint8)
    )
    assert scale.tolist() == [1.0, float(torch.tensor(2 / 127).bfloat16())]
    assert zero_point.tolist() == [1.0, 0.0]
    weight = torch.tensor([[-1.0, 0.0, 0.4, 2.0, 9.0, -9.0]])
    bits = torch.tensor([2], dtype=torch.uint8)
    codes = quantize(weight, scale[:1, None], zero_point[:1, None], bits, 8)
    assert codes.tolist() == [[0, 1, 1, 3, 3, 0]]
    assert dequantize(codes, scale[:1, None], zero_point[:1, None], 8).tolist() == [[-1, 0, 0, 2, 2, -1]]


ROW = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20)


@given(ROW, st.sampled_from(WIDTHS))
def test_error_bounds_hold_for_any_row(values: list[float], width: int) -> None:
    """Within the grid's reach the error is half a step.

    Rounding the scale to bfloat16 (relative error 2**-8 at most) moves the reach by up to largest * 2**-8 steps
    against the range of the weights. Beside the half step of the rounded zero point this is what an asymmetric
    grid can miss at its ends; the symmetric grid misses 127 * 2**-8 < 1/2 step there, so 1/2 always holds.
    """
    weight, bits = torch.tensor([values]), torch.tensor([width], dtype=torch.uint8)
    _codes, scale, zero_point, dense = rounded(weight, bits, 8)
    step = per_weight(scale.float(), len(values), 8)
    low, high = (
        per_weight((limit[:, None] - zero_point.float()) * scale.float(), len(values), 8)
        for limit in code_limits(bits)
    )
    error = (weight - dense).abs()
    within = (weight >= low) & (weight <= high)
    zero = per_weight(split_groups(weight, 8).abs().amax(-1), len(values), 8) < MIN_RANGE
    assert bool((error <= HALF_STEP * step)[within & ~zero].all())
    reach = HALF_STEP if width == 8 else HALF_STEP + float(largest_code(bits)) * 2.0**-8
    assert bool((error <= reach * step)[~zero].all())


@given(ROW, st.sampled_from(WIDTHS))
def test_zero_stays_zero_and_codes_stay_in_range(values: list[float], width: int) -> None:
    weight, bits = torch.tensor([[*values, 0.0]]), torch.tensor([width], dtype=torch.uint8)
    codes, scale, zero_point, dense = rounded(weight, bits, 8)
    assert float(dense[0, -1]) == 0.0
    smallest, largest = code_limits(bits)
    assert int(codes.min()) >= int(smallest)
    assert int(codes.max()) <= int(largest)
    assert int(zero_point.max()) <= int(largest)
    assert scale.dtype == torch.bfloat16
    assert codes.dtype == torch.int8
    assert zero_point.dtype == torch.uint8
    assert bool((scale.float() > 0).all())
    assert bool(torch.isfinite(scale.float()).all())


@pytest.mark.parametrize("bits", WIDTHS)
def test_grid_points_are_reproduced(bits: int) -> None:
    """A weight that lies on a grid of its own range comes back exactly (scale a power of two times 3)."""
    width = torch.full((5,), bits, dtype=torch.uint8)
    codes = random_codes(width, 24)
    codes[:, ::8], codes[:, 1::8] = (-127 if bits == 8 else 0), (127 if bits == 8 else 2**bits - 1)
    zero_point = torch.zeros(5, 3) if bits == 8 else torch.randint(2**bits, (5, 3)).float()
    scale = torch.full((5, 3), 3 * 2.0**-7)
    weight = dequantize(codes, scale, zero_point, 8)
    found_codes, found_scale, found_zero_point, dense = rounded(weight, width, 8)
    assert torch.equal(dense, weight)
    assert torch.equal(found_scale.float(), scale)
    assert torch.equal(found_zero_point.float(), zero_point)
    assert torch.equal(found_codes, codes)


def test_minus_128_is_never_a_code() -> None:
    """Neither on the grid of the range nor on a clipped one."""
    weight, bits = (
        torch.tensor([[-3e38, 1.0, 3e38], [-1.0, 0.5, 0.99]]),
        torch.full((2,), 8, dtype=torch.uint8),
    )
    scale, zero_point = choose_qparams(weight, bits, 8)
    assert quantize(weight, scale, zero_point, bits, 8).tolist() == [[-127, 0, 127], [-127, 64, 126]]
    assert quantize(weight, scale / 2, zero_point, bits, 8).tolist() == [[-127, 0, 127], [-127, 127, 127]]


@pytest.mark.parametrize("magnitude", [1e-38, 1e-31, 1e-29, 1.0, 1e29, 1e38])
@pytest.mark.parametrize("signs", ["positive", "negative", "both"])
def test_extreme_ranges(magnitude: float, signs: str) -> None:
    """Below 2**-100 a group counts as zero; from there up relative errors do not depend on the magnitude."""
    bits = row_bits(14)
    weight = torch.rand(14, 20) + 0.1
    weight = {"positive": weight, "negative": -weight, "both": weight - 0.6}[signs] * magnitude
    dense = rounded(weight, bits, 8)[3]
    if magnitude < MIN_RANGE:
        assert torch.equal(dense, torch.zeros_like(dense))
        return
    largest = largest_code(bits)[:, None]
    groups = split_groups(weight, 8)
    extent = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)  # at 8 bits the step is smaller
    step = per_weight(extent, 20, 8) / largest * (1 + 2.0**-8)
    assert bool(((weight - dense).abs() <= step * (HALF_STEP + largest * 2.0**-8)).all())


def test_every_device_gives_the_same_codes(device: torch.device) -> None:
    bits, weight = row_bits(70), torch.randn(70, 300)
    for here, there in zip(
        rounded(weight, bits, 128), rounded(weight.to(device), bits.to(device), 128), strict=True
    ):
        assert torch.equal(here, there.cpu())


def test_groups_do_not_see_one_another() -> None:
    """A short last group, and one huge weight elsewhere, change nothing in the other groups."""
    bits, weight = row_bits(7), torch.randn(7, 20)
    other = weight.clone()
    other[:, 3] = 1e6
    before, after = rounded(weight, bits, 8), rounded(other, bits, 8)
    for a, b in zip(before[1:3], after[1:3], strict=True):
        assert torch.equal(a[:, 1:], b[:, 1:])
    assert torch.equal(before[3][:, 8:], after[3][:, 8:])
    alone = rounded(weight[:, 16:], bits, 8)
    assert torch.equal(alone[3], before[3][:, 16:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_quantized_as_their_float32_values(dtype: torch.dtype) -> None:
    bits, weight = row_bits(7), torch.randn(7, 20).to(dtype)
    for a, b in zip(rounded(weight, bits, 8), rounded(weight.float(), bits, 8), strict=True):
        assert torch.equal(a, b)
