"""Device time of short operations: CUDA graphs of many launches, repeats interleaved over what is compared.

A graph leaves out the host. Its launches rotate over copies of the weights, so that at least ``REUSE_BYTES`` pass
before the same weights come again and none of them is left in the L2 cache. A time includes what a graph takes per
node (0.6 us on an H200). All comparands of a cell are replayed in turn, so that clocks and heat are those of all.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Protocol

import torch

REUSE_BYTES = 150e6  # the L2 cache of an H200 has 60 MB
GRAPH_SECONDS = 3e-3
MOST_LAUNCHES = 400
MOST_COPIES = 400
HOST_SECONDS = 100e-6  # an eager launch that takes longer is bound by the device

Launch = Callable[[int], Any]  # number of the launch -> its result


class Timer(Protocol):
    """Something that runs ``count`` launches when told to, and knows afterwards how long each took."""

    output: Any

    def enqueue(self) -> None:
        """Run all launches once, recorded."""

    def seconds(self) -> list[float]:
        """Seconds per launch of every :meth:`enqueue`, in order; waits for the device."""


class GraphTimer:
    """Launches captured in one CUDA graph.

    launch: called with 0 .. count - 1; may allocate. count: launches in the graph. keep: so many results are alive at
    a time, so that they lie in different memory; the last one is :attr:`output`. The current stream must not be the
    default one, on which nothing can be captured (:func:`use_side_stream`).
    """

    def __init__(self, launch: Launch, count: int, keep: int = 1) -> None:
        self.count = count
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._graph, self.output = capture(launch, count, keep)

    def enqueue(self) -> None:
        """Replay the graph between two events."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        self._events.append((start, end))

    def seconds(self) -> list[float]:
        """Seconds per launch of every replay."""
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 / self.count for start, end in self._events]


class HostTimer:
    """Launches one after another on the host; for trying the benchmark out, not for numbers."""

    def __init__(self, launch: Launch, count: int, keep: int = 1) -> None:
        self.count, self._launch, self._seconds = count, launch, []
        self.output = launch(0)

    def enqueue(self) -> None:
        """Run all launches."""
        started = time.perf_counter()
        for number in range(self.count):
            self.output = self._launch(number)
        self._seconds.append((time.perf_counter() - started) / self.count)

    def seconds(self) -> list[float]:
        """Seconds per launch of every run."""
        return self._seconds


def make_timer(
    launch: Launch, copies: int, least_seconds: float, device: torch.device, keep: int = 1
) -> Timer:
    """A timer for launches on a GPU, or on the host for those on a CPU.

    Args:
        launch: what is timed.
        copies: copies of the weights it rotates over.
        least_seconds: what one launch takes at least; decides how many there are in a graph.
        device: where they run.
        keep: results alive at a time.
    """
    if device.type == "cpu":
        return HostTimer(launch, copies, keep)
    launch(0)  # loads the kernel; what is not known to work is not captured
    torch.cuda.synchronize()
    return GraphTimer(launch, num_launches(max(_eager_seconds(launch), least_seconds), copies), keep)


def num_copies(num_bytes: int) -> int:
    """Copies of a weight that put ``REUSE_BYTES`` between two uses of the same one."""
    return min(MOST_COPIES, max(1, math.ceil(REUSE_BYTES / max(num_bytes, 1))))


def num_launches(seconds: float, copies: int) -> int:
    """Launches of about so many seconds each in one graph: a multiple of ``copies``, about ``GRAPH_SECONDS`` long."""
    wanted = min(MOST_LAUNCHES, max(1, math.ceil(GRAPH_SECONDS / seconds)))
    return math.ceil(wanted / copies) * copies


def interleave(timers: Mapping[Any, Timer], repeats: int) -> dict[Any, list[float]]:
    """Seconds per launch: all timers in turn, ``repeats`` times after a round that does not count."""
    for _ in range(repeats + 1):
        for timer in timers.values():
            timer.enqueue()
    return {key: timer.seconds()[-repeats:] for key, timer in timers.items()}


def microseconds(seconds: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest in microseconds."""
    return median(seconds) * 1e6, min(seconds) * 1e6, max(seconds) * 1e6


def use_side_stream() -> None:
    """Make a new stream the current one: the default stream cannot be captured."""
    torch.cuda.set_stream(torch.cuda.Stream())


def warm_up(seconds: float = 0.5) -> None:
    """Raise the clocks: matrix products for so long."""
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(10):
            x @ x
        torch.cuda.synchronize()


def capture(launch: Launch, count: int, keep: int) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture on the current stream. ``torch.cuda.graph`` would empty the allocator's cache each time."""
    graph, outputs = torch.cuda.CUDAGraph(), deque(maxlen=keep)
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        for number in range(count):
            outputs.append(launch(number))
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph, outputs[-1]


def _eager_seconds(launch: Launch) -> float:
    """Seconds of one launch where the device is what takes long, else 0."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launch(0)
    end.record()
    end.synchronize()
    seconds = start.elapsed_time(end) / 1e3
    return seconds if seconds > HOST_SECONDS else 0.0
