"""The estimate says which command it is about, and has no digits it does not know."""

from __future__ import annotations

import pytest

from torchmix.cli.time_estimate import TimeEstimate, rough_time


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "1 s"), (7.4, "7 s"), (99.4, "99 s"), (240.0, "4 minutes"), (9000.0, "2.5 hours")],
)
def test_rough_times(seconds: float, text: str) -> None:
    assert rough_time(seconds) == text


def test_words_for_each_kind_of_flags() -> None:
    assert TimeEstimate(20.0, 15.0).text() == "about 35 s, 20 s of it calibration"
    assert TimeEstimate(0.0, 15.0).text() == "about 15 s with this calibration"
    bare = TimeEstimate(0.5, 1.6, 300.0, "64 samples of 1024 tokens")
    assert (
        bare.text()
        == "about 2 s without calibration, about 5 minutes with --data (64 samples of 1024 tokens)"
    )
    assert bare.seconds == pytest.approx(2.1)
