"""How small the model becomes: flags of the size as arguments of ``Calibration.plan``, and what sizes there are."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torchmix.cli.options import DEFAULT_POINTS, DEFAULT_WIDTHS, PAPER_WIDTHS

if TYPE_CHECKING:
    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration

_DECIMALS = 4  # of a budget that was not written by the user


def has_size(options: argparse.Namespace) -> bool:
    """Whether the flags ask for one size; without one, ``plan --curve`` is the only thing to do."""
    single = options.widths is not None and len(options.widths) == 1
    sizes = (options.bits, options.rows_at_8_bits, getattr(options, "plan", None))
    return single or any(size is not None for size in sizes)


def scored_widths(options: argparse.Namespace) -> tuple[int, ...]:
    """The widths that calibration has to score."""
    if options.rows_at_8_bits is not None:
        return PAPER_WIDTHS
    return options.widths or DEFAULT_WIDTHS


def budget_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The flags of the size as arguments of ``Calibration.plan``."""
    if options.rows_at_8_bits is not None:
        return {"rows_at_8_bits": options.rows_at_8_bits}
    return {"bits": options.bits, "widths": options.widths, **_row_rules(options)}


def _row_rules(options: argparse.Namespace) -> dict[str, int]:
    return {"row_multiple": options.row_multiple, "tensor_parallel": options.tensor_parallel}


def plan_for(options: argparse.Namespace, calibration: Calibration, salience: str | None = None) -> BitPlan:
    """The plan for the size that the flags ask for; for a curve without a size the smallest there is.

    Raises:
        ValueError: as ``Calibration.plan``.
    """
    if has_size(options):
        return calibration.plan(**budget_arguments(options), salience=salience)
    widths = options.widths or calibration.widths
    narrowest = calibration.plan(widths=(min(widths),), salience=salience)
    smallest, _ = feasible_range(narrowest, widths)
    arguments = {**budget_arguments(options), "bits": smallest}
    return calibration.plan(**arguments, salience=salience)


def feasible_range(plan: BitPlan, widths: Sequence[int]) -> tuple[float, float]:
    """True bits per weight with every row at the narrowest and at the widest of ``widths``, to four decimals inwards.

    Args:
        plan: names the layers and the group size; its own widths do not matter.
        widths: to choose from.
    """
    from torchmix.accounting import width_costs

    ends = (min(widths), max(widths))
    weights = sum(layer.num_weights for layer in plan.layers.values())
    least = most = 0
    for layer in plan.layers.values():
        low, high = width_costs(layer.in_features, ends, plan.group_size)
        least, most = least + layer.row_bits.numel() * low, most + layer.row_bits.numel() * high
    scale = 10**_DECIMALS
    return math.ceil(least * scale / weights) / scale, math.floor(most * scale / weights) / scale


def curve_budgets(options: argparse.Namespace, plan: BitPlan) -> list[float]:
    """Evenly spaced budgets of ``--curve``, rising.

    Args:
        options: flags; ``--curve-from`` and ``--curve-to`` narrow the feasible range, ``--points`` counts.
        plan: a plan of the layers in question with the widths in question.

    Raises:
        ValueError: an end lies outside the feasible range, which the message gives.
    """
    low, high = feasible_range(plan, plan.widths)
    ends = []
    for flag, value, default in (("from", options.curve_from, low), ("to", options.curve_to, high)):
        if value is not None and not low <= value <= high:
            raise ValueError(
                f"--curve-{flag} {value:g} is outside the feasible range {low} to {high} bits per weight of the widths "
                f"{','.join(map(str, plan.widths))} (scales and all metadata included)"
            )
        ends.append(default if value is None else value)
    if ends[0] >= ends[1]:
        raise ValueError(f"a curve from {ends[0]:g} to {ends[1]:g} bits has no length; give rising ends")
    steps = (options.points or DEFAULT_POINTS) - 1
    inner = (ends[0] + (ends[1] - ends[0]) * step / steps for step in range(1, steps))
    return [ends[0], *(round(bits, _DECIMALS) for bits in inner), ends[1]]
