"""What a plan costs on a text is what quantizing and evaluating would say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from torchmix.cli.measurement import check_measuring_text, evaluation_tokens
from torchmix.huggingface import load_tokenizer

Run = Callable[..., tuple[int, str, str]]


def test_measured_as_by_quantize_and_evaluate(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    data = ("--data", text_file, "--samples", 2, "--sequence-length", 64, "--bits", 4.5)
    measure = ("--measure", text_file, "--measure-tokens", 1100)
    code, out, err = run("plan", tiny_model, *data, *measure, "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert "--measure and --data name the same text" in err
    assert [line.partition(":")[0] for line in err.splitlines()][-2:] == ["rounding", "evaluating"]
    assert report["ratio"] == pytest.approx(report["measured_kl"] / report["predicted_kl"])
    assert report["measured_on"]["tokens"] == 1024
    assert report["curve"] is None

    assert run("quantize", tiny_model, *data, "--output", tmp_path / "o", "--quiet")[0] == 0
    evaluated = run(
        *("evaluate", tmp_path / "o", "--reference", tiny_model, "--data", text_file),
        *("--max-tokens", 1100, "--json", "-", "--quiet"),
    )
    expected = json.loads(evaluated[1])
    assert report["measured_kl"] == pytest.approx(expected["kl_mean"], rel=1e-4)
    assert report["measured_perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert report["checkpoint_bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "o").glob("*.safetensors")
    )


def test_texts_that_are_not_there_or_too_short(run: Run, tiny_model: Path, text_file: Path) -> None:
    check_measuring_text(None)
    check_measuring_text("python-docs")
    code, _, err = run("plan", tiny_model, "--bits", 4.5, "--measure", "missing.txt")
    assert (code, err) == (
        2,
        "torchmix: error: --measure missing.txt: no such file; give a plain text, or python-docs\n",
    )
    code, _, err = run("plan", tiny_model, "--bits", 4.5, "--measure", text_file, "--measure-tokens", 1024)
    assert code == 2
    assert "1024 tokens are too few, one window of the evaluation needs 1025" in err


def test_a_cut_text_has_its_share_of_the_bytes(tiny_model: Path, text_file: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    token_ids, num_bytes = evaluation_tokens(str(text_file), tokenizer, None)
    assert num_bytes == text_file.stat().st_size
    half, half_bytes = evaluation_tokens(str(text_file), tokenizer, len(token_ids) // 2)
    assert half.tolist() == token_ids[: len(token_ids) // 2].tolist()
    assert half_bytes == pytest.approx(num_bytes / 2, abs=1)
