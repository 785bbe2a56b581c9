"""Quantizing the model of a command: ``quantize`` writes the result, ``plan --measure`` only looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration
    from torchmix.cli.progress import ProgressReporter
    from torchmix.config import LayerRecord


def quantize_model(
    model: nn.Module,
    plan: BitPlan,
    calibration: Calibration | None,
    rounding: str | None,
    progress: ProgressReporter,
) -> list[LayerRecord]:
    """Replace the planned weights of ``model`` by quantized ones.

    Args:
        model: in the dtype of the arithmetic; changed in place.
        plan: width of every row.
        calibration: its Hessians and tokens are used where it holds any.
        rounding: value of ``--rounding``, None for the library's choice.
        progress: told how many layers are done.

    Returns:
        what became of every layer.

    Raises:
        ValueError, TypeError: as :func:`torchmix.mixllm_config` and torchao's ``quantize_``.
    """
    from torchao.quantization import quantize_

    from torchmix.config import mixllm_config

    measured = calibration if calibration is not None and calibration.hessians else None
    config = mixllm_config(plan, measured, model=model, rounding=rounding, progress=progress)
    quantize_(model, config)
    return config.records
