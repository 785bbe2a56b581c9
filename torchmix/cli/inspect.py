"""``torchmix inspect``: what is in a checkpoint, and why a layer has the widths it has."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmix.cli import options as flags
from torchmix.cli.formatting import facts, format_bytes, table
from torchmix.cli.json_report import STDOUT, check_json_target, write_json_report
from torchmix.cli.layer_report import REPORT_NAME, layer_entry, score_summary
from torchmix.cli.plan_report import LayerLine, coverage_line, excluded_text, layer_table
from torchmix.cli.startup import start

if TYPE_CHECKING:
    from torchmix.checkpoint_inspection import CheckpointInfo

DESCRIPTION = """\
Show what is in the directory of a quantized model: true bits per weight, files, widths of the rows, and what is not
quantized and why. --layer shows one layer: how many rows got which width, and the scores behind that.
"""
EXAMPLES = """\
  torchmix inspect small
  torchmix inspect small --verify
  torchmix inspect small --layer model.layers.0.mlp.down_proj
  torchmix inspect small --layer '*.down_proj' --calibration model.calibration
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add this command to the parser of all commands."""
    parser = flags.command_parser(
        commands, "inspect", "what is in the directory of a quantized model", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("directory", metavar="DIR", help="directory that 'torchmix quantize' wrote")
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="show the layer of this name; a glob, or re: and a regular expression, may name several",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="take the scores of --layer from this calibration file instead of the summary in the directory",
    )
    parser.add_argument("--layers", action="store_true", help="one line per layer instead of one per kind")
    parser.add_argument("--verify", action="store_true", help="read all files and compare their sha256")
    flags.add_output(parser, progress=False)
    return parser


def run(options: argparse.Namespace) -> int:
    """Inspect and print."""
    check_json_target(options.json)
    start()
    from torchmix.checkpoint_inspection import inspect_checkpoint

    info = inspect_checkpoint(options.directory, verify=options.verify)
    report: dict[str, Any] = {"directory": options.directory, **info.to_dict(), "verified": options.verify}
    if options.layer is not None:
        details = _details(options, info)
        report["details"] = details
        text = "\n\n".join(_detail_text(detail) for detail in details)
    else:
        text = _text(options, info)
    if options.json != STDOUT:
        print(text)
    write_json_report(options.json, report)
    return 0


def _lines(info: CheckpointInfo) -> list[LayerLine]:
    return [
        LayerLine(layer.name, layer.shape, layer.rows_per_bits, layer.bits_per_weight)
        for layer in info.layers
    ]


def _text(options: argparse.Namespace, info: CheckpointInfo) -> str:
    """The whole checkpoint."""
    config = info.config
    activations = "token" if config.per_token else f"token and group of {config.group_size} inputs"
    pairs = [
        (
            "size of the weight files",
            f"{info.checkpoint_bytes:,} bytes ({format_bytes(info.checkpoint_bytes)})",
        ),
        ("true bits per weight", f"{info.bits_per_weight:.4f}, everything stored for these layers counted"),
        ("quantized", coverage_line(_lines(info), info.coverage)),
        ("group size", f"{config.group_size} inputs per scale"),
        ("activations", f"int8, one scale per {activations}"),
        ("written by", f"{config.producer}, format version {config.format_version}"),
    ]
    check = "sha256 is right" if options.verify else "not compared, see --verify"
    shards = [[name, f"{size:,}", digest[:16] or "-", check] for name, (size, digest) in info.shards.items()]
    return "\n\n".join(
        [
            layer_table(_lines(info), options.layers),
            excluded_text(list(config.excluded)),
            table(["file", "bytes", "sha256", "contents"], shards),
            facts(pairs),
        ]
    )


def _details(options: argparse.Namespace, info: CheckpointInfo) -> list[dict[str, Any]]:
    """One entry per layer that ``--layer`` names.

    Raises:
        ValueError: the name matches no quantized layer; says why if it is an excluded one.
    """
    from torchmix.selection import matches

    found = [line for line in _lines(info) if matches(line.name, options.layer)]
    if not found:
        excluded = [entry for entry in info.config.excluded if matches(entry[0], options.layer)]
        reasons = [f"{name} is not quantized: {reason}" for name, reason in excluded]
        hint = reasons[0] if reasons else f"names look like {info.layers[0].name}"
        raise ValueError(f"--layer {options.layer} matches no quantized layer of {options.directory}; {hint}")
    report = _stored_report(Path(options.directory))
    details = []
    for line in found:
        entry = layer_entry(report, line.name)
        if options.calibration is not None:
            entry["scores"] = _scores_from(options, line.name)
        salience = report.get("salience") if isinstance(report, Mapping) else None
        details.append({**line.to_dict(), "salience": salience, **entry})
    return details


def _stored_report(directory: Path) -> Mapping[str, Any]:
    """The layer report of a checkpoint; empty where it has none."""
    path = directory / REPORT_NAME
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); delete it, the weights do not need it"
        ) from error
    return report if isinstance(report, Mapping) else {}


def _scores_from(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Scores of one layer from a calibration file.

    Raises:
        FileNotFoundError, ValueError: no plan in the directory, or a calibration that does not fit it.
    """
    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration
    from torchmix.checkpoint import PLAN_NAME

    path = Path(options.directory) / PLAN_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the plan is missing, so the rows' widths cannot be compared with scores"
        )
    plan, calibration = BitPlan.load(path), Calibration.load(options.calibration)
    layer = calibration.layers.get(name)
    summary = score_summary(plan, calibration, name)
    if layer is None or summary is None or layer.fingerprint != plan.layers[name].fingerprint:
        raise ValueError(
            f"{options.calibration} does not hold the {plan.salience} scores of {name} in this model; give the file "
            "that the checkpoint was made from"
        )
    return summary


def _detail_text(detail: Mapping[str, Any]) -> str:
    """One layer."""
    shape, rows = detail["shape"], sum(detail["rows_per_bits"].values())
    pairs = [
        ("layer", detail["name"]),
        ("shape", f"{' x '.join(map(str, shape))}, {rows:,} rows"),
        ("true bits per weight", f"{detail['bits_per_weight']:.4f}"),
    ]
    if "rounding" in detail:
        pairs.append(("rounding", f"{detail['rounding']}, signal to noise {detail['sqnr_db']:.1f} dB"))
    pairs += [("note", note) for note in detail.get("notes", [])]
    return f"{facts(pairs)}\n\n{_width_table(detail, rows)}"


def _width_table(detail: Mapping[str, Any], rows: int) -> str:
    """Rows per width with the scores behind them, if they are known."""
    counts = [[bits, f"{count:,}", f"{count / rows:.1%}"] for bits, count in detail["rows_per_bits"].items()]
    scores = detail.get("scores")
    if not scores:
        return table(["bits", "rows", "share"], counts) + "\nscores: not known here, see --calibration"
    narrowest = scores["narrowest"]
    cells = []
    for row in counts:
        entry = scores["widths"].get(row[0], {})
        cells.append([*row, *_points(entry.get("if_narrowest")), *_points(entry.get("as_planned"))])
    headers = ["bits", "rows", "share", *(f"{word} at {narrowest}" for word in ("min", "median", "max"))]
    headers += [f"{word} now" for word in ("min", "median", "max")]
    note = (
        f"scores ({detail['salience']}, summed over the calibration text; larger costs more): what the rows of a width "
        f"would\ncost at {narrowest} bits, and what they cost at the width they have"
    )
    return f"{table(headers, cells)}\n{note}"


def _points(values: Sequence[float] | None) -> list[str]:
    return ["-"] * 3 if values is None else [f"{value:.3g}" for value in values]
