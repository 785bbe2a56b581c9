"""Activation codes follow one fixed float32 formula, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchmix.ops import quantize_activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_hand(x: Tensor, group_size: int, per_token: bool) -> tuple[list, list, list]:
    """The formula in numpy float32, group by group, for finite x: codes, scale, group_sum as lists."""
    values = x.float().numpy()
    starts = range(0, values.shape[1], group_size)
    all_codes, all_scales, all_sums = [], [], []
    for token in values:
        codes, scales, sums = [], [], []
        for start in starts:
            group = token[start : start + group_size]
            absmax = np.abs(token if per_token else group).max()
            if absmax < 2.0**-100:
                group_codes, scale = np.zeros(len(group)), np.float32(0)
            else:
                group_codes = np.rint(group * (np.float32(127) / absmax)).clip(-127, 127)
                scale = absmax / np.float32(127)
            codes += [int(code) for code in group_codes]
            scales.append(float(scale))
            sums.append(int(group_codes.sum()))
        all_codes.append(codes)
        all_scales.append(scales)
        all_sums.append(sums)
    return all_codes, all_scales, all_sums


def test_factor_is_one_division(device: torch.device) -> None:
    """127 * (1 / absmax), which is what PyTorch makes of 127 / tensor, rounds twice and moves some codes."""
    x = (torch.rand(2000, 8) * 4).bfloat16().float()  # short significands: many products are exact halves
    codes, scale, _ = quantize_activation(x.to(device), 8)
    assert [codes.tolist(), scale.tolist()] == list(by_hand(x, 8, False)[:2])
    reciprocal = torch.round(x * (x.amax(1, keepdim=True).reciprocal() * 127))
    assert (reciprocal != codes.cpu()).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("tokens", "in_features"), [(1, 1), (3, 8), (5, 20), (17, 172)])
def test_formula(
    dtype: torch.dtype, per_token: bool, tokens: int, in_features: int, device: torch.device
) -> None:
    x = (torch.randn(tokens, in_features) * 3).to(dtype)
    codes, scale, group_sum = quantize_activation(x.to(device), 8, per_token)
    assert (codes.dtype, scale.dtype, group_sum.dtype) == (torch.int8, torch.float32, torch.int32)
    assert (codes.tolist(), scale.tolist(), group_sum.tolist()) == by_hand(x, 8, per_token)


@given(
    st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=20),
    st.sampled_from([8, 16]),
    st.booleans(),
)
def test_formula_for_any_token(values: list[float], group_size: int, per_token: bool) -> None:
    x = torch.tensor([values])
    found = [part.tolist() for part in quantize_activation(x, group_size, per_token)]
    assert found == list(by_hand(x, group_size, per_token))


def test_halves_are_rounded_to_even(device: torch.device) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]])
    codes, scale, group_sum = quantize_activation(x.to(device), 8)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, -127]]
    assert scale.tolist() == [[1.0]]
    assert group_sum.tolist() == [[0]]


@pytest.mark.parametrize("group_size", [8, 128])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(0, 20), (0, 0), (3, 0)])
def test_nothing_gives_nothing(
    shape: tuple[int, int], per_token: bool, group_size: int, device: torch.device
) -> None:
    codes, scale, group_sum = quantize_activation(torch.empty(shape, device=device), group_size, per_token)
    groups = -(-shape[1] // group_size)
    assert codes.shape == shape
    assert scale.shape == group_sum.shape == (shape[0], groups)


def test_tiny_values_count_as_zero(device: torch.device) -> None:
    """Below 2**-100 a group is zero; at 2**-100 it is not, and the factor 127 / absmax is still finite."""
    x = torch.full((1, 24), 2.0**-101)
    x[0, 8:16] = 2.0**-100
    x[0, 16:] = 0.0
    codes, scale, _ = quantize_activation(x.to(device), 8)
    assert codes[0].tolist() == [0] * 8 + [127] * 8 + [0] * 8
    assert scale.tolist() == [[0.0, float(np.float32(2.0**-100) / np.float32(127)), 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_non_finite_value_marks_its_group_only(bad: float, per_token: bool, device: torch.device) -> None:
    x = torch.randn(3, 20, device=device)
    clean = quantize_activation(x, 8, per_token)
    x[1, 9] = bad
    codes, scale, group_sum = quantize_activation(x, 8, per_token)
    marked = [True, True, True] if per_token else [False, True, False]
    assert scale[1].isnan().tolist() == marked
    assert codes[1, 8:16].tolist() == [0] * 8
    assert int(group_sum[1, 1]) == 0
    for token in (0, 2):
        for part, clean_part in zip((codes, scale, group_sum), clean, strict=True):
            assert torch.equal(part[token], clean_part[token])


def test_non_contiguous_input(device: torch.device) -> None:
    x = torch.randn(20, 6, device=device).t()
    for found, expected in zip(
        quantize_activation(x, 8), quantize_activation(x.contiguous(), 8), strict=True
    ):
        assert torch.equal(found, expected)
        assert found.is_contiguous() == expected.is_contiguous()


def awkward_tokens(in_features: int, dtype: torch.dtype) -> Tensor:
    """Tokens of many sizes: with zero groups, exact halves, NaN and infinities, tiny and very large values."""
    x = torch.randn(41, in_features) * torch.logspace(-6, 3, 41)[:, None]
    x[3] = 0.0
    x[4, in_features // 2 :] = 0.0
    x[5] = (torch.arange(in_features) % 255 - 127) / 2
    x[6, -1], x[7, 0], x[8, in_features // 3] = float("nan"), float("inf"), float("-inf")
    x[9], x[10, 0], x[11] = 2.0**-101, 2.0**-100, -1.0
    x[12, 0] = torch.finfo(dtype).max
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("in_features", [1, 7, 128, 172, 576, 880, 4096])
def test_every_device_gives_the_numbers_of_the_reference(
    in_features: int, group_size: int, per_token: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Contiguous, as every second feature or token of a larger tensor, with features far apart, and off alignment."""
    x = awkward_tokens(in_features, dtype)
    expected = quantize_activation(x, group_size, per_token)
    wide = torch.zeros(41, 2 * in_features + 1, dtype=dtype)
    wide[:, 1::2] = x
    shifted = torch.zeros(41 * in_features + 1, dtype=dtype, device=device)
    shifted[1:] = x.flatten().to(device)
    apart = (x.to(device), wide.to(device)[:, 1::2], x.t().contiguous().to(device).t())
    cut = torch.cat([x, x], 1).to(device)[:, in_features:]
    for same in (*apart, cut, shifted[1:].view(x.shape)):
        for part, wanted in zip(quantize_activation(same, group_size, per_token), expected, strict=True):
            assert part.is_contiguous()
            torch.testing.assert_close(part.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(3, 20), (0, 16)])
def test_opcheck(shape: tuple[int, int], per_token: bool, device: torch.device) -> None:
    x = torch.randn(shape, device=device).bfloat16()
    torch.library.opcheck(torch.ops.torchmix.quantize_activation.default, (x, 8, per_token))
