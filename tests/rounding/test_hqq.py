"""Half-quadratic rounding ignores outliers, and never loses against round-to-nearest in its own measure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.generators import WIDTHS, row_bits
from torchmix.primitives import code_limits, split_groups
from torchmix.rounding import HalfQuadratic, RoundedWeight, hqq_round, rtn_round
from torchmix.rounding.hqq import lp_error, shrink


def lp_errors(weight: Tensor, rounded: RoundedWeight, p: float = 0.7) -> Tensor:
    """sum |w - dequantized w|^p of every row and group, float64 (N, G)."""
    error = weight.double() - rounded.dequantize().double()
    return split_groups(error, rounded.group_size).abs().pow(p).sum(-1)


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("tails", [False, True])
def test_never_worse_than_round_to_nearest(p: float, tails: bool) -> None:
    """In its own measure, in every row and group. 1e-5 is left for float32 sums of 16 terms."""
    bits = row_bits(70)
    weight = torch.randn(70, 40) * (torch.randn(70, 40).exp() if tails else 1.0)
    found = lp_errors(weight, hqq_round(weight, bits, 16, HalfQuadratic(p=p)), p)
    assert bool((found <= lp_errors(weight, rtn_round(weight, bits, 16), p) * (1 + 1e-5)).all())


def test_lowers_the_error_at_few_bits() -> None:
    """Groups of 128 normal weights: the sum over 64 rows falls by more than 2 % at 2 to 4 bits."""
    weight = torch.randn(64, 128)
    for width in (2, 3, 4):
        bits = torch.full((64,), width, dtype=torch.uint8)
        ratio = (
            lp_errors(weight, hqq_round(weight, bits, 128)).sum()
            / lp_errors(weight, rtn_round(weight, bits, 128)).sum()
        )
        assert float(ratio) < 0.98


def test_an_outlier_does_not_move_the_grid() -> None:
    """63 weights on a grid of step 1 and one beyond its end: the grid is found again, the outlier pays alone."""
    weight = torch.cat([torch.arange(63) % 15 - 7.0, torch.tensor([8.4])])[None]
    bits = torch.tensor([4], dtype=torch.uint8)
    rounded = hqq_round(weight, bits, 64)
    error = (weight - rounded.dequantize())[0]
    assert rounded.scale.tolist() == [[1.0]]
    assert torch.equal(error[:63], torch.zeros(63))
    assert float(error[63]) == pytest.approx(0.4)
    assert float((weight - rtn_round(weight, bits, 64).dequantize()).abs().sum()) > 5.0


def test_weights_on_the_grid_stay_there() -> None:
    """Rows of all widths whose min-max grid is exact: no candidate is better than no error at all."""
    bits = row_bits(14)
    largest = code_limits(bits)[1][:, None]
    weight = (torch.arange(32) % (largest + 1)) * 0.5
    weight[:, -1] = largest[:, 0] * 0.5
    assert torch.equal(hqq_round(weight, bits, 32).dequantize(), weight)


def test_without_iterations_it_is_round_to_nearest() -> None:
    bits, weight = row_bits(21), torch.randn(21, 40)
    found, nearest = hqq_round(weight, bits, 16, HalfQuadratic(iterations=0)), rtn_round(weight, bits, 16)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scale, nearest.scale)
    assert torch.equal(found.zero_point, nearest.zero_point)


def test_the_format_is_kept() -> None:
    """Codes and zero points lie in the range of the width, 8-bit rows have none; the weight is left alone."""
    bits, weight = row_bits(70), torch.randn(70, 40) + 0.7
    before = weight.clone()
    rounded = hqq_round(weight, bits, 16)
    low, high = (limit[:, None] for limit in code_limits(bits))
    assert bool(((rounded.codes >= low) & (rounded.codes <= high)).all())
    assert bool((rounded.zero_point <= high).all())
    assert not rounded.zero_point[bits == 8].any()
    assert (rounded.codes.dtype, rounded.scale.dtype, rounded.method) == (torch.int8, torch.bfloat16, "hqq")
    assert torch.equal(weight, before)


def test_the_size_of_the_weights_does_not_matter() -> None:
    """Errors are measured in steps, so weights times 2^-7 get the same codes."""
    bits, weight = row_bits(35), torch.randn(35, 64)
    large, small = hqq_round(weight, bits, 32), hqq_round(weight * 2.0**-7, bits, 32)
    assert torch.equal(large.codes, small.codes)
    assert torch.equal(large.scale.float() * 2.0**-7, small.scale.float())


@pytest.mark.parametrize("width", WIDTHS)
def test_zero_and_constant_groups(width: int) -> None:
    weight = torch.cat([torch.zeros(1, 16), torch.full((1, 16), 0.5), torch.full((1, 16), -0.5)])
    rounded = hqq_round(weight, torch.full((3,), width, dtype=torch.uint8), 16)
    bound = 0.5 * 2.0**-8  # the scale is a bfloat16 number
    assert bool(((rounded.dequantize() - weight).abs() <= bound).all())
    assert not rounded.dequantize()[0].any()


def test_shrink_by_hand() -> None:
    """p = 1 is soft thresholding at 1 / beta; p = 1/2: 4 - 4^-1/2 / 0.25 = 2, and 1 - 1 / 0.25 < 0."""
    error = torch.tensor([-3.0, -0.4, 0.0, 0.5, 2.0])
    assert shrink(error, 2.0, 1.0).tolist() == [-2.5, 0.0, 0.0, 0.0, 1.5]
    assert shrink(torch.tensor([4.0, -4.0, 1.0, 0.0]), 0.25, 0.5).tolist() == [2.0, -2.0, 0.0, 0.0]


def test_lp_error_by_hand() -> None:
    """Errors 4 and 9 at p = 1/2: 2 + 3."""
    block, codes = torch.tensor([[6.0, -5.0]]), torch.tensor([[2.0, 3.0]])
    assert lp_error(block, codes, torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5).tolist() == [[5.0]]


@pytest.mark.parametrize("wrong", [{"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": -1}])
def test_wrong_settings(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="HalfQuadratic needs 0 < p <= 1"):
        HalfQuadratic(**wrong)  # type: ignore[arg-type]
