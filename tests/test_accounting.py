"""Stored bits against the sizes that packing really produces, and the ranges that are refused."""

from __future__ import annotations

import pytest
import torch

from torchmix import accounting, packing

IN_FEATURES = [1, 8, 64, 100, 128, 172, 320, 576, 880, 4096]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("in_features", IN_FEATURES)
def test_bytes_of_a_row_are_those_of_the_packed_row(in_features, bits):
    row_bits = torch.tensor([bits], dtype=torch.uint8)
    codes = torch.zeros(1, in_features, dtype=torch.int8)
    assert len(packing.pack_rows(codes, row_bits)) == accounting.row_bytes(in_features, bits)
    for group_size in (8, 64, 128):
        groups = accounting.num_groups(in_features, group_size)
        zero_point = torch.zeros(1, groups, dtype=torch.uint8)
        packed = packing.pack_zero_points(zero_point, row_bits)
        assert len(packed) == accounting.zero_point_bytes(in_features, bits, group_size)


def test_worked_example():
    # K = 320, 3 bits, groups of 128: 40 blocks of 3 bytes, G = 3 scales, 9 bits of zero points in 2 bytes
    assert accounting.row_bytes(320, 3) == 120
    assert accounting.num_groups(320, 128) == 3
    assert accounting.zero_point_bytes(320, 3, 128) == 2
    assert accounting.row_stored_bits(320, 3, 128) == 8 * (120 + 2) + 16 * 3 + 8
    assert accounting.zero_point_bytes(320, 8, 128) == 0
    assert accounting.width_costs(320, (3, 8), 128) == (1032, 8 * 320 + 48 + 8)


def test_four_bits_at_4096_inputs_are_4_158_bits_per_weight():
    # 4 + 16 / 128 (scale) + 4 / 128 (zero point) + 8 / 4096 (row width)
    assert accounting.row_stored_bits(4096, 4, 128) / 4096 == 4 + 20 / 128 + 8 / 4096


def test_stored_bits_is_the_sum_over_rows():
    row_bits = torch.randint(2, 9, (3, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = sum(accounting.row_stored_bits(172, bits, 64) for bits in row_bits.flatten().tolist())
    assert accounting.stored_bits(row_bits, 172, 64) == expected
    assert accounting.stored_bits(row_bits[:0], 172, 64) == 0


@pytest.mark.parametrize("bits", [0, 1, 9, -1, 4.0, "4", None])
def test_bits_outside_the_range_are_refused(bits):
    with pytest.raises(ValueError, match="from 2 to 8"):
        accounting.check_bits(bits)
    with pytest.raises(ValueError, match="from 2 to 8"):
        accounting.row_stored_bits(128, bits, 128)


@pytest.mark.parametrize("group_size", [0, -8, 4, 100, 520, 1024, 128.0, None])
def test_group_size_outside_the_range_is_refused(group_size):
    with pytest.raises(ValueError, match="multiple of 8, at most 512"):
        accounting.check_group_size(group_size)


def test_group_size_limit_keeps_float32_sums_exact():
    assert accounting.MAX_GROUP_SIZE * 255 * 127 < 2**24
    accounting.check_group_size(accounting.MAX_GROUP_SIZE)


def test_layer_without_inputs_is_refused():
    with pytest.raises(ValueError, match="in_features=0"):
        accounting.row_bytes(0, 4)


def test_stored_bits_refuses_widths_outside_the_range():
    with pytest.raises(ValueError, match="bits=9"):
        accounting.stored_bits(torch.tensor([4, 9], dtype=torch.uint8), 128, 128)


@pytest.mark.parametrize(
    "bits_per_weight, num_weights, expected", [(0.29, 100, 29), (4.5, 3, 13), (4.1, 10, 41), (8, 7, 56)]
)
def test_budget_counts_the_decimal_number_that_was_written(bits_per_weight, num_weights, expected):
    assert accounting.budget_in_bits(bits_per_weight, num_weights) == expected


def test_budget_gives_back_the_total_that_a_quotient_came_from():
    generator = torch.Generator().manual_seed(0)
    for num_weights in torch.randint(1, 10**11, (200,), generator=generator).tolist():
        total = int(4.7 * num_weights) + 1
        assert accounting.budget_in_bits(total / num_weights, num_weights) == total


@pytest.mark.parametrize("bits_per_weight", [0, -1.0, float("nan"), float("inf")])
def test_budget_must_be_positive_and_finite(bits_per_weight):
    with pytest.raises(ValueError, match="positive finite"):
        accounting.budget_in_bits(bits_per_weight, 100)
