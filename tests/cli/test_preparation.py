"""Flags that contradict each other, and files that do not belong to the model, stop before the work."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from torchmix.cli import preparation
from torchmix.cli.entry import build_parser
from torchmix.cli.preparation import (
    calibration_text,
    check_data_file,
    check_flags,
    keeps_hessians,
    salience_for,
    sequence_length_of,
    text_of,
    warn_of_memory,
)
from torchmix.demo import demo_texts
from torchmix.forecast import MemoryForecast, resident_bytes


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(["quantize", "m", "--output", "o", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "how small"),
        (("--widths", "4,8"), "how small"),
        (("--bits", "4.5", "--rows-at-8-bits", "0.1"), "--bits and --rows-at-8-bits both"),
        (("--bits", "4.5", "--plan", "p"), "--bits and --plan both"),
        (("--rows-at-8-bits", "0.1", "--widths", "3,4"), "uses the widths 4 and 8"),
        (("--plan", "p", "--widths", "4"), "--plan holds"),
        (("--bits", "4", "--data", "t", "--calibration", "c"), "--data and --calibration both"),
        (("--bits", "4", "--save-calibration", "c"), "--data"),
        (("--bits", "4", "--salience", "mixllm"), "--data"),
        (("--bits", "4", "--calibration", "c", "--include", "x"), "leave out --include"),
        (("--rows-at-8-bits", "0.1", "--row-multiple", "16"), "--rows-at-8-bits says which rows"),
        (("--plan", "p", "--tensor-parallel", "2"), "--plan says which rows"),
    ],
)
def test_contradictions_are_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_flags(parse(*arguments))


def test_hessians_are_kept_where_something_needs_them() -> None:
    assert keeps_hessians(parse("--bits", "4"))
    assert not keeps_hessians(parse("--bits", "4", "--rounding", "rtn"))
    plan = ["plan", "m", "--bits", "4"]
    assert keeps_hessians(build_parser().parse_args(plan))
    assert not keeps_hessians(build_parser().parse_args([*plan, "--rounding", "clip"]))
    assert keeps_hessians(build_parser().parse_args([*plan, "--rounding", "clip", "--save-calibration", "c"]))


def test_samples_are_as_long_as_the_model_allows() -> None:
    model = nn.Module()
    assert sequence_length_of(parse("--bits", "4"), model) == 2048
    model.config = SimpleNamespace(max_position_embeddings=64)  # type: ignore[assignment]
    assert sequence_length_of(parse("--bits", "4"), model) == 64
    assert sequence_length_of(parse("--bits", "4", "--sequence-length", "16"), model) == 16


def test_the_papers_setting_uses_the_papers_score_unless_told_otherwise() -> None:
    plan: object = None
    assert salience_for(parse("--rows-at-8-bits", "0.1"), plan) == "mixllm"  # type: ignore[arg-type]
    assert salience_for(parse("--bits", "4"), plan) == "fisher_token"  # type: ignore[arg-type]
    named = parse("--rows-at-8-bits", "0.1", "--salience", "output_error")
    assert salience_for(named, plan) == "output_error"  # type: ignore[arg-type]


def test_missing_text_files_are_found_out_before_a_model_is_loaded(tmp_path: Path) -> None:
    for name in ("missing.txt", "chats.jsonl", str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError, match="no such file"):
            check_data_file(name)
    for name in (None, "org/data-set", "wikitext:wikitext-2-raw-v1", "python-docs", str(tmp_path)):
        check_data_file(name)


def test_python_docs_is_a_text_unless_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text_of("python-docs", "calibration") == demo_texts().calibration
    assert text_of("python-docs", "evaluation") == demo_texts().evaluation
    Path("python-docs").write_text("mine", encoding="utf-8")
    assert text_of("python-docs", "calibration") == "python-docs"


def test_too_little_memory_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torchmix.forecast.available_bytes", lambda: 10**9)
    with caplog.at_level(logging.WARNING, logger=preparation.logger.name):
        warn_of_memory(MemoryForecast(resident_bytes() + 5 * 10**8, 0))
        assert not caplog.records
        warn_of_memory(MemoryForecast(resident_bytes() + 10**10, 0))
    assert "more memory will be needed and 1.00 GB are free" in caplog.text


def test_no_calibration_in_words() -> None:
    assert calibration_text(None) == "no calibration"
