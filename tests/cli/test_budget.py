"""Flags of the size become arguments of the library; curves span what is feasible."""

from __future__ import annotations

from argparse import Namespace
from itertools import pairwise

import pytest
import torch

from tests.generators import TinyLM
from torchmix.accounting import stored_bits
from torchmix.calibration import Calibration
from torchmix.cli.budget import (
    budget_arguments,
    curve_budgets,
    feasible_range,
    has_size,
    plan_for,
    scored_widths,
)
from torchmix.cli.entry import build_parser
from torchmix.workflow import calibrate


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(["plan", "m", *arguments])


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(TinyLM(), None)


def test_flags_become_arguments_of_the_library() -> None:
    rules = {"row_multiple": 1, "tensor_parallel": 1}
    assert budget_arguments(parse("--widths", "4")) == {"bits": None, "widths": (4,), **rules}
    assert scored_widths(parse("--widths", "4")) == (4,)
    paper = parse("--rows-at-8-bits", "0.1", "--data", "t")
    assert budget_arguments(paper) == {"rows_at_8_bits": 0.1}
    assert scored_widths(paper) == (4, 8)
    assert scored_widths(parse("--bits", "4")) == (3, 4, 5, 6, 8)
    cut = budget_arguments(parse("--bits", "4", "--row-multiple", "16", "--tensor-parallel", "2"))
    assert cut == {"bits": 4.0, "widths": None, "row_multiple": 16, "tensor_parallel": 2}


def test_what_counts_as_a_size() -> None:
    assert not has_size(parse("--curve"))
    assert not has_size(parse("--curve", "--widths", "3,4"))
    for flags in (("--bits", "4"), ("--widths", "4"), ("--rows-at-8-bits", "0.1")):
        assert has_size(parse(*flags))
    assert has_size(build_parser().parse_args(["quantize", "m", "--output", "o", "--plan", "p"]))


@pytest.mark.parametrize("widths", [(3, 4, 5, 6, 8), (4, 8)])
def test_the_feasible_range_is_what_can_be_planned(calibration: Calibration, widths: tuple[int, ...]) -> None:
    narrowest = calibration.plan(widths=widths[:1])
    low, high = feasible_range(narrowest, widths)
    for bits, end in ((low, widths[0]), (high, widths[-1])):
        plan = calibration.plan(bits=bits, widths=widths)
        uniform = sum(
            stored_bits(torch.full_like(layer.row_bits, end), layer.in_features, plan.group_size)
            for layer in plan.layers.values()
        )
        weights = sum(layer.num_weights for layer in plan.layers.values())
        assert bits == pytest.approx(uniform / weights, abs=1e-4)
    for bits in (low - 1e-4, high + 1e-4):
        with pytest.raises(ValueError, match=rf"feasible range {low:.4f} to {high:.4f}"):
            calibration.plan(bits=round(bits, 4), widths=widths)


def test_budgets_are_even_and_reach_the_ends(calibration: Calibration) -> None:
    plan = plan_for(parse("--curve"), calibration)
    low, high = feasible_range(plan, plan.widths)
    budgets = curve_budgets(parse("--curve"), plan)
    assert len(budgets) == 20
    assert (budgets[0], budgets[-1]) == (low, high)
    steps = [after - before for before, after in pairwise(budgets)]
    assert max(steps) - min(steps) < 3e-4  # budgets have four decimals
    part = curve_budgets(parse("--curve", "--curve-from", "4", "--curve-to", "5", "--points", "3"), plan)
    assert part == [4.0, 4.5, 5.0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--curve-from", "2"), r"--curve-from 2 is outside the feasible range 3\.\d+ to 8\.\d+.*3,4,5,6,8"),
        (("--curve-to", "9"), "--curve-to 9 is outside"),
        (("--curve-from", "5", "--curve-to", "4"), "from 5 to 4 bits has no length"),
    ],
)
def test_ends_that_cannot_be(calibration: Calibration, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curve_budgets(parse("--curve", *flags), plan_for(parse("--curve"), calibration))


def test_a_curve_alone_is_planned_from_its_smallest_size(calibration: Calibration) -> None:
    plan = plan_for(parse("--curve", "--widths", "4,6"), calibration)
    assert plan.widths == (4, 6)
    assert plan.bits_per_weight < 4.5
    cut = plan_for(parse("--curve", "--tensor-parallel", "2", "--row-multiple", "4"), calibration)
    assert (cut.tensor_parallel, cut.row_multiple) == (2, 4)
    assert plan_for(parse("--bits", "5"), calibration).bits_per_weight == pytest.approx(5, abs=0.02)
