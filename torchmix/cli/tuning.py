"""``--tune`` of ``torchmix quantize``: train the quantized model towards the original before it is written."""

from __future__ import annotations

import argparse
import copy
import logging
from typing import TYPE_CHECKING, Any

from torchmix.cli.formatting import format_bytes
from torchmix.cli.options import positive
from torchmix.cli.progress import ProgressReporter

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration
    from torchmix.tuning import TuningRecord

logger = logging.getLogger(__name__)
BATCH_SIZE = 8  # of torchmix.tune


def steps(text: str) -> int:
    """A whole number from 0 up."""
    return 0 if text.strip() == "0" else positive(text)


def add_tuning(group: argparse._ArgumentGroup) -> None:
    """Whether the result is trained after rounding, and for how long."""
    group.add_argument(
        "--tune",
        type=steps,
        default=0,
        metavar="STEPS",
        help="afterwards train codes, scales and norms towards the original model for so many steps (300 is a good "
        "number) on the text of --data, more of it than calibration takes, or on the samples of --calibration; size "
        "and format stay. A step takes 8 samples forward through the original, forward and backward through the model; "
        "and memory: the original is kept, beside 16 to 20 bytes per quantized weight (default: 0, off)",
    )


def check_tuning(options: argparse.Namespace) -> None:
    """Refuse ``--tune`` without samples before anything is loaded.

    Raises:
        ValueError: neither ``--data`` nor ``--calibration``.
    """
    if options.tune and options.data is None and options.calibration is None:
        raise ValueError(f"--tune {options.tune} trains on samples of a text; give one with --data")


def warn_of_tuning_memory(options: argparse.Namespace, model: nn.Module, plan: BitPlan) -> None:
    """Say so where the second model and the training are beyond what the machine has free."""
    from torchmix.forecast import available_bytes
    from torchmix.tuning import tuning_bytes

    weights = list(model.parameters())
    available = available_bytes()
    if not options.tune or available is None or any(weight.device.type != "cpu" for weight in weights):
        return
    original = sum(weight.numel() * weight.element_size() for weight in weights)
    needed = original + tuning_bytes(plan.quantized_weights, weights[0].dtype)
    if needed > available:
        logger.warning(
            "--tune needs about %s for a second model and what is trained, activations not counted, and %s are free; "
            "expect the system to end this process",
            format_bytes(needed),
            format_bytes(available),
        )


def original_for_tuning(
    options: argparse.Namespace, model: nn.Module, calibration: Calibration | None
) -> nn.Module | None:
    """A copy of the model, to be made before it is quantized; None without ``--tune``.

    Raises:
        ValueError: the calibration holds no samples to train on.
    """
    if not options.tune:
        return None
    if calibration is None or calibration.samples is None:
        raise ValueError(
            f"--tune {options.tune}: the calibration holds no samples to train on; measure again with --data"
        )
    return copy.deepcopy(model)


def tune_model(
    options: argparse.Namespace, model: nn.Module, original: nn.Module | None, calibration: Calibration | None
) -> TuningRecord | None:
    """Train the quantized model where there is an original; says what was gained."""
    from torchmix.tuning import tune

    if original is None or calibration is None or calibration.samples is None:
        return None
    with ProgressReporter("tuning", "steps", quiet=options.quiet) as reporter:
        return tune(
            model,
            original,
            steps=options.tune,
            seed=options.seed,
            progress=reporter,
            **tuning_text_arguments(options, calibration.samples),
        )


def tuning_text_arguments(options: argparse.Namespace, samples: Tensor) -> dict[str, Any]:
    """What to train on: the text of ``--data`` up to one new sample per place in a batch, else the samples (S, L)."""
    if options.data is None:
        return {"data": samples}
    from torchmix.cli.preparation import text_of
    from torchmix.huggingface import load_tokenizer

    data = text_of(options.data, "calibration")
    return {
        "data": data if data is options.data else [data],
        "tokenizer": load_tokenizer(options.model),
        "num_samples": max(len(samples), options.tune * BATCH_SIZE),
        "sequence_length": samples.shape[1],
    }


def tuning_report(record: TuningRecord | None) -> dict[str, Any] | None:
    """JSON values; None without tuning."""
    return None if record is None else record.to_dict()


def tuning_text(record: TuningRecord) -> str:
    """What tuning did, in one line."""
    result = f"KL divergence {record.kl_before:.5f} -> {record.kl_after:.5f} nats per token"
    where = f"on {record.held_back} of {record.samples + record.held_back} samples, which were held back"
    kept = "" if record.kept else "; not kept, the model is as rounding left it"
    return f"{record.steps} steps; {result} {where}{kept}"
