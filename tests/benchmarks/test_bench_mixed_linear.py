"""The command: its arguments, and a small run on the references from beginning to end."""

from __future__ import annotations

import csv
from pathlib import Path

import bench_mixed_linear
import kernel_peers
import pytest
from bench_mixed_linear import ALL_PEERS, main, parse
from kernel_peers import ACTIVATIONS
from kernel_results import OURS, OURS_WITH_ACTIVATION
from kernel_targets import SHAPES, TOKENS

SMALL = ["--device", "cpu", "--shapes", "128x256,64x128", "--tokens", "1,3", "--repeats", "1"]


def run(path: Path, *arguments: str) -> list[dict[str, str]]:
    assert main([*SMALL, "--csv", str(path), *arguments]) == 0
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_defaults_are_the_whole_table() -> None:
    options = parse(["--device", "cpu"])
    assert (options.shapes, options.tokens, options.peers) == (SHAPES, TOKENS, ALL_PEERS)
    assert options.row_bits == ({8: 0.1, 4: 0.9}, {8: 1.0})


def test_quick_is_a_part_and_can_be_changed() -> None:
    options = parse(["--device", "cpu", "--quick", "--tokens", "7"])
    assert set(options.shapes) < set(SHAPES)
    assert options.tokens == (7,)
    assert len(options.row_bits) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "4096"],
        ["--shapes", "0x128"],
        ["--tokens", "1,a"],
        ["--tokens", "0"],
        ["--peers", "cutlass"],
        ["--row-bits", "8:10"],
        ["--repeats", "0"],
        ["--device", "tpu"],
    ],
)
def test_arguments_that_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path / "cells.csv", "--row-bits", "8:10,4:90", "5:50,3:50")
    measured = {(row["peer"], row["row_bits"]) for row in rows if row["us"]}
    assert {
        (peer, mix) for peer in (OURS, OURS_WITH_ACTIVATION) for mix in ("8:10,4:90", "5:50,3:50")
    } <= measured
    assert {("bf16", ""), *((name, "") for name in ACTIVATIONS)} <= measured
    assert all(float(row["relative_error"]) < 0.01 for row in rows if row["us"])
    assert all(row["ratio"] for row in rows if row["us"] and row["peer"] not in ACTIVATIONS)
    (failed,) = {row["note"] for row in rows if row["peer"] == "tinygemm_w4a16"}
    assert "CPU" in failed  # its packing exists for CUDA only
    printed = capsys.readouterr().out
    assert "N=128 K=256" in printed
    assert all(f"{name}: us" in printed for name in ACTIVATIONS)
    assert "not measured" in printed


def test_peers_can_be_chosen(tmp_path: Path) -> None:
    rows = run(tmp_path / "cells.csv", "--peers", f"bf16,{OURS}", "--row-bits", "8")
    assert {row["peer"] for row in rows} == {"bf16", OURS}


def test_a_wrong_result_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_mixed_linear, "relative_error", lambda *arguments: float("nan"))
    rows = run(tmp_path / "cells.csv", "--peers", "bf16")
    assert rows
    assert all(not row["us"] and "wrong result" in row["note"] for row in rows)


def test_a_peer_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: object) -> kernel_peers.Layer:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(kernel_peers.PEERS, "fp8_row", kernel_peers.Peer(broken))
    rows = run(tmp_path / "cells.csv", "--peers", "fp8_row,bf16")
    assert {row["note"] for row in rows if row["peer"] == "fp8_row"} == {"RuntimeError: no such kernel"}
    assert all(row["us"] for row in rows if row["peer"] == "bf16")


def test_time_is_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--max-seconds", "0", "--peers", "bf16"]) == 0
    assert capsys.readouterr().out.count("not run") == 2
