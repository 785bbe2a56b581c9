"""``plan --measure``: a plan tried out on a copy of the model, and what that costs on a text."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmix.cli.preparation import PYTHON_DOCS, Preparation, text_of
from torchmix.cli.progress import ProgressReporter
from torchmix.cli.quantization import quantize_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchmix.allocation import BitPlan


@dataclass(frozen=True, eq=False)
class MeasuringText:
    """A text as tokens: name as given, int64 (tokens,), tokens per evaluation window."""

    name: str
    token_ids: Tensor
    window: int


@dataclass(frozen=True)
class Measurement:
    """One plan on one text.

    kl: mean KL(original || quantized), nats per token. perplexity, original_perplexity: per token.
    tokens: scored positions. rounding: methods that were used, sorted.
    """

    kl: float
    perplexity: float
    original_perplexity: float
    tokens: int
    rounding: tuple[str, ...]


def check_measuring_text(name: str | None) -> None:
    """Refuse a text that is not there, before a model is loaded.

    Raises:
        FileNotFoundError: no such file.
    """
    if name is not None and name != PYTHON_DOCS and not Path(name).is_file():
        raise FileNotFoundError(f"--measure {name}: no such file; give a plain text, or {PYTHON_DOCS}")


def evaluation_tokens(name: str, tokenizer: Any, max_tokens: int | None) -> tuple[Tensor, int]:
    """Token ids of a text and the bytes they stand for; a cut text has its share of the bytes.

    Args:
        name: plain text file, or python-docs for the half of that text that calibration does not use.
        tokenizer: of the model.
        max_tokens: keep the first ones only; None for all.
    """
    from torchmix.data import read_token_ids

    text = text_of(name, "evaluation")
    token_ids, num_bytes = read_token_ids(text if text is not name else Path(text), tokenizer)
    if max_tokens is None or max_tokens >= len(token_ids):
        return token_ids, num_bytes
    return token_ids[:max_tokens], max(1, round(num_bytes * max_tokens / len(token_ids)))


def read_measuring_text(options: argparse.Namespace, model: nn.Module) -> MeasuringText | None:
    """The text of ``--measure`` as tokens; None without that flag.

    Raises:
        ValueError: too short for one window of the evaluation, or not readable.
    """
    from torchmix.evaluation.perplexity import DEFAULT_WINDOW
    from torchmix.huggingface import load_tokenizer

    if options.measure is None:
        return None
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None) or DEFAULT_WINDOW
    window = min(DEFAULT_WINDOW, context)
    token_ids, _ = evaluation_tokens(options.measure, load_tokenizer(options.model), options.measure_tokens)
    if len(token_ids) <= window:
        raise ValueError(
            f"--measure {options.measure}: {len(token_ids)} tokens are too few, one window of the evaluation needs "
            f"{window + 1}; give a longer text, or a larger --measure-tokens"
        )
    return MeasuringText(options.measure, token_ids, window)


def measure_plan(
    options: argparse.Namespace, preparation: Preparation, plan: BitPlan, text: MeasuringText, title: str = ""
) -> Measurement:
    """Quantize a copy of the model as ``torchmix quantize`` would do it, and compare it with the original.

    Args:
        options: flags.
        preparation: model in the dtype of the arithmetic, calibration.
        plan: what to try.
        text: what to measure on.
        title: put before the names of the steps that are shown.
    """
    from torchmix.evaluation import evaluate_many

    original = preparation.loaded.model
    quantized = copy.deepcopy(original)
    with ProgressReporter(f"{title}rounding", "layers", quiet=options.quiet) as reporter:
        records = quantize_model(quantized, plan, preparation.calibration, options.rounding, reporter)
    with ProgressReporter(f"{title}evaluating", "windows", quiet=options.quiet) as reporter:
        found = evaluate_many(
            {"original": original, "quantized": quantized},
            text.token_ids,
            reference=original,
            window=text.window,
            progress=reporter,
        )
    result = found["quantized"]
    assert result.kl_mean is not None, "there was a reference"
    return Measurement(
        result.kl_mean,
        result.perplexity,
        found["original"].perplexity,
        result.tokens,
        tuple(sorted({record.method for record in records})),
    )
