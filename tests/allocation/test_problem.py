"""Allocation problems: what is refused, and the feasible range."""

from __future__ import annotations

import re

import pytest
import torch

from torchmix.accounting import budget_in_bits, width_costs
from torchmix.allocation.problem import AllocationProblem, LayerChoices, check_scores, given_columns

WIDTHS = (3, 4, 8)


def choices(name="up", rows=4, in_features=128, **options):
    scores = torch.ones(rows, 3, dtype=torch.float64)
    return LayerChoices(name, in_features, width_costs(in_features, WIDTHS, 128), scores, **options)


def problem(*layers, budget_bits=None, **options):
    return AllocationProblem(layers or (choices(),), WIDTHS, budget_bits, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_bad_scores_name_layer_and_row(value):
    scores = torch.zeros(2, 5, 3, dtype=torch.float64)
    scores[1, 4, 2] = value
    with pytest.raises(ValueError, match="up: the score of row 4 of expert 1 is"):
        check_scores("up", scores)
    with pytest.raises(ValueError, match="up: the score of row 9 is"):
        LayerChoices("up", 128, (1, 2, 3), scores.reshape(10, 3))


@pytest.mark.parametrize("costs", [(0, 1, 2), (3, 2, 4), (1, 2), (1.0, 2.0, 3.0)])
def test_costs_must_be_positive_whole_and_not_fall(costs):
    with pytest.raises(ValueError, match="up: "):
        LayerChoices("up", 128, costs, torch.ones(4, 3))


@pytest.mark.parametrize("shape", [(3,), (0, 3), (4, 0), (1, 2, 4, 3)])
def test_shapes_of_scores(shape):
    with pytest.raises(ValueError, match="up: scores of shape"):
        LayerChoices("up", 128, (1, 2, 3), torch.ones(shape))


def test_scores_become_float64_with_an_expert_dimension():
    layer = LayerChoices("up", 128, (1, 2, 3), torch.ones(4, 3, dtype=torch.bfloat16))
    assert layer.scores_ENW.shape == (1, 4, 3)
    assert layer.scores_ENW.dtype == "float64"
    assert layer.num_rows == 4


@pytest.mark.parametrize(
    "layers, options, message",
    [
        ([choices("a"), choices("a")], {}, "a: two layers have this name"),
        ([choices(rows=6)], {"tensor_parallel": 4}, "up: 6 rows cannot be cut into tensor_parallel=4"),
        (
            [choices(min_bits=5, max_bits=7)],
            {},
            "up: no width of .3, 4, 8. lies from min_bits=5 to max_bits=7",
        ),
        ([choices(row_bits=torch.tensor([3, 4, 5, 8]))], {}, "up: fixed rows have 5 bits"),
        ([choices(row_bits=torch.tensor([3, 3, 4, 8]))], {"row_multiple": 2}, "up: 2 widths"),
        ([choices(row_bits=torch.tensor([3, 3, 4, 4]))], {"tensor_parallel": 2}, "up: the 2 blocks"),
        ([LayerChoices("a", 8, (1, 2), torch.ones(4, 2))], {}, "a: 2 costs for widths"),
    ],
)
def test_layers_that_do_not_fit_are_named(layers, options, message):
    with pytest.raises(ValueError, match=message):
        problem(*layers, **options)


def test_fixed_widths_need_one_per_row():
    with pytest.raises(ValueError, match="up: fixed row_bits of shape"):
        choices(row_bits=torch.tensor([3, 4]))


def test_a_problem_needs_layers_and_a_whole_budget():
    with pytest.raises(ValueError, match="at least one layer"):
        AllocationProblem((), WIDTHS, None)
    with pytest.raises(TypeError, match=r"budget_bits=4\.5 must be a whole number"):
        problem(budget_bits=4.5)


def test_feasible_range_counts_limits_and_fixed_layers():
    costs = width_costs(128, WIDTHS, 128)
    asked = problem(
        choices("a", min_bits=4),
        choices("b", max_bits=5),
        choices("c", row_bits=torch.tensor([3, 4, 8, 8], dtype=torch.uint8)),
    )
    fixed = costs[0] + costs[1] + 2 * costs[2]
    assert asked.feasible_bits == (4 * costs[1] + 4 * costs[0] + fixed, 4 * costs[2] + 4 * costs[1] + fixed)


def test_the_range_in_the_message_can_be_asked_for():
    layers = (choices("a", 7, 172), choices("b", 3, 320))
    for budget in (1, 10**9):
        with pytest.raises(ValueError, match="outside the feasible range") as raised:
            problem(*layers, budget_bits=budget).check_budget()
        bounds = re.search(r"range (\S+) to (\S+) of", str(raised.value)).groups()
        for bits in bounds:
            num_weights = problem(*layers).num_weights
            problem(*layers, budget_bits=budget_in_bits(float(bits), num_weights)).check_budget()


def test_the_ends_of_the_range_are_feasible_and_the_next_bits_are_not():
    least, most = problem().feasible_bits
    problem(budget_bits=least).check_budget()
    problem(budget_bits=most).check_budget()
    with pytest.raises(ValueError, match="ask for more bits"):
        problem(budget_bits=least - 1).check_budget()
    with pytest.raises(ValueError, match="ask for fewer bits"):
        problem(budget_bits=most + 1).check_budget()


def test_given_columns_need_given_widths():
    with pytest.raises(ValueError, match="up: no row_bits are given"):
        given_columns(choices(), WIDTHS)
    layer = choices(row_bits=torch.tensor([3, 8, 4, 3], dtype=torch.uint8))
    assert given_columns(layer, WIDTHS).tolist() == [[0, 2, 1, 0]]
