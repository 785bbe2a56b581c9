"""``torchmix env``: versions, and the truth about kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchmix._extension import KernelLibrary, KernelStatus
from torchmix.cli import env

Run = Callable[..., tuple[int, str, str]]


def test_versions_and_kernels_are_reported(run: Run) -> None:
    code, out, _ = run("env", "--json", "-")
    assert code == 0
    report = json.loads(out)
    assert report["torch"] == torch.__version__
    assert set(report["kernels"]) == {"cpu", "cuda"}
    for kernel in report["kernels"].values():
        assert kernel["live"] == (kernel["reason"] is None)
    assert "cpu kernels" in run("env")[1]


def test_a_kernel_that_failed_to_load_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    status = KernelStatus((KernelLibrary(Path("_C.so"), "cpu", "OSError: no libgomp"),))
    monkeypatch.setattr("torchmix._extension.kernel_status", lambda: status)
    out = run("env")[1]
    assert "no libgomp" in out
    assert "reference" in out


@pytest.mark.parametrize(
    "capability, expected", [("avx2", "live, avx2"), (None, "avx3 names nothing that can run")]
)
def test_instructions_of_the_cpu_kernels_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, capability: str | None, expected: str
) -> None:
    status = KernelStatus((KernelLibrary(Path("_C.so"), "cpu"),))
    monkeypatch.setattr("torchmix._extension.kernel_status", lambda: status)
    monkeypatch.setattr("torchmix._extension.cpu_capability", lambda: capability)
    monkeypatch.setenv("TORCHMIX_CPU_CAPABILITY", "avx3")
    assert expected in run("env")[1]


def test_machines_without_cpuinfo_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object, **options: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert env.cpu_features() == []
