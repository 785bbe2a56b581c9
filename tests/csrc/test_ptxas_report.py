"""Registers and spills, read from what ptxas prints."""

from __future__ import annotations

import ptxas_report
import pytest

OUTPUT = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    40 bytes stack frame, 36 bytes spill stores, 44 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compile time = 46.530 ms
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 376 bytes cmem[0]
csrc/cuda/first.cu(3): warning #177-D: variable "n" was declared but never referenced
"""


def test_one_line_per_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert ptxas_report.kernel_lines(OUTPUT) == [
        "sm_80: 10 registers, no spills, no static shared: first",
        "sm_90a: 255 registers, SPILLS 36 B stored, 44 B loaded, stack 40 B, 2048 B shared: second",
    ]


def test_warnings_are_left() -> None:
    assert ptxas_report.without_notes(OUTPUT).splitlines() == OUTPUT.splitlines()[-1:]
