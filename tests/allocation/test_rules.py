"""What row counts and widths are accepted."""

from __future__ import annotations

import pytest
import torch

from torchmix.allocation import rules


def bits(*values):
    return torch.tensor(values, dtype=torch.uint8)


@pytest.mark.parametrize("widths", [(), (4, 3), (4, 4), (1, 4), (8, 9), (4.5,)])
def test_widths_must_rise_within_the_range(widths):
    with pytest.raises(ValueError, match=r"widths|bits="):
        rules.check_widths(widths)


@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_options_are_whole_numbers_from_one_up(value):
    with pytest.raises(ValueError, match="row_multiple"):
        rules.check_counts_options(value, 1)
    with pytest.raises(ValueError, match="tensor_parallel"):
        rules.check_counts_options(1, value)


@pytest.mark.parametrize(
    "row_bits, row_multiple, tensor_parallel",
    [
        (bits(4, 8, 3, 3, 5), 1, 1),
        (bits(4, 8, 8, 4), 2, 1),
        (bits(4, 8, 8, 4, 4), 2, 1),  # the remainder is at 4 bits
        (bits(4, 8, 8, 4), 1, 2),
        (bits(4, 4, 4), 8, 1),  # all rows are remainder
        (bits(4, 4, 8, 8, 8, 4, 4, 8), 2, 2),
        (bits(4, 8, 8, 4, 8, 8, 3, 3).reshape(2, 4), 2, 1),
        (bits(4, 8, 8, 4, 8, 8, 8, 8).reshape(2, 4), 1, 2),  # experts may differ, blocks of one may not
    ],
)
def test_counts_that_keep_the_rules(row_bits, row_multiple, tensor_parallel):
    rules.check_row_counts("a", row_bits, row_multiple, tensor_parallel)


@pytest.mark.parametrize(
    "row_bits, row_multiple, tensor_parallel, message",
    [
        (bits(4, 8, 4), 1, 2, "a: 3 rows cannot be cut into tensor_parallel=2"),
        (bits(4, 4, 8, 8), 1, 2, "a: the 2 blocks of 2 rows hold different numbers"),
        (bits(4, 8, 8, 8), 2, 1, "a: 2 widths have a number of rows"),
        (bits(4, 8, 8, 4, 8, 4, 4, 4).reshape(2, 4), 1, 2, "different numbers"),
    ],
)
def test_counts_that_break_a_rule(row_bits, row_multiple, tensor_parallel, message):
    with pytest.raises(ValueError, match=message):
        rules.check_row_counts("a", row_bits, row_multiple, tensor_parallel)


def test_messages_write_the_row_of_an_expert():
    assert rules.format_row((7,)) == "7"
    assert rules.format_row((2, 7)) == "7 of expert 2"
