"""Packing: every bit where the drawing puts it, exact round trips, sizes as accounted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.generators import ORDINARY_IN_FEATURES, WIDTHS, packed_weight, random_codes, row_bits
from torchmix import packing
from torchmix.accounting import num_groups, row_bytes, zero_point_bytes
from torchmix.packing import (
    pack_codes,
    pack_rows,
    pack_zero_points,
    packed_sizes,
    row_offsets,
    unpack_codes,
    unpack_rows,
    unpack_zero_points,
    zero_point_offsets,
)


def bytes_of(codes: list[int], bits: int, multiple: int) -> list[int]:
    """The row as one long number, code 0 in its lowest bits, padded with zeros to ``multiple`` codes."""
    padded = codes + [0] * (-len(codes) % multiple)
    number = sum(code << (bits * i) for i, code in enumerate(padded))
    return list(number.to_bytes(-(-len(padded) * bits // 8), "little"))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_codes_come_back_and_lie_lowest_bits_first(bits: int, rows: int) -> None:
    for count in (0, 1, 7, 8, 9, 16, 23):
        codes = torch.randint(2**bits, (rows, count)).to(torch.uint8)
        packed = pack_codes(codes, bits)
        assert packed.shape == (rows, -(-count // 8) * bits)
        assert packed.tolist() == [bytes_of(row, bits, 8) for row in codes.tolist()]
        assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_bytes_are_those_of_the_drawing() -> None:
    """The drawing names, for every bit of three bytes, the code it belongs to: "2 2 1 1 1 0 0 0 5 4 ..."."""
    line = next(line for line in (packing.__doc__ or "").splitlines() if line.strip().startswith("code "))
    drawn = [int(word) for word in line.split()[1:]]
    assert len(drawn) == 24
    for code in range(8):
        alone = torch.zeros((1, 8), dtype=torch.uint8)
        alone[0, code] = 7
        packed = pack_codes(alone, 3)[0].tolist()
        bits_high_first = [byte >> (7 - i) & 1 for byte in packed for i in range(8)]
        assert bits_high_first == [int(owner == code) for owner in drawn]


def test_padding_bits_are_zero() -> None:
    packed = pack_codes(torch.full((1, 9), 31, dtype=torch.uint8), 5)
    assert packed.tolist() == [[255] * 5 + [31, 0, 0, 0, 0]]


@given(st.lists(st.sampled_from(WIDTHS), max_size=12), st.integers(1, 40), st.integers(0, 10))
def test_mixed_rows_follow_one_another_in_their_order(widths: list[int], in_features: int, seed: int) -> None:
    bits = torch.tensor(widths, dtype=torch.uint8)
    codes = random_codes(bits, in_features, seed)
    qdata = pack_rows(codes, bits)
    unsigned = codes.view(torch.uint8).tolist()
    expected = [bytes_of(row, width, 8) for row, width in zip(unsigned, widths, strict=True)]
    assert qdata.tolist() == [byte for row in expected for byte in row]
    assert row_offsets(bits, in_features).tolist() == [
        sum(map(len, expected[:n])) for n in range(len(widths) + 1)
    ]
    assert torch.equal(unpack_rows(qdata, bits, in_features), codes)


@given(st.lists(st.sampled_from(WIDTHS), max_size=12), st.integers(1, 20), st.integers(0, 10))
def test_zero_points_end_at_a_byte_border(widths: list[int], groups: int, seed: int) -> None:
    bits = torch.tensor(widths, dtype=torch.uint8)
    zeros = torch.randint(128, (len(widths), groups), generator=torch.Generator().manual_seed(seed))
    zeros = (zeros % (1 << bits.long())[:, None]).to(torch.uint8)
    zeros[bits == 8] = 77  # is not stored, whatever it is
    packed = pack_zero_points(zeros, bits)
    expected = [
        [] if width == 8 else bytes_of(row, width, 1)
        for row, width in zip(zeros.tolist(), widths, strict=True)
    ]
    assert packed.tolist() == [byte for row in expected for byte in row]
    assert zero_point_offsets(bits, groups).tolist() == [
        sum(map(len, expected[:n])) for n in range(len(widths) + 1)
    ]
    zeros[bits == 8] = 0
    assert torch.equal(unpack_zero_points(packed, bits, groups), zeros)


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
@pytest.mark.parametrize("group_size", [32, 128])
def test_sizes_are_those_of_the_accounting(in_features: int, group_size: int) -> None:
    weight = packed_weight(17, in_features, group_size)
    qdata, scale, zero_point, bits = weight.inner
    groups = num_groups(in_features, group_size)
    assert scale.shape == (17, groups)
    assert qdata.numel() == sum(row_bytes(in_features, b) for b in bits.tolist())
    assert zero_point.numel() == sum(zero_point_bytes(in_features, b, group_size) for b in bits.tolist())
    assert packed_sizes(bits, in_features, group_size) == (qdata.numel(), zero_point.numel())
    assert torch.equal(unpack_rows(qdata, bits, in_features), weight.codes)
    assert torch.equal(unpack_zero_points(zero_point, bits, groups), weight.zero_points)


def test_offsets_of_experts_count_their_rows_one_after_another() -> None:
    bits = row_bits(12).view(3, 4)
    assert torch.equal(row_offsets(bits, 20), row_offsets(bits.flatten(), 20))
    assert torch.equal(zero_point_offsets(bits, 3), zero_point_offsets(bits.flatten(), 3))
    assert packed_sizes(bits, 20, 8) == packed_sizes(bits.flatten(), 20, 8)


def test_signed_codes_keep_their_sign() -> None:
    codes = torch.tensor([[-127, -1, 0, 1, 127]], dtype=torch.int8)
    bits = torch.tensor([8], dtype=torch.uint8)
    assert torch.equal(unpack_rows(pack_rows(codes, bits), bits, 5), codes)


@pytest.mark.parametrize("in_features", [8, 17, 40])
def test_codes_of_another_number_of_inputs_are_refused(in_features: int) -> None:
    """Otherwise rows would be read from the wrong bytes without a word."""
    bits = row_bits(7)
    qdata = pack_rows(random_codes(bits, 25), bits)
    with pytest.raises(ValueError, match=rf"in_features={in_features} .*holds {qdata.numel()} bytes"):
        unpack_rows(qdata, bits, in_features)
