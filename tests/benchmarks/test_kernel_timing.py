"""Numbers of copies and launches, rounds, medians; times themselves are not tested."""

from __future__ import annotations

import pytest
import torch
from kernel_timing import (
    GRAPH_SECONDS,
    MOST_LAUNCHES,
    REUSE_BYTES,
    GraphTimer,
    HostTimer,
    interleave,
    microseconds,
    num_copies,
    num_launches,
)


class FakeTimer:
    """Gives given seconds in turn and notes when it ran."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.name, self._seconds, self._log = name, seconds, log
        self.output = None

    def enqueue(self) -> None:
        self._log.append(self.name)

    def seconds(self) -> list[float]:
        return self._seconds[: self._log.count(self.name)]


@pytest.mark.parametrize("num_bytes", [9_500_000, 33_400_000, 149_999_999, 150_000_000, 939_000_000])
def test_copies_are_as_few_as_keep_a_weight_out_of_the_cache(num_bytes: int) -> None:
    copies = num_copies(num_bytes)
    assert copies * num_bytes >= REUSE_BYTES
    assert copies == 1 or (copies - 1) * num_bytes < REUSE_BYTES


@pytest.mark.parametrize("seconds", [1e-6, 5e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("copies", [1, 3, 16])
def test_launches_use_every_copy_equally(seconds: float, copies: int) -> None:
    launches = num_launches(seconds, copies)
    assert launches % copies == 0
    assert launches <= MOST_LAUNCHES + copies
    assert launches * seconds >= min(GRAPH_SECONDS, MOST_LAUNCHES * seconds) * (1 - 1e-9)


def test_rounds_are_interleaved_and_the_first_does_not_count() -> None:
    log: list[str] = []
    timers = {"a": FakeTimer("a", [9.0, 1.0, 2.0], log), "b": FakeTimer("b", [8.0, 3.0, 4.0], log)}
    assert interleave(timers, repeats=2) == {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert log == ["a", "b"] * 3


def test_runs_before_the_rounds_do_not_count() -> None:
    log = ["a"]
    assert interleave({"a": FakeTimer("a", [9.0, 8.0, 1.0], log)}, repeats=1) == {"a": [1.0]}


def test_median_smallest_largest() -> None:
    assert microseconds([3e-6, 1e-6, 2e-6]) == pytest.approx((2.0, 1.0, 3.0))


def test_host_timer_calls_every_launch() -> None:
    calls: list[int] = []

    def launch(number: int) -> int:
        calls.append(number)
        return number

    timer = HostTimer(launch, count=3)
    timer.enqueue()
    assert calls == [0, 0, 1, 2]
    assert timer.output == 2
    assert len(timer.seconds()) == 1


class FakeGraph:
    """Stands for ``torch.cuda.CUDAGraph``; notes what is done with it."""

    calls: list[str] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        self.calls.append("begin")

    def capture_end(self) -> None:
        self.calls.append("end")

    def replay(self) -> None:
        self.calls.append("replay")


class FakeEvent:
    """Stands for ``torch.cuda.Event``: two milliseconds between any two."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeGraph.calls.append("event")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2.0


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    FakeGraph.calls = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: FakeGraph.calls.append("wait"))
    return FakeGraph.calls


def test_graph_timer_divides_by_its_launches(fake_cuda: list[str]) -> None:
    launched: list[int] = []
    timer = GraphTimer(lambda number: launched.append(number) or number, count=4, keep=2)
    assert launched == [0, 1, 2, 3]
    assert timer.output == 3
    timer.enqueue()
    timer.enqueue()
    assert timer.seconds() == pytest.approx([0.5e-3, 0.5e-3])
    assert fake_cuda == ["begin", "end", *("event", "replay", "event") * 2, "wait"]


def test_a_failure_ends_the_capture(fake_cuda: list[str]) -> None:
    def broken(number: int) -> None:
        raise ValueError("not on this device")

    with pytest.raises(ValueError, match="not on this device"):
        GraphTimer(broken, count=2)
    assert fake_cuda == ["begin", "end"]
