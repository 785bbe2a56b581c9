"""``torchmix plan``: what quantizing would give, without doing it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torchmix.cli import options as flags
from torchmix.cli.formatting import facts, format_bytes, format_seconds
from torchmix.cli.json_report import STDOUT, check_json_target, write_json_report
from torchmix.cli.layer_report import calibration_origin
from torchmix.cli.loading import restore_dtypes
from torchmix.cli.plan_report import (
    coverage_line,
    excluded_text,
    kl_text,
    layer_table,
    plan_lines,
    plan_report,
    size_text,
)
from torchmix.cli.preparation import (
    Preparation,
    calibration_text,
    check_flags,
    prepare,
)
from torchmix.cli.startup import start

DESCRIPTION = """\
Say what quantizing MODEL would give before it is done: the size on disk to the byte, the true bits per weight, the
memory it takes, and every layer that is left out, with the reason. Nothing is written unless --output, --json or
--save-calibration names a file. The exit code is not 0 where the size cannot be reached.

Without --data this takes seconds, and which rows get more bits is decided by their rounding errors alone. With --data
the model is calibrated as 'torchmix quantize' would do it, and the KL divergence from the original is predicted.
"""

EXAMPLES = """\
  torchmix plan MODEL --bits 4.5
  torchmix plan MODEL --bits 4.5 --data notes.txt --save-calibration model.calibration
  torchmix plan MODEL --bits 3.8 --calibration model.calibration --output plan.json
  torchmix plan MODEL --widths 4,8 --bits 4.5 --exclude '*.layers.0.*'
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add this command to the parser of all commands."""
    parser = flags.command_parser(
        commands,
        "plan",
        "size, memory and layers of a quantized model, before it is made",
        DESCRIPTION,
        EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help=flags.MODEL_HELP)
    flags.add_budget(parser)
    flags.add_calibration(parser)
    flags.add_selection(parser)
    flags.add_machine(parser)
    flags.add_output(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="FILE", help="write the plan (the width of every row) as JSON")
    group.add_argument("--layers", action="store_true", help="one line per layer instead of one per kind")
    group.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, for example 500MB or 2GiB (default: 5GB)",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Plan, print, and write what was asked for."""
    started = time.perf_counter()
    check_flags(options)
    for target in (options.json, options.output, options.save_calibration):
        check_json_target(target)
    start(quiet=options.quiet, progress_bars=not Path(options.model).exists())
    preparation = prepare(options)
    report = _report(options, preparation)
    report["seconds"] = time.perf_counter() - started
    if options.output is not None:
        preparation.plan.save(options.output)
    if options.json != STDOUT:
        print(_text(options, preparation, report))
    write_json_report(options.json, report)
    return 0


def _report(options: argparse.Namespace, preparation: Preparation) -> dict[str, Any]:
    """The contract's keys."""
    from torchmix.checkpoint import planned_checkpoint_bytes

    model, plan = preparation.loaded.model, preparation.plan
    restore_dtypes(model, preparation.loaded.dtypes)
    return {
        "model": options.model,
        **plan_report(plan),
        "checkpoint_bytes": planned_checkpoint_bytes(model, plan, options.max_shard_size),
        "original_bytes": preparation.loaded.original_bytes,
        "peak_host_bytes": preparation.forecast.peak_host_bytes,
        "peak_device_bytes": preparation.forecast.peak_device_bytes,
        "calibration": calibration_origin(preparation.calibration),
    }


def _text(options: argparse.Namespace, preparation: Preparation, report: dict[str, Any]) -> str:
    """What is printed."""
    plan = preparation.plan
    lines = plan_lines(plan)
    excluded = [(entry.name, entry.reason) for entry in plan.excluded]
    peak = f"about {format_bytes(report['peak_host_bytes'])} of main memory"
    if report["peak_device_bytes"]:
        peak += f" and {format_bytes(report['peak_device_bytes'])} on {options.device}"
    if options.data is None:
        peak += " without calibration, more with --data"
    pairs = [
        ("size on disk", size_text(report["checkpoint_bytes"], report["original_bytes"])),
        ("true bits per weight", f"{plan.bits_per_weight:.4f}, everything stored for these layers counted"),
        ("quantized", coverage_line(lines, plan.coverage)),
        ("ranked by", f"{plan.salience}, {calibration_text(preparation.calibration)}"),
        ("predicted KL divergence", kl_text(plan.predicted_kl)),
        ("peak memory to quantize", peak),
        ("this took", format_seconds(report["seconds"])),
    ]
    parts = [layer_table(lines, options.layers), excluded_text(excluded), facts(pairs)]
    if options.output is not None:
        parts.append(f"plan written to {options.output}")
    return "\n\n".join(parts)
