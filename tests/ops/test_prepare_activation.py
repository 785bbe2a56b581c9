"""Prepared activations: every byte where the formulas of the layout put it, and exact round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.test_quantize_activation import awkward_tokens
from torchmix._extension import disable_kernels
from torchmix.ops import prepare_activation, quantize_activation
from torchmix.ops.prepare_activation import unprepare

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sizes(tokens: int, in_features: int) -> tuple[int, int, int]:
    """Mp, G, C."""
    groups = -(-in_features // 128)
    return -(-tokens // 16) * 16, groups, -(-groups // 16)


def code_place(token: int, k: int, padded: int) -> int:
    """Byte of the code of input k."""
    g, part = k // 128, k % 128 // 16
    return (g * padded + token) * 128 + 16 * (part ^ (token % 8)) + k % 16


def scale_place(token: int, group: int, padded: int) -> int:
    """Number of a scale among all scales."""
    place = token // 16 * 16 + token % 8 // 2 * 4 + token % 16 // 8 * 2 + token % 2
    return group * padded + place


def sum_place(token: int, group: int, part: int, padded: int) -> int:
    """Number of a part of a sum among all of them."""
    chunk, q, e = group // 16, group % 16 // 4, group % 4
    k = 2 * q + e if e < 2 else 8 + 2 * q + e - 2
    rows = (chunk * (padded // 8) + token // 8) * 2 + part
    return ((rows * 2 + k // 8) * 8 + token % 8) * 8 + k % 8


def parts_of(prepared: Tensor, tokens: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes, scales as int32 and sums as int16: bits that can be compared where they are NaN."""
    padded, groups, chunks = sizes(tokens, in_features)
    lengths = [padded * groups * 128, padded * groups * 4, padded * chunks * 64]
    codes, scale, sums = prepared.cpu().split(lengths)
    return codes, scale.clone().view(torch.int32), sums.clone().view(torch.int16)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("tokens", "in_features"), [(1, 128), (17, 300), (35, 2200)])
def test_every_element_lies_where_the_formulas_put_it(
    tokens: int, in_features: int, per_token: bool, device: torch.device
) -> None:
    x = torch.randn(tokens, in_features) * torch.logspace(-3, 3, tokens)[:, None]
    prepared = prepare_activation(x.bfloat16().to(device), per_token)
    assert (prepared.dtype, prepared.device.type, prepared.dim()) == (torch.uint8, device.type, 1)
    codes, scale, group_sum = quantize_activation(x.bfloat16(), 128, per_token)
    padded, groups, chunks = sizes(tokens, in_features)
    assert prepared.numel() == padded * (132 * groups + 64 * chunks)
    found_codes, found_scale, found_sums = (part.tolist() for part in parts_of(prepared, tokens, in_features))
    expected_codes, expected_scale = codes.tolist(), scale.view(torch.int32).tolist()
    values = scale * group_sum.float()
    high = values.bfloat16()
    both = [part.view(torch.int16).tolist() for part in (high, (values - high.float()).bfloat16())]
    for token in range(tokens):
        for k in range(128 * groups):
            code = expected_codes[token][k] if k < in_features else 0
            assert found_codes[code_place(token, k, padded)] == code + 128
        for g in range(groups):
            assert found_scale[scale_place(token, g, padded)] == expected_scale[token][g]
        for g in range(16 * chunks):
            for part in range(2):
                wanted = both[part][token][g] if g < groups else 0
                assert found_sums[sum_place(token, g, part, padded)] == wanted


@pytest.mark.parametrize(("tokens", "in_features"), [(1, 1), (17, 300), (16, 128), (0, 128), (3, 0), (0, 0)])
def test_padding_tokens_are_zero(tokens: int, in_features: int, device: torch.device) -> None:
    x = torch.randn(tokens, in_features, device=device)
    codes, scale, sums = parts_of(prepare_activation(x), tokens, in_features)
    padded, groups, chunks = sizes(tokens, in_features)
    for token in range(tokens, padded):
        assert all(codes[code_place(token, k, padded)] == 128 for k in range(128 * groups))
        assert all(scale[scale_place(token, g, padded)] == 0 for g in range(groups))
        places = [sum_place(token, g, part, padded) for g in range(16 * chunks) for part in range(2)]
        assert not sums[places].any()


def test_formulas_fill_each_part_once() -> None:
    """The formulas of the tests themselves: no place is taken twice, none is left out."""
    padded, groups, chunks = sizes(32, 2200)
    tokens = range(padded)
    codes = {code_place(t, k, padded) for t in tokens for k in range(128 * groups)}
    scales = {scale_place(t, g, padded) for t in tokens for g in range(groups)}
    sums = {sum_place(t, g, part, padded) for t in tokens for g in range(16 * chunks) for part in range(2)}
    assert codes == set(range(padded * groups * 128))
    assert scales == set(range(padded * groups))
    assert sums == set(range(padded * chunks * 32))


@given(st.integers(0, 40), st.integers(0, 2200), st.booleans(), st.sampled_from(DTYPES), st.integers(0, 99))
@settings(max_examples=40)
def test_round_trip_is_exact(
    tokens: int, in_features: int, per_token: bool, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(tokens, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    found = unprepare(prepare_activation(x, per_token), tokens, in_features)
    for part, expected in zip(found, quantize_activation(x, 128, per_token), strict=True):
        assert part.dtype == expected.dtype
        assert part.is_contiguous()
        assert torch.equal(part, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("in_features", [1, 7, 128, 172, 576, 880, 4096])
def test_every_device_gives_the_numbers_of_the_reference(
    in_features: int, per_token: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """Contiguous, as every second feature of a larger tensor, with features far apart, and off alignment."""
    x = awkward_tokens(in_features, dtype)
    expected = quantize_activation(x, 128, per_token)
    wide = torch.zeros(41, 2 * in_features + 1, dtype=dtype)
    wide[:, 1::2] = x
    shifted = torch.zeros(41 * in_features + 1, dtype=dtype, device=device)
    shifted[1:] = x.flatten().to(device)
    apart = (x.to(device), wide.to(device)[:, 1::2], x.t().contiguous().to(device).t())
    for same in (*apart, shifted[1:].view(x.shape)):
        found = unprepare(prepare_activation(same, per_token), 41, in_features)
        for part, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(part.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


def test_sums_are_exact_to_sixteen_bits(device: torch.device) -> None:
    """Two bfloat16 of 8 bits each, rounded to nearest; NaN where the scale is."""
    x = torch.randn(16, 128, device=device)
    x[5, 3] = float("nan")
    sums = parts_of(prepare_activation(x), 16, 128)[2].view(torch.bfloat16)
    _, scale, group_sum = quantize_activation(x, 128)
    for token, value in enumerate((scale * group_sum).flatten().tolist()):
        high, low = (float(sums[sum_place(token, 0, part, 16)]) for part in range(2))
        if token == 5:
            assert high != high
            assert low != low
        else:
            assert abs(high + low - value) <= 2.0**-17 * abs(value)


def test_bytes_of_any_alignment_are_read() -> None:
    x = torch.randn(5, 300)
    prepared = prepare_activation(x)
    shifted, apart = torch.zeros(len(prepared) + 1).byte(), torch.zeros(len(prepared), 2).byte()
    shifted[1:], apart[:, 1] = prepared, prepared
    for same in (shifted[1:], apart[:, 1]):
        for part, expected in zip(unprepare(same, 5, 300), quantize_activation(x, 128), strict=True):
            assert torch.equal(part, expected)


@pytest.mark.parametrize(("tokens", "in_features"), [(17, 300), (0, 300), (5, 200), (5, 385)])
def test_activations_of_another_shape_are_refused(tokens: int, in_features: int) -> None:
    prepared = prepare_activation(torch.randn(5, 300))
    with pytest.raises(
        ValueError, match=rf"{len(prepared)} bytes, but {tokens} tokens of {in_features} inputs"
    ):
        unprepare(prepared, tokens, in_features)


def test_the_reference_on_request(device: torch.device) -> None:
    x = torch.randn(33, 320).bfloat16()
    with disable_kernels():
        assert torch.equal(prepare_activation(x.to(device)).cpu(), prepare_activation(x))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", [(3, 200), (0, 128)])
def test_opcheck(shape: tuple[int, int], per_token: bool, device: torch.device) -> None:
    x = torch.randn(shape, device=device).bfloat16()
    torch.library.opcheck(torch.ops.torchmix.prepare_activation.default, (x, per_token))
