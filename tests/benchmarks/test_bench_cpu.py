"""The CPU benchmark on a tiny shape: every peer gives a row or a reason, and the CSV names the conditions."""

from __future__ import annotations

import csv
from pathlib import Path

import bench_cpu
import pytest
import torch
from cpu_peers import BASELINE, MIXED, PEERS, chosen_peers

OURS = f"torchmix {MIXED}"


def test_all_peers_but_the_compiled_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in PEERS if name != "torchao_w8a8"]
    path = tmp_path / "cpu.csv"
    arguments = ["--shapes", "64x256", "--tokens", "1,3", "--rounds", "5", "--csv", str(path)]
    assert bench_cpu.main([*arguments, "--peers", ";".join(names)]) == 0
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["peer"] for row in rows} == set(names)
    for row in rows:
        assert row["ms"] or row["note"]
        assert row["torch"] == torch.__version__
        assert row["machine"]
        assert row["commit"]
    measured = {(row["peer"], row["M"]): float(row["ratio"]) for row in rows if row["ratio"]}
    assert measured[BASELINE, "1"] == 1.0
    assert {(OURS, "1"), (OURS, "3")} <= set(measured)
    output = capsys.readouterr().out
    assert "N=64 K=256" in output
    assert "goal at M=1: 5.0x" in output


def test_the_baseline_is_always_there_and_unknown_peers_are_refused() -> None:
    assert chosen_peers([OURS]) == [BASELINE, OURS]
    with pytest.raises(ValueError, match="not among"):
        chosen_peers(["mkl"])


def test_a_peer_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(weight: torch.Tensor) -> None:
        raise RuntimeError("no such op")

    monkeypatch.setitem(PEERS, "fp32", fail)
    options = bench_cpu.parse(["--shapes", "16x128", "--tokens", "1", "--rounds", "5", "--peers", "fp32"])
    rows = bench_cpu.run(options, lambda rows: None)
    assert [row.note for row in rows if row.peer == "fp32"] == ["RuntimeError: no such op"]


def test_long_calls_get_fewer_rounds() -> None:
    assert bench_cpu.rounds_for(1, 1 << 20, 41) == 41
    assert bench_cpu.rounds_for(512, 4096 * 14336, 41) == 5
