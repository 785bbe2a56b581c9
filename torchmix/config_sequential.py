"""Sequential rounding of a plan (L6): whether the original model can be run, and running it.

Shapes: S samples of L tokens.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from torch import nn

from torchmix.allocation import BitPlan
from torchmix.calibration import Calibration
from torchmix.capture import NotReplayableError
from torchmix.rounding import RoundedWeight
from torchmix.selection import select_parameters, weight_fingerprint
from torchmix.sequential import Progress, SequentialRounding, round_sequentially
from torchmix.tensor import PackedTensor

logger = logging.getLogger(__name__)


def original_model(
    calibration: Calibration, plan: BitPlan | None, model: nn.Module | None
) -> tuple[Callable[[], nn.Module | None] | None, str]:
    """Weak reference to the model that sequential rounding can run, or None and the reason."""
    if calibration.samples is None:
        return None, "the calibration holds no tokens"
    if model is None:
        return None, "the model is not known"
    parameters = dict(model.named_parameters())
    for name, layer in plan.layers.items() if plan is not None else ():
        weight = parameters.get(name)
        if weight is None or isinstance(weight, PackedTensor):
            return None, f"{name} of the model is {'missing' if weight is None else 'quantized already'}"
        if weight_fingerprint(weight) != layer.fingerprint:
            return None, f"{name} of the model has other weights than those that were measured"
    return weakref.ref(model), ""


def round_plan_sequentially(
    model: nn.Module | None,
    plan: BitPlan,
    calibration: Calibration,
    settings: SequentialRounding,
    progress: Progress,
) -> dict[str, RoundedWeight] | None:
    """All layers of a plan that sequential rounding handles, by name; None where the model is no chain of blocks.

    Raises:
        ValueError: the model no longer exists.
    """
    if model is None or calibration.samples is None:
        raise ValueError(
            "rounding='sequential' runs the original model, which no longer exists; keep it, or choose rounding='gptq'"
        )
    targets = select_parameters(model, include=list(plan.layers)).targets
    widths = {name: layer.row_bits for name, layer in plan.layers.items()}
    weights = calibration.weights_by_layer()
    try:
        return round_sequentially(model, targets, widths, calibration.samples, settings, weights, progress)
    except NotReplayableError as error:
        logger.warning(
            "%s cannot be rounded in sequence (%s): rounded with one-shot GPTQ", type(model).__name__, error
        )
        return None
