"""Bars on a terminal, few lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io

import pytest

from torchmix.cli.progress import SECONDS_BETWEEN_LINES, ProgressReporter


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def steps(stream: io.StringIO, quiet: bool = False, seconds_per_step: float = 2.0) -> str:
    """Ten steps of a task; what was written."""
    clock = Clock()
    with ProgressReporter("calibrating", "samples", quiet=quiet, stream=stream, clock=clock) as reporter:
        for done in range(1, 11):
            clock.now += seconds_per_step
            reporter(done, 10, "a name that is ignored")
    return stream.getvalue()


def test_lines_are_rare_and_tell_the_time_left() -> None:
    lines = steps(io.StringIO()).splitlines()
    assert lines == [
        "calibrating: 3/10 samples in 6.00 s, about 14.0 s left",
        "calibrating: 6/10 samples in 12.0 s, about 8.00 s left",
        "calibrating: 9/10 samples in 18.0 s, about 2.00 s left",
        "calibrating: done in 20.0 s",
    ]


def test_a_short_step_is_one_line() -> None:
    assert steps(io.StringIO(), seconds_per_step=0.01 * SECONDS_BETWEEN_LINES).splitlines() == [
        "calibrating: done in 0.50 s"
    ]


def test_quiet_writes_nothing() -> None:
    assert steps(io.StringIO(), quiet=True) == ""
    assert steps(Terminal(), quiet=True) == ""


def test_a_terminal_gets_a_bar_with_the_total_time() -> None:
    text = steps(Terminal())
    assert "100%" in text
    assert "10/10 samples" in text
    assert " of about " in text
    assert text.count("\n") == 1, "one bar on one line"


def test_a_failing_step_does_not_claim_to_be_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="broken"), ProgressReporter("rounding", "layers", stream=stream):
        raise ValueError("broken")
    assert stream.getvalue() == ""
