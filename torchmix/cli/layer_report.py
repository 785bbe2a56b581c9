"""``torchmix_report.json``: why each layer of a checkpoint has the widths it has, and how it was rounded.

Written beside the plan by ``torchmix quantize`` and read by ``torchmix inspect --layer``. It holds a summary of the
scores, not the scores; those are in the calibration file, if that was kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from torchmix.allocation import BitPlan
    from torchmix.calibration import Calibration
    from torchmix.config import LayerRecord

REPORT_NAME = "torchmix_report.json"
FORMAT_VERSION = 1


def layer_report(
    plan: BitPlan, calibration: Calibration | None, records: Iterable[LayerRecord] = ()
) -> dict[str, Any]:
    """JSON values for the whole checkpoint.

    Keys of a layer: ``rounding``, ``sqnr_db``, ``notes``, ``seconds`` as rounding recorded them, and ``scores`` as
    :func:`score_summary` gives them (None where the plan's scores are not in the calibration).
    """
    by_name = {record.name: record for record in records}
    layers: dict[str, Any] = {}
    for name in plan.layers:
        entry: dict[str, Any] = {}
        if name in by_name:
            record = by_name[name]
            entry = {
                "rounding": record.method,
                "sqnr_db": record.sqnr_db,
                "notes": list(record.notes),
                "seconds": record.seconds,
            }
        layers[name] = {**entry, "scores": score_summary(plan, calibration, name)}
    return {
        "kind": "torchmix.LayerReport",
        "format_version": FORMAT_VERSION,
        "salience": plan.salience,
        "calibration": calibration_origin(calibration),
        "layers": layers,
    }


def calibration_origin(calibration: Calibration | None) -> dict[str, Any]:
    """Where scores and Hessians come from: ``source``, ``tokens``, ``sha256`` of the tokens."""
    if calibration is None:
        return {"source": "no calibration", "tokens": 0, "sha256": ""}
    return {
        "source": calibration.source,
        "tokens": calibration.tokens if calibration.samples is None else calibration.samples.numel(),
        "sha256": calibration.data_sha256,
    }


def score_summary(plan: BitPlan, calibration: Calibration | None, name: str) -> dict[str, Any] | None:
    """The scores behind one layer's widths.

    Returns:
        ``narrowest``: the smallest width that was scored, W; ``widths``: for every width that rows of the layer have,
        ``rows``, ``if_narrowest`` and ``as_planned``: [smallest, median, largest] score of these rows at W bits and
        at the width they got. Larger scores cost more. None where these scores were not measured.
    """
    if calibration is None or plan.salience not in calibration.salience or name not in calibration.layers:
        return None
    scores = calibration.layers[name].scores[plan.salience].flatten(0, -2)
    row_bits = plan.layers[name].row_bits.flatten()
    widths: dict[str, Any] = {}
    for bits, rows in plan.rows_per_bits(name).items():
        chosen = scores[row_bits == bits]
        planned = chosen[:, calibration.widths.index(bits)] if bits in calibration.widths else None
        widths[str(bits)] = {
            "rows": rows,
            "if_narrowest": _three_points(chosen[:, 0]),
            "as_planned": None if planned is None else _three_points(planned),
        }
    return {"narrowest": calibration.widths[0], "widths": widths}


def _three_points(values: Tensor) -> list[float]:
    """Smallest, median and largest of float64 (rows,)."""
    ordered = values.sort().values
    return [float(ordered[0]), float(ordered[len(ordered) // 2]), float(ordered[-1])]


def layer_entry(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a report holds on one layer; empty where it holds nothing."""
    layers = report.get("layers")
    entry = layers.get(name) if isinstance(layers, Mapping) else None
    return dict(entry) if isinstance(entry, Mapping) else {}
