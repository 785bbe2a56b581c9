"""Rows of a curve, and the flags that do not go together."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from tests.generators import TinyLM
from torchmix.allocation import BitPlan
from torchmix.cli.curve import (
    CurvePoint,
    check_curve_flags,
    curve_plans,
    curve_table,
    measured_text,
    write_plot,
)
from torchmix.cli.entry import build_parser
from torchmix.cli.measurement import Measurement
from torchmix.workflow import calibrate


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(["plan", "m", *arguments])


@pytest.fixture(scope="module")
def plan() -> BitPlan:
    return replace(calibrate(TinyLM(), None).plan(bits=4.5), predicted_kl=0.02)


MEASURED = Measurement(0.03, 91.5, 90.0, 4096, ("sequential",))


def test_a_point_has_the_contracts_keys(plan: BitPlan) -> None:
    assert CurvePoint(plan, 5_000_000, MEASURED).to_dict() == {
        "bits_per_weight": plan.bits_per_weight,
        "checkpoint_bytes": 5_000_000,
        "predicted_kl": 0.02,
        "measured_kl": 0.03,
        "measured_perplexity": 91.5,
        "ratio": pytest.approx(1.5),
    }
    bare = CurvePoint(plan, 5_000_000).to_dict()
    assert [bare[key] for key in ("measured_kl", "measured_perplexity", "ratio")] == [None] * 3
    assert CurvePoint(replace(plan, predicted_kl=None), 1, MEASURED).ratio is None


def test_the_table_shows_what_there_is(plan: BitPlan) -> None:
    text = curve_table([CurvePoint(plan, 5_000_000), CurvePoint(replace(plan, predicted_kl=None), 6_000_000)])
    assert text.splitlines()[0].split("  ") == ["bits per weight", "size on disk", "predicted KL"]
    assert text.splitlines()[2].split() == [f"{plan.bits_per_weight:.4f}", "5.00", "MB", "0.02000"]
    assert text.splitlines()[3].endswith("-")
    measured = curve_table([CurvePoint(plan, 5_000_000, MEASURED)]).splitlines()
    assert "measured KL  measured / predicted  perplexity" in measured[0]
    assert measured[2].split()[-3:] == ["0.03000", "1.50", "91.5000"]


def test_the_distance_in_words(plan: BitPlan) -> None:
    text = measured_text(CurvePoint(plan, 1, MEASURED))
    assert text == "0.03 nats per token on 4,096 tokens; 1.50 times the prediction (+50%)"
    assert "prediction" not in measured_text(CurvePoint(replace(plan, predicted_kl=None), 1, MEASURED))


def test_plans_of_a_curve_obey_the_other_flags() -> None:
    calibration = calibrate(TinyLM(), None)
    options = parse("--curve", "--bits", "6", "--widths", "3,4,8", "--row-multiple", "4", "--quiet")
    plans = curve_plans(options, calibration, [3.5, 5.0], "weight_error")
    assert [plan.bits_per_weight for plan in plans] == pytest.approx([3.5, 5.0], abs=0.1)
    assert {(plan.widths, plan.row_multiple) for plan in plans} == {((3, 4, 8), 4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "4", "--points", "5"), "--points belongs to a curve; add --curve"),
        (("--bits", "4", "--curve-from", "4"), "--curve-from belongs to a curve"),
        (("--bits", "4", "--plot", "c.png"), "--plot belongs to a curve"),
        (("--bits", "4", "--measure-tokens", "5"), "--measure-tokens cuts the text of --measure"),
        (("--curve", "--rows-at-8-bits", "0.1"), "leave out --rows-at-8-bits"),
        (("--curve", "--widths", "4"), "two or more --widths"),
        (("--curve", "--output", "p.json"), "--output writes the plan of one size; add --bits"),
        (("--curve", "--points", "1"), "at least 2 points"),
        (("--curve", "--plot", "c.gif", "--data", "t"), r"must end in one of \.png"),
        (("--curve", "--plot", "c.png"), "nothing to draw"),
    ],
)
def test_contradictions_are_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_curve_flags(parse(*arguments))


def test_flags_that_go_together() -> None:
    for arguments in (
        ("--curve",),
        ("--curve", "--bits", "4", "--output", "p.json"),
        ("--bits", "4", "--measure", "t", "--measure-tokens", "5"),
        ("--curve", "--points", "2", "--curve-from", "4", "--measure", "t"),
    ):
        check_curve_flags(parse(*arguments))


def test_a_plot_without_matplotlib_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "torchmix\[plots\]"'):
        check_curve_flags(parse("--curve", "--plot", "c.png", "--data", "t"))


def test_a_curve_becomes_a_file(plan: BitPlan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_plot(str(tmp_path / "c.png"), [CurvePoint(plan, 1, MEASURED)], "/some/model")
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
