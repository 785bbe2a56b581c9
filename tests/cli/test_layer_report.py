"""The scores behind the widths, summarized without loss of what explains them."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from torchmix.calibration import Calibration
from torchmix.cli.layer_report import calibration_origin, layer_entry, layer_report, score_summary
from torchmix.config import LayerRecord
from torchmix.workflow import calibrate

NAME = "0.weight"


@pytest.fixture
def calibration() -> Calibration:
    """Data-free scores of one layer of six rows."""
    return calibrate(nn.Sequential(nn.Linear(128, 6)), None, widths=(3, 4, 8))


def points(values: Tensor) -> list[float]:
    ordered = sorted(values.tolist())
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def test_summary_equals_the_scores_it_was_made_from(calibration: Calibration) -> None:
    plan = calibration.plan(bits=5.0)
    summary = score_summary(plan, calibration, NAME)
    assert summary is not None
    assert summary["narrowest"] == 3
    scores, row_bits = calibration.layers[NAME].scores["weight_error"], plan.layers[NAME].row_bits
    assert {int(bits) for bits in summary["widths"]} == set(plan.rows_per_bits(NAME))
    for bits, entry in summary["widths"].items():
        rows = row_bits == int(bits)
        assert entry["rows"] == int(rows.sum())
        assert entry["if_narrowest"] == points(scores[rows, 0])
        assert entry["as_planned"] == points(scores[rows, (3, 4, 8).index(int(bits))])


def test_report_joins_scores_and_rounding(calibration: Calibration) -> None:
    record = LayerRecord(NAME, 4.9, 21.5, "gptq", ("damping raised",), 0.25)
    report = layer_report(calibration.plan(bits=5.0), calibration, [record])
    entry = layer_entry(report, NAME)
    assert (entry["rounding"], entry["sqnr_db"], entry["notes"]) == ("gptq", 21.5, ["damping raised"])
    assert entry["scores"] == score_summary(calibration.plan(bits=5.0), calibration, NAME)
    assert report["calibration"] == {"source": "no data", "tokens": 0, "sha256": ""}
    assert layer_entry(report, "other") == {}
    assert layer_entry({}, NAME) == {}


def test_scores_that_are_not_there_are_none(calibration: Calibration) -> None:
    plan = calibration.plan(bits=5.0)
    assert score_summary(plan, None, NAME) is None
    assert score_summary(plan.with_uniform_bits(4), calibration, NAME) is None
    assert calibration_origin(None)["source"] == "no calibration"
