"""Progress of long steps: a bar with the total time on a terminal, a line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from torchmix.cli.formatting import format_seconds

SECONDS_BETWEEN_LINES = 5.0
_BAR_FORMAT = (
    "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed} of about {total_time}]"
)


class ProgressReporter:
    """Reports one step; call it as ``reporter(done, total)`` and use it as a context manager.

    Further arguments of a call are ignored, so that it fits every progress callback of torchmix.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``title``: what is done ("calibrating"); ``unit``: of what it counts ("samples")."""
        self.title, self.unit, self.quiet = title, unit, quiet
        self.stream = stream or sys.stderr
        self._clock = clock
        self._started = self._printed = clock()
        self._bar: Any = None

    @property
    def seconds(self) -> float:
        """Time since the start of the step."""
        return self._clock() - self._started

    def __enter__(self) -> ProgressReporter:
        self._started = self._printed = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and not self.quiet:
            self._line(f"{self.title}: done in {format_seconds(self.seconds)}")

    def __call__(self, done: int, total: int, *_: object) -> None:
        """Report that ``done`` of ``total`` units are done."""
        if self.quiet:
            return
        if self.stream.isatty():
            self._show_bar(done, total)
        elif done < total and self._clock() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = self._clock()
            left = self.seconds * (total - done) / max(done, 1)
            self._line(
                f"{self.title}: {done}/{total} {self.unit} in {format_seconds(self.seconds)}, "
                f"about {format_seconds(left)} left"
            )

    def _show_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = _total_time_bar()(
                total=total, desc=self.title, unit=self.unit, file=self.stream, bar_format=_BAR_FORMAT
            )
            self._bar.start_t -= self.seconds  # the first unit took time as well
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def _line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


def _total_time_bar() -> Any:
    """tqdm's bar with one more field, ``total_time``; imported here to keep ``--help`` fast."""
    from tqdm import tqdm

    class TotalTimeBar(tqdm):
        """A bar that knows how long the whole step will take."""

        @property
        def format_dict(self) -> dict[str, Any]:
            """The fields of the bar's format."""
            fields = super().format_dict
            whole = fields["elapsed"] * (fields["total"] or 0) / max(fields["n"], 1)
            return {**fields, "total_time": tqdm.format_interval(whole) if fields["n"] else "?"}

    return TotalTimeBar
