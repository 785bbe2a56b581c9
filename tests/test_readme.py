"""README.md tells the truth: its files, flags and functions exist, its code runs, its table is the measured one."""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import torchmix
from tests.saved_model import save_tiny_model
from torchmix.cli.entry import build_parser
from torchmix.tensor import MixedPrecisionTensor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "demo.json"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))


def shell_lines() -> list[str]:
    return [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]


def results_table(report: dict[str, Any]) -> str:
    """The README's table, from what ``torchmix demo --json`` wrote."""
    lines = [
        "| method | bits per weight | model MB | perplexity | KL divergence | time |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        original = row["kl_mean"] == 0
        cells = (
            row["method"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['model_bytes'] / 1e6:.2f}",
            f"{row['perplexity']:.2f}",
            "-" if original else f"{row['kl_mean']:.4f}",
            "-" if original else f"{row['seconds']:.1f} s",
        )
        lines.append(f"| {' | '.join(cells)} |")
    machine = report["environment"]
    cpu, python, torch = machine["cpu"], machine["python"].split()[0], machine["torch"].partition("+")[0]
    whole, once = round(report["seconds"]), round(report["calibration_seconds"])
    command = f"`torchmix demo --json {RESULTS.relative_to(ROOT)}`"
    lines += [
        "",
        f"{command} on {cpu['cores']} cores of an {cpu['name']} (AVX-512 VNNI),",
        f"Python {python}, torch {torch}: {whole} s in all, {once} s of it the one calibration; time is for",
        "planning and rounding.",
    ]
    return "\n".join(lines)


def test_table_is_the_measured_one() -> None:
    table = results_table(json.loads(RESULTS.read_text(encoding="utf-8")))
    assert table in README, f"put this into README.md:\n{table}"


def test_cuda_table_is_the_measured_one() -> None:
    """Every ratio, without and with activation quantization, stands in the benchmark's file."""
    with (ROOT / "benchmarks" / "results" / "cuda_kernels.csv").open(newline="") as file:
        measured = {
            (row["peer"], f"{row['N']}x{row['K']}", int(row["M"])): float(row["ratio"])
            for row in csv.DictReader(file)
            if row["row_bits"] == "8:10,4:90"
        }
    rows = re.findall(r"^\| (\d+x\d+) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for shape, cells in rows:
        for tokens, cell in zip((1, 16, 64, 128, 1024, 4096), cells.split(" | "), strict=True):
            ratios = (measured[peer, shape, tokens] for peer in ("torchmix", "torchmix+activation"))
            assert cell == " / ".join(f"{ratio:.2f}" for ratio in ratios)


def test_quality_tables_are_the_measured_ones() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "quality" / "readme.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"run benchmarks/quality/readme.py: {run.stderr}"


def test_sentences_about_other_tables_are_true() -> None:
    """Numbers in the text after the ablation, from their files."""

    def kl(table: str) -> dict[str, str]:
        with (RESULTS.parent / "quality_wiki_llama_22m" / f"{table}.csv").open(
            newline="", encoding="utf-8"
        ) as file:
            return {row["method"]: f"{float(row['kl_mean']):.4f}" for row in csv.DictReader(file)}

    text = " ".join(README.split())
    seeds = [value for method, value in kl("seeds").items() if method.startswith("torchmix")]
    assert f"lie between {min(seeds)} and {max(seeds)}" in text
    rows = [kl("rows")[f"4.41 bits, row_multiple {multiple}"] for multiple in (16, 64)]
    assert f"{rows[0]} and {rows[1]} at 4.41 bits instead of {kl('accuracy')['torchmix, 4.41 bits']}" in text
    size, other = kl("size"), kl("other_text")
    assert f"128 samples instead of 64 give {size['torchmix, 128 samples']}" in text
    assert f"32 give {size['torchmix, 32 samples']}" in text
    ours, gptq = (f"{name}, on Python's documentation" for name in ("torchmix, 4.41 bits", "GPTQ, 4 bits"))
    like = other["GPTQ, 4 bits, on text like the evaluation's"]
    assert f"the same budget gives {other[ours]}, and GPTQ at 4 bits {other[gptq]} instead of {like}" in text


def test_files_that_are_named_exist() -> None:
    paths = {span for span in SPANS if re.fullmatch(r"\.?[\w-]+(/[\w.-]+)+/?|[\w-]+/", span)}
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_functions_that_are_named_exist() -> None:
    names = set(re.findall(r"\btorchmix\.(\w+)\(", README))
    assert names >= {"calibrate", "mixllm_config", "save_pretrained", "load_pretrained"}
    missing = [name for name in names if name not in torchmix.__all__]
    assert not missing


def test_commands_parse_with_their_flags() -> None:
    commands = [line for line in shell_lines() if line.startswith("torchmix ")]
    assert len(commands) >= 5
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True)[1:])
    flags = set(re.findall(r"(?<!\S)`?(--[a-z][\w-]+)", re.sub(r"```.*?```", "", README, flags=re.DOTALL)))
    known = {
        flag
        for parser in build_parser()._subparsers._group_actions[0].choices.values()  # type: ignore[union-attr]
        for flag in parser._option_string_actions
    }
    assert flags <= known | {"--help"}


def test_the_two_commands_are_one_line_each_and_use_the_pins() -> None:
    install = [line for line in shell_lines() if "pip install" in line]
    assert len(install) == 2
    first, second = install
    assert first.endswith(".venv/bin/torchmix demo")
    assert second.endswith(".venv/bin/pytest")
    assert all(line.count("-c .ci/constraints.txt") == line.count("pip install") for line in install)
    assert first.index("torch==") < first.index("-e ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {
        extra
        for line in install
        for group in re.findall(r"\.\[([\w,]+)\]", line)
        for extra in group.split(",")
    }
    assert extras == {"transformers", "all", "dev"}
    assert extras <= set(project["optional-dependencies"])


def test_python_start_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "model"
    save_tiny_model(directory)
    monkeypatch.setattr("torchmix.demo.demo_model_directory", lambda: directory)
    code = next(text for language, text in BLOCKS if language == "python")
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    with_fewer_samples = functools.partial(torchmix.calibrate, sequence_length=64)
    monkeypatch.setattr(torchmix, "calibrate", with_fewer_samples)
    exec(compile(code, "README.md", "exec"), variables)
    assert variables["plan"].bits_per_weight <= 4.5
    assert any(isinstance(p, MixedPrecisionTensor) for p in variables["model"].parameters())
    assert (tmp_path / "small" / "config.json").is_file()
