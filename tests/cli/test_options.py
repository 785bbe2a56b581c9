"""Flags: values that are checked where they are read, and names that follow the library."""

from __future__ import annotations

import argparse

import pytest

from torchmix.calibration import PAPER_WIDTHS
from torchmix.cli import options
from torchmix.config import ROUNDING_NAMES
from torchmix.salience import METRICS
from torchmix.workflow import DEFAULT_SALIENCE, DEFAULT_SAMPLES, DEFAULT_WIDTHS


def test_names_and_defaults_are_those_of_the_library() -> None:
    assert set(options.SALIENCE_NAMES) == set(METRICS)
    assert options.SALIENCE_NAMES[0] == DEFAULT_SALIENCE
    assert set(options.ROUNDING_NAMES) == set(ROUNDING_NAMES)
    assert options.DEFAULT_WIDTHS == DEFAULT_WIDTHS
    assert options.DEFAULT_SAMPLES == DEFAULT_SAMPLES
    assert options.PAPER_WIDTHS == PAPER_WIDTHS


def test_values_are_read() -> None:
    assert options.widths("8,3,3,4") == (3, 4, 8)
    assert options.share("0.10") == 0.1
    assert options.positive("7") == 7
    assert options.bits("4.5") == 4.5


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (options.widths, "3;4", "write for example 3,4,8"),
        (options.widths, "3,9", "from 2 to 8"),
        (options.share, "10", "0.10 means ten percent"),
        (options.share, "ten", "not a number"),
        (options.positive, "0", "at least 1"),
        (options.positive, "1.5", "not a whole number"),
        (options.bits, "-1", "positive"),
        (options.bits, "nan", "positive"),
        (options.bits, "inf", "positive"),
    ],
)
def test_unusable_values_say_what_is_wanted(read: object, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)  # type: ignore[operator]
