"""How long ``torchmix quantize`` would take with the flags of ``torchmix plan``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from torchmix.cli.preparation import Preparation, sequence_length_of


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds, about: of calibration (0 where the flags ask for none) and rounding; of both if there were a text.

    with_data is None where there is a text or a calibration.
    """

    calibration: float
    rounding: float
    with_data: float | None = None
    data: str = ""

    @property
    def seconds(self) -> float:
        """What quantizing with these flags takes."""
        return self.calibration + self.rounding

    def text(self) -> str:
        """One line."""
        if self.with_data is not None:
            more = f"about {rough_time(self.with_data)} with --data ({self.data})"
            return f"about {rough_time(self.seconds)} without calibration, {more}"
        if self.calibration:
            return f"about {rough_time(self.seconds)}, {rough_time(self.calibration)} of it calibration"
        return f"about {rough_time(self.seconds)} with this calibration"


def rough_time(seconds: float) -> str:
    """A duration without digits that an estimate does not have: "7 s", "4 minutes", "2.5 hours"."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    if seconds < 99.5 * 60:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"


def estimate_time(options: argparse.Namespace, preparation: Preparation) -> TimeEstimate:
    """Time the machine briefly and count the work.

    Args:
        options: flags of ``plan``.
        preparation: model, plan and calibration.
    """
    from torchmix.forecast_time import forecast_time, measure_speed
    from torchmix.scoring_blocks import choose_scored

    model, plan, calibration = preparation.loaded.model, preparation.plan, preparation.calibration
    speed = measure_speed(options.device, plan.group_size)
    widths = len(calibration.widths) if calibration is not None else len(plan.widths)
    if calibration is not None and calibration.samples is not None:
        found = forecast_time(
            model,
            plan,
            speed,
            tokens=calibration.samples.numel(),
            scored_tokens=calibration.tokens,
            num_widths=widths,
            rounding=options.rounding,
            calibrated=options.data is None,
        )
        return TimeEstimate(found.calibration, found.rounding)
    bare = forecast_time(
        model, plan, speed, tokens=0, scored_tokens=0, num_widths=widths, rounding=options.rounding
    )
    length = sequence_length_of(options, model)
    full = forecast_time(
        model,
        plan,
        speed,
        tokens=options.samples * length,
        scored_tokens=len(choose_scored(options.samples, None)) * length,
        num_widths=widths,
        rounding=options.rounding,
    )
    data = f"{options.samples} samples of {length} tokens"
    return TimeEstimate(bare.calibration, bare.rounding, full.total, data)
