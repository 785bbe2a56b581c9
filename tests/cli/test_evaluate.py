"""``torchmix evaluate``: the protocol's numbers, and the distance of a model from itself is zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchmix.evaluation import evaluate
from torchmix.huggingface import load_model, load_tokenizer

Run = Callable[..., tuple[int, str, str]]
CONTRACT = {"perplexity", "bits_per_byte", "tokens", "kl_mean", "kl_p99", "top1_agreement"}


def test_numbers_are_those_of_the_library_in_float32(run: Run, tiny_model: Path, text_file: Path) -> None:
    code, out, err = run(
        "evaluate", tiny_model, "--data", text_file, "--window", 256, "--json", "-", "--quiet"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report.keys() >= CONTRACT
    text = text_file.read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(tiny_model)(text)["input_ids"])
    expected = evaluate(
        load_model(tiny_model, dtype=torch.float32), ids, window=256, num_bytes=len(text.encode())
    )
    assert report["dtype"] == "float32"
    assert report["tokens"] == expected.tokens
    assert report["perplexity"] == pytest.approx(expected.perplexity, rel=1e-12)
    assert report["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-12)
    assert report["kl_mean"] is None


def test_a_model_is_at_no_distance_from_itself(run: Run, tiny_model: Path, text_file: Path) -> None:
    code, out, _ = run("evaluate", tiny_model, "--data", text_file, "--reference", tiny_model, "--json", "-")
    assert code == 0
    report = json.loads(out)
    assert (report["kl_mean"], report["kl_p99"], report["top1_agreement"]) == (0.0, 0.0, 1.0)


def test_a_quantized_model_is_near_its_reference(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    run("quantize", tiny_model, "--widths", 8, "--output", tmp_path / "o", "--quiet")
    code, out, err = run(
        "evaluate", tmp_path / "o", "--data", text_file, "--reference", tiny_model, "--max-tokens", 1025
    )
    assert code == 0, err
    assert "KL divergence" in out
    assert "1,024 in 1 windows, float32 arithmetic" in out
    assert err.startswith("evaluating: done in")


def test_a_cut_text_has_its_share_of_the_bytes(run: Run, tiny_model: Path, text_file: Path) -> None:
    arguments = ("evaluate", tiny_model, "--data", text_file, "--window", 100, "--json", "-")
    cut = json.loads(run(*arguments, "--max-tokens", 501)[1])
    assert cut["tokens"] == 500
    # one byte is one token here, so bits per byte are bits per token
    assert cut["bits_per_byte"] == pytest.approx(cut["nll"] / torch.tensor(2.0).log().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.txt"), "no such file"),
        (("--data", "TEXT", "--window", 5000), "beyond its context of 1024"),
        (("--data", "TEXT", "--max-tokens", 10), "needs"),
        (("--data", "TEXT", "--reference", "./missing"), "no such directory"),
    ],
)
def test_what_cannot_be_evaluated_is_code_2(
    run: Run, tiny_model: Path, text_file: Path, arguments: tuple[object, ...], message: str
) -> None:
    replaced = [text_file if argument == "TEXT" else argument for argument in arguments]
    code, out, err = run("evaluate", tiny_model, *replaced)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
