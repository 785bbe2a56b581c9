"""``plan --curve``: predicted and measured quality over the size, as rows of a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmix.cli.budget import budget_arguments, has_size
from torchmix.cli.formatting import format_bytes, format_number, table
from torchmix.cli.measurement import Measurement
from torchmix.cli.progress import ProgressReporter

if TYPE_CHECKING:
    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration

_ONLY_WITH_CURVE = ("curve_from", "curve_to", "points", "plot")


@dataclass(frozen=True)
class CurvePoint:
    """One size: its plan, the size on disk in bytes, and what was measured, if anything."""

    plan: BitPlan
    checkpoint_bytes: int
    measurement: Measurement | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted KL divergence; None where one of them is not known."""
        predicted = self.plan.predicted_kl
        return self.measurement.kl / predicted if self.measurement is not None and predicted else None

    def to_dict(self) -> dict[str, Any]:
        """The contract's keys."""
        found = self.measurement
        return {
            "bits_per_weight": self.plan.bits_per_weight,
            "checkpoint_bytes": self.checkpoint_bytes,
            "predicted_kl": self.plan.predicted_kl,
            "measured_kl": None if found is None else found.kl,
            "measured_perplexity": None if found is None else found.perplexity,
            "ratio": self.ratio,
        }


def check_curve_flags(options: argparse.Namespace) -> None:
    """Refuse flags of ``plan`` that contradict each other, and a plot that cannot be drawn, before the work.

    Raises:
        ValueError: names the flags and the way out.
    """
    if options.measure_tokens is not None and options.measure is None:
        raise ValueError("--measure-tokens cuts the text of --measure; give one, or leave it out")
    if not options.curve:
        given = [name for name in _ONLY_WITH_CURVE if getattr(options, name) is not None]
        if given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} belongs to a curve; add --curve, or leave it out"
            )
        return
    if options.rows_at_8_bits is not None or (options.widths is not None and len(options.widths) == 1):
        raise ValueError(
            "--curve goes over budgets in bits and needs widths to choose among; leave out --rows-at-8-bits, and give "
            "two or more --widths or none"
        )
    if options.output is not None and not has_size(options):
        raise ValueError("--output writes the plan of one size; add --bits 4.5, or leave it out")
    if options.points is not None and options.points < 2:
        raise ValueError(f"--points {options.points}: a curve has at least 2 points, its ends")
    if options.plot is not None:
        _check_plot(options)


def _check_plot(options: argparse.Namespace) -> None:
    from torchmix.plots import FORMATS, check_matplotlib

    if Path(options.plot).suffix.lower() not in FORMATS:
        raise ValueError(f"--plot {options.plot}: the name must end in one of {', '.join(FORMATS)}")
    if options.data is None and options.calibration is None and options.measure is None:
        raise ValueError("--plot has nothing to draw: KL divergence needs --data, --calibration or --measure")
    try:
        check_matplotlib()
    except ImportError as error:
        raise ValueError(f"--plot {options.plot}: {error}") from error


def curve_plans(
    options: argparse.Namespace, calibration: Calibration, budgets: Sequence[float], salience: str
) -> list[BitPlan]:
    """One plan per budget in true bits per weight, all from one calibration."""
    arguments = budget_arguments(options)
    plans = []
    with ProgressReporter("planning", "sizes", quiet=options.quiet) as reporter:
        for budget in budgets:
            plans.append(calibration.plan(**{**arguments, "bits": budget}, salience=salience))
            reporter(len(plans), len(budgets))
    return plans


def curve_table(points: Sequence[CurvePoint]) -> str:
    """The curve, one size a line; columns that hold nothing are left out."""
    measured = any(point.measurement is not None for point in points)
    headers = ["bits per weight", "size on disk", "predicted KL"]
    headers += ["measured KL", "measured / predicted", "perplexity"] if measured else []
    rows = []
    for point in points:
        cells = [
            f"{point.plan.bits_per_weight:.4f}",
            format_bytes(point.checkpoint_bytes),
            format_number(point.plan.predicted_kl, 5),
        ]
        if point.measurement is not None:
            cells += [
                format_number(point.measurement.kl, 5),
                format_number(point.ratio, 2),
                format_number(point.measurement.perplexity, 4),
            ]
        rows.append(cells)
    return table(headers, rows, left=0)


def measured_text(point: CurvePoint) -> str:
    """The measured divergence, and how far it is from the predicted one."""
    assert point.measurement is not None, "called for measured sizes only"
    text = f"{point.measurement.kl:.3g} nats per token on {point.measurement.tokens:,} tokens"
    if point.ratio is None:
        return text
    return f"{text}; {point.ratio:.2f} times the prediction ({point.ratio - 1:+.0%})"


def write_plot(path: str, points: Sequence[CurvePoint], model: str) -> None:
    """Draw the curve into a file, which appears when it is complete."""
    from torchmix.plots import quality_curve, write_figure

    write_figure(quality_curve([point.to_dict() for point in points], Path(model).name), path)
