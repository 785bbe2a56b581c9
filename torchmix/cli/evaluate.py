"""``torchmix evaluate``: perplexity of a model on a text, and how far it is from a reference."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmix.cli import options as flags
from torchmix.cli.formatting import facts, format_seconds
from torchmix.cli.json_report import STDOUT, check_json_target, write_json_report
from torchmix.cli.loading import check_model_name
from torchmix.cli.measurement import evaluation_tokens
from torchmix.cli.preparation import check_data_file
from torchmix.cli.progress import ProgressReporter
from torchmix.cli.startup import start

if TYPE_CHECKING:
    import torch

DESCRIPTION = """\
Measure how well MODEL predicts a text, and with --reference how far its predictions are from the original's.

The whole text is one stream of tokens, cut into windows that do not overlap; every position is scored, and what is
left at the end is dropped. Both models compute in the same dtype, and the divergence is over the full vocabulary.
"""
EXAMPLES = """\
  torchmix evaluate small --data other.txt --reference MODEL
  torchmix evaluate MODEL --data other.txt --window 2048 --json original.json
  torchmix evaluate small --data python-docs --reference MODEL --max-tokens 20000
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add this command to the parser of all commands."""
    parser = flags.command_parser(
        commands, "evaluate", "perplexity, and KL divergence from the original", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help=f"{flags.MODEL_HELP}; quantized or not")
    parser.add_argument(
        "--data",
        required=True,
        metavar="TEXT",
        help="plain text file to predict, not the one used for calibration; python-docs takes the half of Python's "
        "documentation that calibration does not use",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the original model; adds the KL divergence and the share of equal top tokens",
    )
    parser.add_argument(
        "--window",
        type=flags.positive,
        metavar="L",
        help="tokens per window (default: 1024, or the model's context)",
    )
    parser.add_argument(
        "--batch-size",
        type=flags.positive,
        default=4,
        metavar="B",
        help="windows per forward pass (default: 4)",
    )
    parser.add_argument(
        "--max-tokens",
        type=flags.positive,
        metavar="T",
        help="use only the first T tokens of the text (default: all)",
    )
    flags.add_machine(parser)
    flags.add_output(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Evaluate and print."""
    started = time.perf_counter()
    check_json_target(options.json)
    names = [options.model, *([options.reference] if options.reference else [])]
    start(quiet=options.quiet, progress_bars=not all(Path(name).exists() for name in names))
    report = _evaluate(options)
    report["seconds"] = time.perf_counter() - started
    if options.json != STDOUT:
        print(_text(report))
    write_json_report(options.json, report)
    return 0


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """The contract's keys."""
    from torchmix.evaluation import evaluate
    from torchmix.huggingface import load_model, load_tokenizer

    check_data_file(options.data)
    for name in filter(None, (options.model, options.reference)):
        check_model_name(name)
    dtype = arithmetic_dtype(options)
    tokenizer = load_tokenizer(options.model)
    token_ids, num_bytes = evaluation_tokens(options.data, tokenizer, options.max_tokens)
    model = load_model(options.model, dtype=dtype, device=options.device)
    reference = None
    if options.reference is not None:
        reference = load_model(options.reference, dtype=dtype, device=options.device)
    with ProgressReporter("evaluating", "windows", quiet=options.quiet) as reporter:
        result = evaluate(
            model,
            token_ids,
            reference=reference,
            window=options.window,
            batch_size=options.batch_size,
            num_bytes=num_bytes,
            progress=reporter,
        )
    return {
        "model": options.model,
        "reference": options.reference,
        "data": options.data,
        "dtype": str(next(model.parameters()).dtype if dtype is None else dtype).removeprefix("torch."),
        **result.to_dict(),
    }


def arithmetic_dtype(options: argparse.Namespace) -> torch.dtype | None:
    """The dtype of ``--dtype``; float32 on a CPU, elsewhere as stored (None)."""
    import torch

    if options.dtype is not None:
        return getattr(torch, options.dtype)
    return torch.float32 if torch.device(options.device).type == "cpu" else None


def _text(report: dict[str, Any]) -> str:
    """What is printed."""
    pairs = [
        ("perplexity", f"{report['perplexity']:.4f} per token"),
        ("bits per byte", f"{report['bits_per_byte']:.4f}"),
        (
            "tokens scored",
            f"{report['tokens']:,} in {report['windows']} windows, {report['dtype']} arithmetic",
        ),
    ]
    if report["kl_mean"] is not None:
        pairs += [
            ("KL divergence", f"{report['kl_mean']:.5f} nats per token (mean), from {report['reference']}"),
            ("  99th percentile", f"{report['kl_p99']:.4f}"),
            ("same top token", f"{report['top1_agreement']:.2%} of the positions"),
        ]
    return facts([*pairs, ("this took", format_seconds(report["seconds"]))])
