"""``torchmix quantize``: from a model to a smaller directory that loads like the original."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmix.cli import options as flags
from torchmix.cli.formatting import facts, format_bytes, format_seconds
from torchmix.cli.json_report import STDOUT, check_json_target, write_json_report
from torchmix.cli.layer_report import REPORT_NAME, calibration_origin, layer_report
from torchmix.cli.loading import LoadedModel, restore_dtypes
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
from torchmix.cli.progress import ProgressReporter
from torchmix.cli.quantization import quantize_model
from torchmix.cli.startup import start
from torchmix.cli.tuning import (
    add_tuning,
    check_tuning,
    original_for_tuning,
    tune_model,
    tuning_report,
    tuning_text,
    warn_of_tuning_memory,
)

if TYPE_CHECKING:
    from torchmix.allocation import BitPlan
    from torchmix.config import LayerRecord
    from torchmix.tuning import TuningRecord

DESCRIPTION = """\
Quantize MODEL and write the result to a directory that transformers loads after 'import torchmix'. Calibration runs
the model on the text of --data to find out which rows need more bits, and to round so that errors cancel. The
directory appears when it is complete; before the long work starts, torchmix checks that the size can be reached and
that the result can be written.

Without --data or --calibration rows are ranked by their own rounding errors: quick, and clearly worse.
"""

EXAMPLES = """\
  torchmix quantize MODEL --data notes.txt --bits 4.5 --output small
  torchmix quantize MODEL --data chats.jsonl --widths 4 --output uniform          all rows at 4 bits
  torchmix quantize MODEL --data notes.txt --rows-at-8-bits 0.10 --output paper   the setting of the MixLLM paper
  torchmix quantize MODEL --data notes.txt --bits 4.5 --save-calibration model.calibration --output a
  torchmix quantize MODEL --calibration model.calibration --bits 3.8 --output b    another size, in a fraction of it
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add this command to the parser of all commands."""
    parser = flags.command_parser(
        commands, "quantize", "make a smaller model and write it to a directory", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("model", metavar="MODEL", help=flags.MODEL_HELP)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", required=True, metavar="DIR", help="directory to write, must not exist yet"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the directory if it exists")
    group.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, for example 500MB or 2GiB (default: 5GB)",
    )
    flags.add_budget(parser)
    flags.add_calibration(parser)
    group = parser.add_argument_group("rounding")
    flags.add_rounding(group)
    group.add_argument(
        "--plan",
        metavar="FILE",
        help="width of every row from 'torchmix plan --output FILE', edited or not, instead of a size",
    )
    add_tuning(group)
    flags.add_selection(parser)
    flags.add_machine(parser)
    flags.add_output(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Quantize, write, and say what became of the model."""
    started = time.perf_counter()
    check_flags(options)
    check_tuning(options)
    _check_targets(options)
    start(quiet=options.quiet, progress_bars=not Path(options.model).exists())
    preparation = prepare(options, partial(_check_space, options))
    records, tuning = _quantize(options, preparation)
    report = _save(options, preparation, records, tuning)
    report["seconds"] = time.perf_counter() - started
    if options.json != STDOUT:
        print(_text(options, preparation.plan, report, tuning))
    write_json_report(options.json, report)
    return 0


def _check_targets(options: argparse.Namespace) -> None:
    """Find out what cannot be written while that costs nothing."""
    for target in (options.json, options.save_calibration):
        check_json_target(target)
    output = Path(options.output)
    if output.exists() and Path(options.model).exists() and output.samefile(options.model):
        raise ValueError(f"--output {output} is the model itself; choose another directory")
    if output.is_file():
        raise ValueError(f"--output {output} is a file; give a directory that does not exist yet")
    if output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise ValueError(
            f"--output {output} exists and is not empty; choose another directory, or add --overwrite"
        )


def _check_space(options: argparse.Namespace, loaded: LoadedModel, plan: BitPlan) -> None:
    """Refuse an output directory that cannot take the checkpoint, before the long work."""
    from torchmix.checkpoint import planned_checkpoint_bytes
    from torchmix.checkpoint_files import check_target

    # in the dtype of the arithmetic this is an upper bound of what will be written
    num_bytes = planned_checkpoint_bytes(loaded.model, plan, options.max_shard_size)
    check_target(Path(options.output), options.overwrite, num_bytes)
    warn_of_tuning_memory(options, loaded.model, plan)


def _quantize(
    options: argparse.Namespace, preparation: Preparation
) -> tuple[list[LayerRecord], TuningRecord | None]:
    """Replace the weights by quantized ones, tune them if asked to; returns what became of every layer."""
    model, calibration = preparation.loaded.model, preparation.calibration
    original = original_for_tuning(options, model, calibration)
    with ProgressReporter("rounding", "layers", quiet=options.quiet) as reporter:
        records = quantize_model(model, preparation.plan, calibration, options.rounding, reporter)
    tuning = tune_model(options, model, original, calibration)
    restore_dtypes(model, preparation.loaded.dtypes)
    return records, tuning


def _save(
    options: argparse.Namespace,
    preparation: Preparation,
    records: list[LayerRecord],
    tuning: TuningRecord | None,
) -> dict[str, Any]:
    """Write the directory; returns the JSON report."""
    from torchmix.checkpoint import save_pretrained
    from torchmix.forecast import peak_device_bytes, peak_resident_bytes

    loaded, plan = preparation.loaded, preparation.plan
    info = save_pretrained(
        loaded.model,
        options.output,
        plan=plan,
        source=loaded.directory,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
        card=_card(options, preparation, records, tuning),
    )
    layers = {**layer_report(plan, preparation.calibration, records), "tuning": tuning_report(tuning)}
    write_json_report(str(Path(options.output) / REPORT_NAME), layers)
    return {
        "model": options.model,
        "output": str(options.output),
        **plan_report(plan),
        "checkpoint_bytes": info.checkpoint_bytes,
        "original_bytes": loaded.original_bytes,
        "peak_host_bytes": peak_resident_bytes(),
        "peak_device_bytes": peak_device_bytes(options.device),
        "predicted_peak_host_bytes": preparation.forecast.peak_host_bytes,
        "rounding": sorted({record.method for record in records}),
        "notes": [f"{record.name}: {note}" for record in records for note in record.notes],
        "calibration": layers["calibration"],
        "tuning": layers["tuning"],
    }


def _card(
    options: argparse.Namespace,
    preparation: Preparation,
    records: list[LayerRecord],
    tuning: TuningRecord | None,
) -> str:
    """The model card: what was measured, and the command that made it."""
    from torchmix.checkpoint import planned_checkpoint_bytes
    from torchmix.checkpoint_format import FORMAT_VERSION, producer_name
    from torchmix.model_card import model_card

    plan, calibration = preparation.plan, preparation.calibration
    info = {
        **plan_report(plan),
        "checkpoint_bytes": planned_checkpoint_bytes(preparation.loaded.model, plan, options.max_shard_size),
        "activation_group": "group",
        "producer": producer_name(),
        "format_version": FORMAT_VERSION,
    }
    origin = calibration_origin(calibration)
    details = {
        "original model": options.model if not os.path.isabs(options.model) else Path(options.model).name,
        "predicted KL divergence": kl_text(plan.predicted_kl),
        "calibration": f"{calibration_text(calibration)}; sha256 of the tokens `{origin['sha256'] or '-'}`",
        "rows ranked by": plan.salience,
        "rounded with": ", ".join(sorted({record.method for record in records})),
        **({} if tuning is None else {"tuned": tuning_text(tuning)}),
        "made with": f"`{_command(options)}`",
    }
    return model_card(info, Path(options.output).name, details)


def _command(options: argparse.Namespace) -> str:
    """The command line, with file names only where paths were absolute."""
    words = sys.argv[1:] if sys.argv and Path(sys.argv[0]).name in ("torchmix", "__main__.py") else []
    names = [Path(word).name if os.path.isabs(word) else word for word in words]
    return shlex.join(["torchmix", *(names or ["quantize", options.model])])


def _text(
    options: argparse.Namespace, plan: BitPlan, report: dict[str, Any], tuning: TuningRecord | None
) -> str:
    """What is printed."""
    lines = plan_lines(plan)
    pairs = [
        ("size on disk", size_text(report["checkpoint_bytes"], report["original_bytes"])),
        ("true bits per weight", f"{plan.bits_per_weight:.4f}, everything stored for these layers counted"),
        ("quantized", coverage_line(lines, plan.coverage)),
        ("rounded with", ", ".join(report["rounding"])),
        *([] if tuning is None else [("tuned", tuning_text(tuning))]),
        ("predicted KL divergence", kl_text(plan.predicted_kl)),
        ("peak memory", format_bytes(report["peak_host_bytes"])),
        ("this took", format_seconds(report["seconds"])),
    ]
    notes = [f"note: {note}" for note in report["notes"]]
    excluded = [(entry.name, entry.reason) for entry in plan.excluded]
    name = shlex.quote(str(options.output))
    parts = [
        layer_table(lines),
        excluded_text(excluded),
        facts(pairs),
        *(["\n".join(notes)] if notes else []),
        f"written to {options.output}; next:\n"
        f"  torchmix evaluate {name} --data TEXT --reference {shlex.quote(options.model)}\n"
        f"  torchmix inspect {name}",
    ]
    return "\n\n".join(parts)
