"""``torchmix quantize --tune``: the result is trained, named in card and report, or refused with a reason."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchmix import Calibration, load_pretrained
from torchmix.cli.layer_report import REPORT_NAME
from torchmix.cli.tuning import steps, tuning_text, warn_of_tuning_memory
from torchmix.tensor import MixedPrecisionTensor
from torchmix.tuning import TuningRecord

Run = Callable[..., tuple[int, str, str]]
RECORD = TuningRecord(True, 0.03, 0.027, 300, 58, 6, 0.01, 12.0, ())


def test_the_result_is_trained_and_says_so(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    data = ("--data", text_file, "--samples", 24, "--sequence-length", 64, "--widths", 3, "--rounding", "rtn")
    code, _, err = run("quantize", tiny_model, *data, "--output", tmp_path / "plain")
    assert code == 0, err
    tuned = ("--tune", 40, "--output", tmp_path / "tuned", "--json", tmp_path / "r.json")
    code, out, err = run("quantize", tiny_model, *data, *tuned)
    assert code == 0, err
    assert "tuning: done" in err
    assert "40 steps; KL divergence" in out
    record = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["tuning"]
    assert record["steps"] == 40
    assert record["samples"] + record["held_back"] > 24  # more of the text than calibration took
    assert record["held_back"] == round((record["samples"] + record["held_back"]) / 10)
    assert record["kept"] == (record["kl_after"] < record["kl_before"])
    assert record["kept"]
    layers = json.loads((tmp_path / "tuned" / REPORT_NAME).read_text(encoding="utf-8"))
    assert layers["tuning"] == record
    assert "| tuned | 40 steps; KL divergence" in (tmp_path / "tuned" / "README.md").read_text(
        encoding="utf-8"
    )

    plain, trained = (
        dict(load_pretrained(tmp_path / name).named_parameters()) for name in ("plain", "tuned")
    )
    quantized = [name for name, weight in plain.items() if isinstance(weight, MixedPrecisionTensor)]
    assert all(plain[name].row_bits.equal(trained[name].row_bits) for name in quantized)
    assert all(not plain[name].scale.equal(trained[name].scale) for name in quantized)
    assert all(plain[name].dtype == trained[name].dtype == torch.bfloat16 for name in plain)
    assert not plain["model.norm.weight"].equal(trained["model.norm.weight"])


def test_without_it_nothing_is_said(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    arguments = ("--widths", 4, "--quiet", "--json", tmp_path / "r.json")
    code, out, _ = run("quantize", tiny_model, *arguments, "--output", tmp_path / "o")
    assert code == 0
    assert "tuned" not in out
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["tuning"] is None
    assert "tuned" not in (tmp_path / "o" / "README.md").read_text(encoding="utf-8")


def test_without_a_text_it_is_refused_before_the_model_is_loaded(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torchmix.huggingface.load_model", lambda *a, **k: pytest.fail("the model was loaded")
    )
    code, _, err = run("quantize", tiny_model, "--widths", 4, "--tune", 10, "--output", tmp_path / "o")
    assert code == 2
    assert "--tune 10 trains on samples of a text" in err


def test_a_calibration_without_samples_is_refused_before_rounding(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, stripped = tmp_path / "kept", tmp_path / "stripped"
    data = ("--data", text_file, "--samples", 2, "--sequence-length", 64)
    run("plan", tiny_model, "--widths", 4, *data, "--save-calibration", kept)
    replace(Calibration.load(kept), samples=None).save(stripped)
    monkeypatch.setattr("torchao.quantization.quantize_", lambda *a, **k: pytest.fail("rounding was started"))
    arguments = ("--widths", 4, "--rounding", "gptq", "--tune", 10, "--calibration", stripped)
    code, _, err = run("quantize", tiny_model, *arguments, "--output", tmp_path / "o")
    assert code == 2
    assert "the calibration holds no samples to train on" in err
    assert not (tmp_path / "o").exists()


def test_steps_are_whole_numbers() -> None:
    assert [steps(text) for text in ("0", "300")] == [0, 300]
    for text in ("-1", "some"):
        with pytest.raises(argparse.ArgumentTypeError):
            steps(text)


def test_text_of_a_record() -> None:
    assert tuning_text(RECORD) == (
        "300 steps; KL divergence 0.03000 -> 0.02700 nats per token on 6 of 64 samples, which were held back"
    )
    assert tuning_text(replace(RECORD, kept=False)).endswith("; not kept, the model is as rounding left it")


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, plan = nn.Linear(1000, 1000, bias=False), SimpleNamespace(quantized_weights=10**6)
    monkeypatch.setattr("torchmix.forecast.available_bytes", lambda: 23 * 10**6)
    with caplog.at_level(logging.WARNING):
        warn_of_tuning_memory(argparse.Namespace(tune=0), model, plan)  # type: ignore[arg-type]
        assert not caplog.records
        warn_of_tuning_memory(argparse.Namespace(tune=10), model, plan)  # type: ignore[arg-type]
    assert "--tune needs about 24" in caplog.text
