"""``torchmix demo``: what torchmix does, on a small model that comes with it."""

from __future__ import annotations

import argparse
import shlex
import textwrap
import time
from typing import TYPE_CHECKING, Any

from torchmix.cli import options as flags
from torchmix.cli.env import environment
from torchmix.cli.formatting import format_seconds, table
from torchmix.cli.json_report import STDOUT, check_json_target, write_json_report
from torchmix.cli.progress import ProgressReporter
from torchmix.cli.startup import start

if TYPE_CHECKING:
    from torchmix.demo.run import DemoReport
    from torchmix.demo.text import DemoText

DESCRIPTION = """\
Quantize a small trained language model that comes with torchmix in four ways and measure each on text it has not seen:
size, perplexity, and how far its predictions are from the original's. The text is Python's own documentation, one half
to calibrate on and the other to measure on, so nothing is downloaded. Takes under two minutes on two cores.
"""
EXAMPLES = """\
  torchmix demo
  torchmix demo --json demo.json
  torchmix demo --data my-notes.txt        first half to calibrate on, second half to measure on
"""
TEXT_WIDTH = 100


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add this command to the parser of all commands."""
    parser = flags.command_parser(
        commands, "demo", "see what it does, on a small model that comes with torchmix", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="plain text file to use instead of Python's documentation (200 kB or more)",
    )
    parser.add_argument(
        "--samples",
        type=flags.positive,
        default=12,
        metavar="S",
        help="calibration samples of 1024 tokens (default: 12)",
    )
    parser.add_argument(
        "--windows",
        type=flags.positive,
        default=24,
        metavar="W",
        help="evaluation windows of 1024 tokens (default: 24)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the samples (default: 0)")
    flags.add_output(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the demo and print what it found."""
    started = time.perf_counter()
    check_json_target(options.json)
    if not options.quiet and options.json != STDOUT:
        print(
            "Quantizing a small trained Llama in four ways, then measuring all on unseen text: a minute or two.",
            flush=True,
        )
    start(quiet=options.quiet)
    from torchmix.demo.run import demo_settings, run_demo

    report = run_demo(
        _texts(options),
        demo_settings(options.samples, options.windows, seed=options.seed),
        lambda title, unit: ProgressReporter(title, unit, quiet=options.quiet),
    )
    seconds = time.perf_counter() - started
    if options.json != STDOUT:
        print(demo_text(report, seconds))
    machine = {name: value for name, value in environment().items() if name != "kernel_files"}
    write_json_report(options.json, {**report.to_dict(), "seconds": seconds, "environment": machine})
    return 0


def _texts(options: argparse.Namespace) -> DemoText:
    """Python's documentation, or the two halves of the user's file."""
    from torchmix.demo import DemoText, demo_texts

    if options.data is None:
        return demo_texts()
    try:
        with open(options.data, encoding="utf-8", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{options.data}: not UTF-8 ({error}); convert it, as with iconv -t utf-8"
        ) from error
    middle = len(text) // 2
    return DemoText(text[:middle], text[middle:])


def demo_text(report: DemoReport, seconds: float) -> str:
    """Everything that is printed at the end.

    Args:
        report: of :func:`torchmix.demo.run.run_demo`.
        seconds: time the command took.
    """
    parts = [
        "",
        demo_table(report),
        _notes(report, seconds),
        _samples(report),
        _coverage(report),
        _next(report),
    ]
    return "\n\n".join(parts).removeprefix("\n")


def demo_table(report: DemoReport) -> str:
    """The comparison."""
    headers = ["method", "bits per weight", "model MB", "perplexity", "KL divergence", "time"]
    rows = [
        [
            row.method,
            f"{row.bits_per_weight:.2f}",
            f"{row.model_bytes / 1e6:.2f}",
            f"{row.perplexity:.2f}",
            f"{row.kl_mean:.4f}" if index else "-",
            format_seconds(row.seconds) if index else "-",
        ]
        for index, row in enumerate(report.rows)
    ]
    return table(headers, rows)


def _notes(report: DemoReport, seconds: float) -> str:
    """What the table says, and how to read it."""
    kept = sum(entry.weights for entry in report.excluded) * 2 / 1e6
    calibration = format_seconds(report.calibration_seconds)
    lines = [
        *(_comparison(report, other) for other in (2, 3)),
        "",
        "bits per weight  everything stored for the quantized layers: codes, scales, zero points, row widths",
        f"model MB         all weights in the file; {kept:.1f} MB of it are embeddings, which stay as they are",
        "perplexity       of the next token of unseen text; lower is better",
        "KL divergence    distance from the original's predictions in nats per token; 0 is equal",
        f"time             to plan and round; the calibration behind it took {calibration}, once for all",
        "",
        f"Calibrated on {report.calibration_tokens:,} tokens, measured on {report.evaluation_tokens:,} others; "
        f"the whole demo took {format_seconds(seconds)}.",
    ]
    return "\n".join(lines)


def _comparison(report: DemoReport, other: int) -> str:
    """The last row against another one, in a sentence."""
    ours, theirs = report.rows[-1], report.rows[other]
    change = ours.kl_mean / theirs.kl_mean - 1
    return (
        f"{ours.method} against {theirs.method}: {ours.bits_per_weight - theirs.bits_per_weight:+.2f} bits per weight, "
        f"{change:+.0%} KL divergence"
    )


def _samples(report: DemoReport) -> str:
    """What two of the models write."""
    blocks = [
        f"{method}:\n" + textwrap.indent(textwrap.fill(" ".join(text.split()), TEXT_WIDTH), "  ")
        for method, text in report.samples.items()
    ]
    return "\n".join([f'The same prompt, "{report.prompt}", continued by', *blocks])


def _coverage(report: DemoReport) -> str:
    excluded = ", ".join(f"{entry.name} ({entry.reason})" for entry in report.excluded) or "nothing"
    return (
        f"Coverage: {report.layers} layers with {report.quantized_weights:,} weights are quantized, "
        f"{report.coverage:.1%} of the linear weights.\nLeft as it is: {excluded}."
    )


def _next(report: DemoReport) -> str:
    """Commands that work when pasted."""
    model = shlex.quote(str(report.model))
    return f"""Next, on the same model (any transformers causal language model and any text file will do):
  torchmix plan {model} --bits 4.5
  torchmix quantize {model} --data python-docs --samples 16 --bits 4.5 --output small
  torchmix evaluate small --data python-docs --max-tokens 16385 --reference {model}
  torchmix inspect small --layer model.layers.0.mlp.down_proj
  torchmix --help"""
