"""From flags to a model, a calibration and a plan: what ``plan`` and ``quantize`` have in common."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmix.cli.budget import has_size, plan_for, scored_widths
from torchmix.cli.formatting import format_bytes
from torchmix.cli.loading import LoadedModel, load_model_for
from torchmix.cli.options import DEFAULT_GROUP_SIZE, PAPER_WIDTHS, SALIENCE_NAMES, WITH_HESSIANS
from torchmix.cli.progress import ProgressReporter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration
    from torchmix.forecast import MemoryForecast

logger = logging.getLogger(__name__)
PYTHON_DOCS = "python-docs"


@dataclass
class Preparation:
    """What was measured and decided before anything is quantized.

    calibration is None where a plan came from a file and there is no text.
    """

    loaded: LoadedModel
    calibration: Calibration | None
    plan: BitPlan
    forecast: MemoryForecast


def prepare(
    options: argparse.Namespace, check: Callable[[LoadedModel, BitPlan], None] | None = None
) -> Preparation:
    """Load the model, check that the size can be reached, forecast the memory, then measure and plan.

    Args:
        options: flags of ``plan`` or ``quantize``.
        check: called before the long work with a plan that is as large as the final one; raises what is wrong.

    Raises:
        ValueError, TypeError, OSError: whatever makes the rest pointless.
    """
    check_data_file(options.data)
    loaded = load_model_for(options)
    given = plan_from_file(options, loaded)
    calibration = None if options.calibration is None else read_calibration(options, loaded)
    if given is not None:
        expected = given
    elif calibration is not None:
        expected = make_plan(options, calibration)
    else:
        expected = provisional_plan(options, loaded)
    if check is not None:
        check(loaded, expected)
    forecast = forecast_for(options, loaded, expected)
    warn_of_memory(forecast)
    if calibration is None and (given is None or options.data is not None):
        calibration = measure(options, loaded, expected)
    if given is None:
        assert calibration is not None, "without a plan from a file there is always a calibration"
        expected = make_plan(options, calibration)
    return Preparation(loaded, calibration, expected, forecast)


def check_flags(options: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything is loaded.

    Raises:
        ValueError: names the flags and the way out.
    """
    plan_file = getattr(options, "plan", None)
    sizes = {
        "--bits": options.bits,
        "--rows-at-8-bits": options.rows_at_8_bits,
        "--plan": plan_file,
    }
    given = [flag for flag, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} both set the size; give one of them")
    if not has_size(options) and not getattr(options, "curve", False):
        raise ValueError(
            "how small? Give --bits 4.5, or --rows-at-8-bits 0.10, or one width such as --widths 4"
        )
    if options.rows_at_8_bits is not None and options.widths not in (None, PAPER_WIDTHS):
        raise ValueError(
            "--rows-at-8-bits uses the widths 4 and 8; leave out --widths, or give --bits instead"
        )
    if plan_file is not None and options.widths is not None:
        raise ValueError("--plan holds the width of every row already; leave out --widths")
    fixed_rows = "--rows-at-8-bits" if options.rows_at_8_bits is not None else "--plan" if plan_file else ""
    if fixed_rows and (options.row_multiple, options.tensor_parallel) != (1, 1):
        raise ValueError(
            f"{fixed_rows} says which rows get which width; leave out --row-multiple and --tensor-parallel"
        )
    if options.data is not None and options.calibration is not None:
        raise ValueError("--data and --calibration both say how to rank rows; give one of them")
    if options.save_calibration is not None and options.data is None:
        raise ValueError("--save-calibration keeps what is measured on a text; give the text with --data")
    if options.salience is not None and options.data is None and options.calibration is None:
        raise ValueError(
            f"--salience {options.salience} ranks rows with the help of a text; give one with --data"
        )
    if options.calibration is not None and (options.include or options.exclude):
        raise ValueError(
            "the calibration file says which layers are quantized; leave out --include and --exclude, or measure again "
            "with --data"
        )


def check_data_file(data: str | None) -> None:
    """Refuse the name of a file that does not exist before a model is loaded.

    Raises:
        FileNotFoundError: what looks like a path is none.
    """
    from torchmix.data import FILE_SUFFIXES

    if data is None or Path(data).expanduser().exists():
        return
    if Path(data).suffix.lower() in FILE_SUFFIXES or data.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"--data {data}: no such file; give the path of a text")


def text_of(data: str, half: str) -> str:
    """What ``--data`` names: Python's documentation as text, or the name itself for the reader of texts.

    Args:
        data: value of the flag.
        half: "calibration" or "evaluation", the half of Python's documentation to use.
    """
    if data != PYTHON_DOCS or Path(data).exists():
        return data
    from torchmix.demo import demo_texts

    return str(getattr(demo_texts(), half))


def provisional_plan(options: argparse.Namespace, loaded: LoadedModel) -> BitPlan:
    """The plan's size and layers before anything is measured; fails where the real plan would.

    Raises:
        ValueError, TypeError: an infeasible budget, a pattern that matches nothing, unusable weights.
    """
    from torchmix.forecast import provisional_calibration, without_predictions

    calibration = provisional_calibration(
        loaded.model,
        widths=scored_widths(options),
        group_size=options.group_size or DEFAULT_GROUP_SIZE,
        include=options.include,
        exclude=options.exclude,
    )
    return without_predictions(plan_for(options, calibration))


def plan_from_file(options: argparse.Namespace, loaded: LoadedModel) -> BitPlan | None:
    """The plan of ``--plan``, checked against the model; None without that flag.

    Raises:
        FileNotFoundError, ValueError: no such file, not a plan, or the plan of another model.
    """
    from torchmix.allocation import BitPlan
    from torchmix.selection import weight_fingerprint

    if getattr(options, "plan", None) is None:
        return None
    plan = BitPlan.load(options.plan)
    parameters = dict(loaded.model.named_parameters())
    for name, layer in plan.layers.items():
        weight = parameters.get(name)
        if weight is None or weight_fingerprint(weight) != layer.fingerprint:
            raise ValueError(
                f"{options.plan}: {name} of {loaded.name} {_difference(weight)}; make a plan of this model"
            )
    return plan


def forecast_for(options: argparse.Namespace, loaded: LoadedModel, plan: BitPlan) -> MemoryForecast:
    """Peak memory of what the flags ask for."""
    from torchmix.forecast import forecast_memory

    return forecast_memory(
        loaded.model,
        sequence_length=sequence_length_of(options, loaded.model) if options.data is not None else None,
        num_samples=options.samples,
        num_widths=len(scored_widths(options)),
        hessians=options.rounding in WITH_HESSIANS,
        include=list(plan.layers),
    )


def sequence_length_of(options: argparse.Namespace, model: nn.Module) -> int:
    """Tokens per calibration sample: the flag's, else 2048 or the model's context where that is less."""
    from torchmix.workflow import DEFAULT_SEQUENCE_LENGTH

    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return options.sequence_length or min(DEFAULT_SEQUENCE_LENGTH, context or DEFAULT_SEQUENCE_LENGTH)


def warn_of_memory(forecast: MemoryForecast) -> None:
    """Say so where the forecast is beyond what the machine has free."""
    from torchmix.forecast import available_bytes, resident_bytes

    available = available_bytes()
    needed = forecast.peak_host_bytes - resident_bytes()
    if available is not None and needed > available:
        logger.warning(
            "about %s more memory will be needed and %s are free; use a shorter --sequence-length or --dtype bfloat16, "
            "or expect the system to end this process",
            format_bytes(needed),
            format_bytes(available),
        )


def keeps_hessians(options: argparse.Namespace) -> bool:
    """Whether the rounding, or a later use of the calibration file, needs Hessians.

    Also where nothing is rounded: a plan ranks rows by the errors of the rounding that ``quantize`` would use.
    """
    return options.rounding in WITH_HESSIANS or options.save_calibration is not None


def measure(options: argparse.Namespace, loaded: LoadedModel, plan: BitPlan) -> Calibration:
    """Calibrate on the text, or on the weights alone where there is no text.

    Args:
        options: flags.
        loaded: the model.
        plan: names the layers; from a file or provisional.
    """
    from torchmix.huggingface import load_tokenizer
    from torchmix.workflow import calibrate

    from_file = getattr(options, "plan", None) is not None
    common: dict[str, Any] = {
        "widths": plan.widths if from_file else scored_widths(options),
        "group_size": plan.group_size,
        "include": list(plan.layers) if from_file else options.include,
        "exclude": () if from_file else options.exclude,
    }
    if options.data is None:
        return calibrate(loaded.model, None, **common)
    data = text_of(options.data, "calibration")
    with ProgressReporter("calibrating", "steps", quiet=options.quiet) as reporter:
        calibration = calibrate(
            loaded.model,
            data if data is options.data else [data],
            tokenizer=load_tokenizer(options.model),
            num_samples=options.samples,
            sequence_length=options.sequence_length,
            salience=salience_for(options, plan),
            hessians=keeps_hessians(options),
            seed=options.seed,
            progress=reporter,
            **common,
        )
    if data is not options.data:
        source = calibration.source.replace("list of 1", PYTHON_DOCS)
        calibration = replace(calibration, source=source)
    if options.save_calibration is not None:
        calibration.save(options.save_calibration)
    return calibration


def salience_for(options: argparse.Namespace, plan: BitPlan) -> str:
    """The metric to measure: a flag's, that of the plan's file, the paper's for its setting, else ours."""
    if options.salience is None and getattr(options, "plan", None) and plan.salience in SALIENCE_NAMES:
        return plan.salience
    return options.salience or ("mixllm" if options.rows_at_8_bits is not None else "fisher_token")


def make_plan(options: argparse.Namespace, calibration: Calibration) -> BitPlan:
    """The plan for the size that the flags ask for."""
    metric = options.salience
    if metric is None and options.rows_at_8_bits is not None and "mixllm" in calibration.salience:
        metric = "mixllm"
    return plan_for(options, calibration, metric)


def read_calibration(options: argparse.Namespace, loaded: LoadedModel) -> Calibration:
    """The file of ``--calibration``, refused where it contradicts the flags or the model.

    Raises:
        FileNotFoundError, ValueError: no such file, another group size, or another model; names what differs.
    """
    from torchmix.calibration import Calibration
    from torchmix.selection import weight_fingerprint

    calibration = Calibration.load(options.calibration)
    if options.group_size not in (None, calibration.group_size):
        raise ValueError(
            f"{options.calibration} was measured with --group-size {calibration.group_size}, not {options.group_size}; "
            "leave out --group-size, or measure again with --data"
        )
    parameters = dict(loaded.model.named_parameters())
    for name, layer in calibration.layers.items():
        weight = parameters.get(name)
        if weight is None or weight_fingerprint(weight) != layer.fingerprint:
            raise ValueError(
                f"{options.calibration}: {name} of {loaded.name} {_difference(weight)}; measure this model with --data"
            )
    return calibration


def _difference(weight: torch.Tensor | None) -> str:
    return "does not exist" if weight is None else "has other values than the model that was measured"


def calibration_text(calibration: Calibration | None) -> str:
    """Where the scores come from, in one line."""
    if calibration is None:
        return "no calibration"
    if not calibration.tokens:
        return calibration.source
    measured = calibration.tokens if calibration.samples is None else calibration.samples.numel()
    return f"{measured:,} tokens of {calibration.source}"
