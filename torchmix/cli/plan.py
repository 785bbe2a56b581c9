"""``torchmix plan``: what quantizing would give, without doing it."""

from __future__ import annotations

import argparse
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmix.cli import options as flags
from torchmix.cli.budget import curve_budgets, has_size
from torchmix.cli.curve import (
    CurvePoint,
    check_curve_flags,
    curve_plans,
    curve_table,
    measured_text,
    write_plot,
)
from torchmix.cli.formatting import facts, format_bytes, format_seconds
from torchmix.cli.json_report import STDOUT, check_json_target, write_json_report
from torchmix.cli.layer_report import calibration_origin
from torchmix.cli.loading import LoadedModel, restore_dtypes
from torchmix.cli.measurement import (
    Measurement,
    MeasuringText,
    check_measuring_text,
    measure_plan,
    read_measuring_text,
)
from torchmix.cli.plan_report import (
    coverage_line,
    excluded_text,
    kl_text,
    layer_table,
    plan_lines,
    plan_report,
    size_text,
)
from torchmix.cli.preparation import Preparation, calibration_text, check_flags, prepare
from torchmix.cli.startup import start
from torchmix.cli.time_estimate import TimeEstimate, estimate_time

if TYPE_CHECKING:
    from torchmix.allocation import BitPlan

logger = logging.getLogger(__name__)
_ONE_SIZE = ("bits_per_weight", "predicted_kl", "layers")  # keys that a curve alone does not have
DESCRIPTION = """\
Say what quantizing MODEL would give before it is done: the size on disk to the byte, the true bits per weight, the
memory it takes, and every layer that is left out, with the reason. Nothing is written unless --output, --json,
--plot or --save-calibration names a file. The exit code is not 0 where the size cannot be reached.

Without --data this takes seconds, and which rows get more bits is decided by their rounding errors alone. With --data
the model is calibrated as 'torchmix quantize' would do it, and the KL divergence from the original is predicted.

--curve prints a table of sizes, beside or instead of one size. --measure quantizes a copy of the model at each size,
compares it with the original on a text, and says how far the prediction was off; it takes the time to quantize for
every size, and memory for a second model. The prediction is about weights alone: what the int8 activations cost comes
on top, and is most of the divergence of very large sizes.
"""

EXAMPLES = """\
  torchmix plan MODEL --bits 4.5
  torchmix plan MODEL --bits 4.5 --data notes.txt --save-calibration model.calibration
  torchmix plan MODEL --bits 3.8 --calibration model.calibration --output plan.json
  torchmix plan MODEL --widths 4,8 --bits 4.5 --exclude '*.layers.0.*'
  torchmix plan MODEL --calibration model.calibration --curve --plot curve.png
  torchmix plan MODEL --calibration model.calibration --curve --points 6 --measure other.txt --measure-tokens 20000
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
    _add_curve(parser)
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


def _add_curve(parser: argparse.ArgumentParser) -> None:
    """Several sizes, and what they are really worth."""
    group = parser.add_argument_group("curve and measurement")
    group.add_argument(
        "--curve", action="store_true", help="print a table of sizes and their predicted quality"
    )
    group.add_argument(
        "--curve-from",
        type=flags.bits,
        metavar="B",
        help="smallest budget in bits per weight (default: all narrowest)",
    )
    group.add_argument(
        "--curve-to",
        type=flags.bits,
        metavar="B",
        help="largest budget in bits per weight (default: all widest)",
    )
    group.add_argument(
        "--points",
        type=flags.positive,
        metavar="N",
        help=f"sizes of the curve, evenly spaced (default: {flags.DEFAULT_POINTS})",
    )
    group.add_argument(
        "--plot", metavar="FILE", help="draw the curve into a .png, .svg or .pdf (needs torchmix[plots])"
    )
    group.add_argument(
        "--measure",
        metavar="TEXT",
        help="quantize a copy of the model at each size and measure KL divergence and perplexity on this plain text, "
        "not the one used for calibration; python-docs takes the other half of that text",
    )
    group.add_argument(
        "--measure-tokens",
        type=flags.positive,
        metavar="T",
        help="use only the first T tokens of that text (default: all)",
    )
    flags.add_rounding(group)


@dataclass
class _Findings:
    """The size that was asked for, if one was, the curve, if there is one, and the time to quantize."""

    estimate: TimeEstimate
    sized: CurvePoint | None
    curve: list[CurvePoint]

    @property
    def measurement(self) -> Measurement | None:
        """One of the measurements, for what they have in common."""
        points = [*([self.sized] if self.sized else []), *self.curve]
        return points[0].measurement if points else None


def run(options: argparse.Namespace) -> int:
    """Plan, measure where asked, print, and write what was asked for."""
    started = time.perf_counter()
    check_flags(options)
    check_curve_flags(options)
    check_measuring_text(options.measure)
    for flag in ("json", "output", "save_calibration", "plot"):
        check_json_target(getattr(options, flag), f"--{flag.replace('_', '-')}")
    start(quiet=options.quiet, progress_bars=not Path(options.model).exists())
    texts: list[MeasuringText | None] = []

    def check(loaded: LoadedModel, expected: BitPlan) -> None:
        texts.append(read_measuring_text(options, loaded.model))
        if options.curve:
            curve_budgets(options, expected)

    preparation = prepare(options, check)
    report, findings = _report(options, preparation, texts[0])
    report["seconds"] = time.perf_counter() - started
    if options.output is not None:
        preparation.plan.save(options.output)
    if options.plot is not None:
        write_plot(options.plot, findings.curve, options.model)
    if options.json != STDOUT:
        print(_text(options, preparation, findings, report))
    write_json_report(options.json, report)
    return 0


def _find(options: argparse.Namespace, preparation: Preparation, text: MeasuringText | None) -> _Findings:
    """Plan the curve, measure what is to be measured, and count bytes."""
    from torchmix.checkpoint import planned_checkpoint_bytes

    estimate = estimate_time(options, preparation)
    plans = [preparation.plan] if has_size(options) else []
    if options.curve:
        assert preparation.calibration is not None, "plan always has a calibration"
        budgets = curve_budgets(options, preparation.plan)
        plans += curve_plans(options, preparation.calibration, budgets, preparation.plan.salience)
    measurements: list[Measurement | None] = [None] * len(plans)
    if text is not None:
        _warn_of_the_same_text(options)
        for index, plan in enumerate(plans):
            title = (
                f"size {index + 1} of {len(plans)}, {plan.bits_per_weight:.2f} bits: "
                if len(plans) > 1
                else ""
            )
            measurements[index] = measure_plan(options, preparation, plan, text, title)
    model = preparation.loaded.model
    restore_dtypes(model, preparation.loaded.dtypes)
    points = [
        CurvePoint(plan, planned_checkpoint_bytes(model, plan, options.max_shard_size), measurement)
        for plan, measurement in zip(plans, measurements, strict=True)
    ]
    sized = points.pop(0) if has_size(options) else None
    return _Findings(estimate, sized, points)


def _warn_of_the_same_text(options: argparse.Namespace) -> None:
    """Say so where a model is measured on what it was calibrated on."""
    texts = (options.data, options.measure)
    if all(text is not None and Path(text).exists() for text in texts) and os.path.samefile(*texts):
        logger.warning(
            "--measure and --data name the same text: what was calibrated on it looks better there than elsewhere"
        )


def _report(
    options: argparse.Namespace, preparation: Preparation, text: MeasuringText | None
) -> tuple[dict[str, Any], _Findings]:
    """The contract's keys, and what is behind them."""
    findings = _find(options, preparation, text)
    plan, forecast = preparation.plan, preparation.forecast
    described = plan_report(plan)
    if findings.sized is None:
        described = {key: described[key] for key in described if key not in _ONE_SIZE}
    else:
        described |= findings.sized.to_dict()
    report = {
        "model": options.model,
        **described,
        "original_bytes": preparation.loaded.original_bytes,
        "peak_host_bytes": forecast.peak_host_bytes,
        "peak_device_bytes": forecast.peak_device_bytes,
        "estimated_seconds": findings.estimate.seconds,
        "calibration": calibration_origin(preparation.calibration),
        "curve": [point.to_dict() for point in findings.curve] if options.curve else None,
        "measured_on": None,
    }
    if text is not None and (found := findings.measurement) is not None:
        report["measured_on"] = {
            "data": text.name,
            "tokens": found.tokens,
            "original_perplexity": found.original_perplexity,
            "rounding": list(found.rounding),
        }
    return report, findings


def _text(
    options: argparse.Namespace, preparation: Preparation, findings: _Findings, report: dict[str, Any]
) -> str:
    """What is printed."""
    plan, sized = preparation.plan, findings.sized
    lines = plan_lines(plan)
    excluded = [(entry.name, entry.reason) for entry in plan.excluded]
    pairs = [("quantized", coverage_line(lines, plan.coverage))]
    if sized is not None:
        pairs = [
            ("size on disk", size_text(sized.checkpoint_bytes, report["original_bytes"])),
            (
                "true bits per weight",
                f"{plan.bits_per_weight:.4f}, everything stored for these layers counted",
            ),
            *pairs,
        ]
    pairs.append(("ranked by", f"{plan.salience}, {calibration_text(preparation.calibration)}"))
    if sized is not None:
        pairs.append(("predicted KL divergence", kl_text(plan.predicted_kl)))
    pairs += _measured_pairs(findings)
    pairs += [
        ("peak memory to quantize", _peak_text(options, report)),
        ("time to quantize", findings.estimate.text()),
        ("this took", format_seconds(report["seconds"])),
    ]
    parts = [layer_table(lines, options.layers)] if sized is not None else []
    parts += [excluded_text(excluded), facts(pairs)]
    if findings.curve:
        parts.append(curve_table(findings.curve))
    written = {"plan": options.output, "curve": options.plot}
    parts += [f"{what} written to {path}" for what, path in written.items() if path is not None]
    return "\n\n".join(parts)


def _measured_pairs(findings: _Findings) -> list[tuple[str, str]]:
    """What was measured, and how far the prediction was off."""
    found = findings.measurement
    if found is None:
        return []
    pairs = []
    if findings.sized is not None:
        pairs.append(("measured KL divergence", measured_text(findings.sized)))
        pairs.append(
            ("measured perplexity", f"{found.perplexity:.4f}, the original's {found.original_perplexity:.4f}")
        )
    else:
        pairs.append(("original's perplexity", f"{found.original_perplexity:.4f} on {found.tokens:,} tokens"))
    ratios = [point.ratio for point in findings.curve if point.ratio is not None]
    if ratios:
        pairs.append(("measured / predicted", f"{min(ratios):.2f} to {max(ratios):.2f} over the curve"))
    pairs.append(("rounded with", ", ".join(found.rounding)))
    return pairs


def _peak_text(options: argparse.Namespace, report: dict[str, Any]) -> str:
    peak = f"about {format_bytes(report['peak_host_bytes'])} of main memory"
    if report["peak_device_bytes"]:
        peak += f" and {format_bytes(report['peak_device_bytes'])} on {options.device}"
    return peak + (" without calibration, more with --data" if _is_bare(options) else "")


def _is_bare(options: argparse.Namespace) -> bool:
    """Neither a text nor a calibration."""
    return options.data is None and options.calibration is None
