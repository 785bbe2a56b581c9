"""The demo's logic on a tiny model: five rows, real packed tensors, sizes to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchao.quantization import quantize_

from tests.saved_model import save_tiny_model
from torchmix import calibrate, mixllm_config
from torchmix.checkpoint import save_pretrained
from torchmix.demo.run import (
    ORIGINAL,
    OURS,
    DemoReport,
    DemoSettings,
    Progress,
    demo_settings,
    generate,
    run_demo,
)
from torchmix.demo.text import DemoText, demo_model_directory, demo_texts
from torchmix.huggingface import load_model, load_tokenizer

STAGES: list[tuple[str, str, int]] = []


@contextmanager
def stage(title: str, unit: str) -> Iterator[Progress]:
    """Record what is reported."""
    calls: list[int] = []
    yield lambda done, total: calls.append(done)
    STAGES.append((title, unit, len(calls)))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DemoSettings:
    """A random Llama, 128 wide, with a tokenizer of bytes; two samples, one window."""
    directory = tmp_path_factory.mktemp("demo") / "model"
    save_tiny_model(
        directory, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True
    )
    return DemoSettings(num_samples=2, num_windows=1, model=directory)


@pytest.fixture(scope="module")
def texts() -> DemoText:
    whole = demo_texts()
    return DemoText(whole.calibration[:5000], whole.evaluation[:5000])


@pytest.fixture(scope="module")
def report(settings: DemoSettings, texts: DemoText) -> DemoReport:
    STAGES.clear()
    return run_demo(texts, settings, stage)


def test_five_rows_in_order_with_their_true_bits(report: DemoReport) -> None:
    methods = [row.method for row in report.rows]
    assert methods[0] == ORIGINAL
    assert methods[-1] == OURS
    assert len(methods) == 5
    original, rtn, gptq, paper, ours = report.rows
    assert (original.bits_per_weight, original.kl_mean, original.seconds) == (16.0, 0.0, 0.0)
    assert rtn.bits_per_weight == gptq.bits_per_weight < ours.bits_per_weight <= 4.5
    assert rtn.model_bytes == gptq.model_bytes < ours.model_bytes < original.model_bytes
    assert paper.bits_per_weight > 4.2
    assert all(row.kl_mean > 0 and row.perplexity > 1 and row.seconds > 0 for row in report.rows[1:])


def test_sizes_are_those_of_files(report: DemoReport, settings: DemoSettings, tmp_path: Path) -> None:
    assert report.rows[0].model_bytes == (settings.model / "model.safetensors").stat().st_size
    model = load_model(settings.model)
    plan = calibrate(model, None, widths=(4,)).plan(widths=(4,))
    quantize_(model, mixllm_config(plan, rounding="rtn"))
    info = save_pretrained(model, tmp_path / "o", plan=plan)
    assert report.rows[1].model_bytes == info.checkpoint_bytes


def test_report_is_json_without_paths_of_this_machine(report: DemoReport) -> None:
    text = json.dumps(report.to_dict())
    assert str(report.model.parent) not in text
    values = json.loads(text)
    assert set(values["rows"][0]) == {
        *("method", "bits_per_weight", "perplexity", "kl_mean", "model_bytes", "seconds")
    }
    assert values["excluded"] == [{"name": "lm_head.weight", "reason": "tied to an embedding"}]
    assert values["coverage"] == 1.0


def test_samples_continue_the_prompt(report: DemoReport) -> None:
    assert set(report.samples) == {ORIGINAL, OURS}
    assert all(text.startswith(report.prompt) for text in report.samples.values())


def test_progress_is_reported_for_each_stage(report: DemoReport) -> None:
    assert [(title, count) for title, _, count in STAGES] == [
        ("calibrating", 3),
        ("quantizing", 4),
        ("evaluating five models", 1),
        ("generating", 2),
    ]


def test_the_same_seed_gives_the_same_numbers(
    report: DemoReport, settings: DemoSettings, texts: DemoText
) -> None:
    again = run_demo(texts, settings)
    assert [replace(row, seconds=0.0) for row in again.rows] == [
        replace(row, seconds=0.0) for row in report.rows
    ]
    assert again.samples == report.samples


def test_generation_leaves_global_random_state_alone(settings: DemoSettings) -> None:
    before = torch.get_rng_state()
    generate(load_model(settings.model), load_tokenizer(settings.model), "a", new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_that_are_too_short_say_what_is_needed(settings: DemoSettings) -> None:
    with pytest.raises(ValueError, match="needs 1025"):
        run_demo(DemoText("long enough " * 500, "short"), settings)


def test_default_settings_use_the_bundled_model() -> None:
    assert demo_settings().model == demo_model_directory()
