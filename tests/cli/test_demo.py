"""``torchmix demo``: the command around the demo's logic, and once the whole of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from torchmix.cli.demo import demo_text
from torchmix.cli.entry import build_parser
from torchmix.demo.run import DemoReport, DemoRow
from torchmix.selection import Exclusion

Run = Callable[..., tuple[int, str, str]]


def report() -> DemoReport:
    """Numbers that are easy to recognise."""
    methods = (
        "original",
        "RTN, all rows 4 bits",
        "GPTQ, all rows 4 bits",
        "MixLLM, 10% of rows 8 bits",
        "ours",
    )
    rows = tuple(
        DemoRow(name, 16.0 - i, 90.0 + i, 0.1 * i, 10_000_000 - i, 1.5) for i, name in enumerate(methods)
    )
    return DemoReport(
        rows=rows,
        model=Path("/some where/model"),
        prompt="Once",
        samples={"original": "Once upon\na time", "ours": "Once more"},
        layers=28,
        quantized_weights=3_000_000,
        coverage=1.0,
        excluded=(Exclusion("lm_head.weight", "tied to an embedding", 2_000_000, False),),
        predicted_kl=0.05,
        calibration_tokens=16384,
        calibration_seconds=30.0,
        evaluation_tokens=24576,
        evaluation_seconds=20.0,
    )


def test_text_shows_table_samples_coverage_and_commands_that_parse() -> None:
    text = demo_text(report(), 65.0)
    assert "ours against GPTQ, all rows 4 bits: -2.00 bits per weight, +100% KL divergence" in text
    assert "Once upon a time" in text
    assert "Coverage: 28 layers with 3,000,000 weights are quantized, 100.0%" in text
    assert "lm_head.weight (tied to an embedding)" in text
    commands = [line for line in text.splitlines() if line.startswith("  torchmix ") and "--help" not in line]
    assert len(commands) == 4
    for command in commands:
        build_parser().parse_args(shlex.split(command)[1:])
    assert max(map(len, text.partition("Next")[0].splitlines())) <= 110


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "UTF-8"), (b"too short", "needs")])
def test_texts_that_cannot_be_used_are_code_2(run: Run, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    code, _, err = run("demo", "--data", path, "--quiet")
    assert code == 2
    assert message in err


def test_a_missing_text_is_code_2(run: Run) -> None:
    code, _, err = run("demo", "--data", "missing.txt", "--quiet")
    assert (code, err) == (2, "torchmix: error: missing.txt: No such file or directory\n")


@pytest.mark.slow
def test_whole_demo_orders_the_methods_as_it_should(run: Run, tmp_path: Path) -> None:
    code, out, err = run("demo", "--json", tmp_path / "demo.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["rows"]
    assert set(rows[0]) >= {"method", "bits_per_weight", "perplexity", "kl_mean", "model_bytes", "seconds"}
    original, rtn, gptq, paper, ours = rows
    assert original["kl_mean"] == 0
    assert ours["bits_per_weight"] <= 4.5 < paper["bits_per_weight"]
    # measured 0.033, 0.046, 0.066, 0.209: neighbours lie a third apart, far beyond what another Python's text changes
    assert ours["kl_mean"] < paper["kl_mean"] < gptq["kl_mean"] < rtn["kl_mean"]
    assert ours["perplexity"] < gptq["perplexity"] < rtn["perplexity"]
    assert "Coverage: 28 layers" in out
