"""Numbers, tables and names as people read them."""

from __future__ import annotations

import pytest

from torchmix.cli.formatting import (
    facts,
    format_bytes,
    format_number,
    format_seconds,
    name_pattern,
    one_line,
    row_counts,
    table,
)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5_963_208, "5.96 MB"),
        (16_060_000_000, "16.1 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_have_three_digits(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.314, "0.31 s"),
        (9.96, "10.0 s"),
        (42.04, "42.0 s"),
        (99.6, "1:40"),
        (125, "2:05"),
        (3725, "1:02:05"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


def test_table_aligns_names_left_and_numbers_right() -> None:
    text = table(["name", "n"], [["a", "1"], ["long name", "1,000"]])
    assert text.splitlines() == [
        "name           n",
        "---------  -----",
        "a              1",
        "long name  1,000",
    ]


def test_small_helpers() -> None:
    assert one_line(" a\n\t b ") == "a b"
    assert format_number(None, 3) == "-"
    assert format_number(0.12345, 3) == "0.123"
    assert facts([("a", "1"), ("long", "2")]) == "a     1\nlong  2"
    assert row_counts({3: 0, 4: 1200}, (3, 4, 8)) == [".", "1,200", "."]


def test_layers_of_one_kind_share_a_pattern() -> None:
    assert name_pattern("model.layers.11.mlp.up_proj.weight") == "model.layers.*.mlp.up_proj.weight"
    assert name_pattern("0.weight") == "*.weight"
    assert name_pattern("h.3.experts.12.w1.weight") == "h.*.experts.*.w1.weight"
    assert name_pattern("conv2.weight") == "conv2.weight"
