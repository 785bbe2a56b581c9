"""The command: its arguments, the printed table, and a tiny run on a CPU."""

from __future__ import annotations

import csv
from pathlib import Path

import bench_generate
import pytest
import torch
from bench_generate import header, main, parse
from transformers import LlamaForCausalLM

TINY = [
    *("--device", "cpu", "--tiny", "--layers", "2", "--compile", "none"),
    *("--batches", "1,3", "--prompts", "5", "--steps", "2", "--context", "8", "--repeats", "1"),
]


def run(path: Path, *arguments: str) -> list[dict[str, str]]:
    assert main([*TINY, "--csv", str(path), *arguments]) == 0
    return list(csv.DictReader(path.open(encoding="utf-8")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--formats", "fp4"],
        ["--batches", "0"],
        ["--prompts", "x"],
        ["--steps", "256"],
        ["--layers", "0"],
        ["--row-bits", "9"],
    ],
)
def test_arguments_that_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(["--device", "cpu", *arguments])
    assert stopped.value.code == 2


def test_fewer_blocks_are_said() -> None:
    assert "nothing is scaled" in header(parse(["--device", "cpu", "--layers", "8"]))
    assert "nothing is scaled" not in header(parse(["--device", "cpu"]))


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path / "generate.csv", "--formats", "bf16,torchao_int4_tinygemm")
    done = [row for row in rows if row["milliseconds"]]
    assert [(row["what"], row["batch"], row["tokens"]) for row in done] == [
        ("decode", "1", "1"),
        ("decode", "3", "1"),
        ("prefill", "1", "5"),
    ]
    for row in done:
        rate = 1e3 * int(row["batch"]) * int(row["tokens"]) / float(row["milliseconds"])
        assert float(row["tokens_per_second"]) == pytest.approx(rate, rel=1e-4)
        assert row["ratio"] == "1"
        assert row["blocks"] == "2 of 32"
    if not torch.cuda.is_available():
        (failed,) = (row for row in rows if row["format"] == "torchao_int4_tinygemm")
        assert "CUDA" in failed["note"]
    assert "nothing is scaled" in capsys.readouterr().out


def test_numbers_must_be_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: LlamaForCausalLM, state: object) -> torch.Tensor:
        return torch.full((1, 1, 4), float("nan"))

    monkeypatch.setattr(bench_generate, "prefill", broken)
    rows = run(tmp_path / "generate.csv", "--formats", "bf16")
    assert [bool(row["milliseconds"]) for row in rows] == [True, True, False]
    assert "not finite" in rows[2]["note"]


def test_time_is_limited(tmp_path: Path) -> None:
    rows = run(tmp_path / "generate.csv", "--formats", "bf16", "--max-seconds", "0")
    assert [row["note"] for row in rows] == ["not run: --max-seconds 0 are over"]
