"""The plan of one weight: shapes of all kinds, JSON, and what is refused."""

from __future__ import annotations

import pytest
import torch

from torchmix.allocation.layer_plan import Exclusion, LayerPlan


def layer(shape=(4, 128), row_bits=(3, 4, 8, 4), transposed=False):
    return LayerPlan("up.weight", shape, torch.tensor(row_bits, dtype=torch.uint8), transposed, "f00d")


EXPERTS = [[3, 4, 8], [4, 4, 5]]
CASES = [
    # shape, row_bits, transposed, (E, N, K)
    ((4, 128), [3, 4, 8, 4], False, (None, 4, 128)),
    ((128, 4), [3, 4, 8, 4], True, (None, 4, 128)),
    ((2, 3, 128), EXPERTS, False, (2, 3, 128)),
    ((2, 128, 3), EXPERTS, True, (2, 3, 128)),
    ((1, 3, 128), EXPERTS[:1], False, (1, 3, 128)),
]


@pytest.mark.parametrize("shape, row_bits, transposed, sizes", CASES)
def test_sizes_and_json_round_trip(shape, row_bits, transposed, sizes):
    plan = layer(shape, row_bits, transposed)
    assert (plan.num_experts, plan.out_features, plan.in_features) == sizes
    assert plan.num_weights == torch.Size(shape).numel()
    assert LayerPlan.from_dict("up.weight", plan.to_dict()) == plan


def test_json_holds_one_digit_per_row():
    assert layer().to_dict()["row_bits"] == "3484"
    assert layer((2, 3, 128), EXPERTS).to_dict()["row_bits"] == ["348", "445"]


def test_rows_per_bits_counts_the_rows_of_all_experts():
    assert layer().rows_per_bits() == {3: 1, 4: 2, 8: 1}
    assert layer((2, 3, 128), EXPERTS).rows_per_bits() == {3: 1, 4: 3, 5: 1, 8: 1}


def test_equality_looks_at_every_field():
    assert layer() == layer()
    assert layer() != layer(row_bits=(3, 4, 8, 5))
    assert layer((4, 4), transposed=True) != layer((4, 4))
    assert layer() != "up.weight"


@pytest.mark.parametrize(
    "shape, row_bits, message",
    [
        ((4,), [4] * 4, r"up.weight: shape \(4,\)"),
        ((4, 0), [4] * 4, r"up.weight: shape \(4, 0\)"),
        ((4, 128), [4] * 3, r"row_bits of shape \(3,\) do not fit"),
        ((2, 3, 128), [4] * 3, r"expected \(2, 3\)"),
        ((4, 128), [4, 4, 1, 4], "up.weight: row 2 has 1 bits"),
        ((2, 3, 128), [[4, 4, 4], [4, 9, 4]], "up.weight: row 1 of expert 1 has 9 bits"),
    ],
)
def test_fields_that_do_not_fit_are_refused(shape, row_bits, message):
    with pytest.raises(ValueError, match=message):
        layer(shape, row_bits)


def test_row_bits_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"up.weight: row_bits must be uint8, got torch.int64"):
        LayerPlan("up.weight", (2, 128), torch.tensor([4, 4]), False, "f00d")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"row_bits": "34x4"}, "up.weight: row_bits has 'x' at row 2"),
        ({"row_bits": "34²4"}, "up.weight: row_bits has '²' at row 2"),
        ({"row_bits": "3494"}, "up.weight: row 2 has 9 bits"),
        ({"row_bits": "348"}, r"row_bits of shape \(3,\) do not fit"),
        ({"row_bits": ""}, r"row_bits of shape \(0,\) do not fit"),
        ({"row_bits": []}, "lengths"),
        ({"row_bits": ["34", "345"]}, r"lengths \[2, 3\]"),
        ({"row_bits": ["34", 34]}, r"row_bits\[1\]=34 must be str"),
        ({"row_bits": 3484}, "row_bits=3484 must be str or list"),
        ({"shape": [4, 128.0]}, r"shape\[1\]=128.0 must be int"),
        ({"shape": [4, True]}, r"shape\[1\]=True must be int"),
        ({"transposed": 0}, "transposed=0 must be bool"),
        ({"extra": 0}, "unknown key 'extra'"),
    ],
)
def test_edited_json_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        LayerPlan.from_dict("up.weight", {**layer().to_dict(), **change})


def test_exclusion_round_trip_and_checks():
    exclusion = Exclusion("lm_head.weight", "output layer", 1000, False)
    assert Exclusion.from_dict("excluded[0]", exclusion.to_dict()) == exclusion
    with pytest.raises(ValueError, match=r"excluded\[0\]: missing 'reason'"):
        Exclusion.from_dict("excluded[0]", {"name": "a", "weights": 1, "counts_against_coverage": True})
    with pytest.raises(ValueError, match="a: weights=-1"):
        Exclusion("a", "why", -1, True)
