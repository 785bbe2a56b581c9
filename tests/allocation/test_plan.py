"""BitPlan: its numbers, its JSON file, and every kind of file that it must refuse."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from torchmix.accounting import row_stored_bits
from torchmix.allocation.plan import BitPlan, Exclusion, LayerPlan

WIDTHS = (3, 4, 8)


def make_plan(**changes):
    layers = [
        LayerPlan("up", (4, 256), torch.tensor([3, 4, 8, 4], dtype=torch.uint8), False, "a1"),
        LayerPlan("conv", (172, 2), torch.tensor([4, 4], dtype=torch.uint8), True, "b2"),
        LayerPlan("experts", (2, 2, 128), torch.tensor([[3, 8], [8, 3]], dtype=torch.uint8), False, "c3"),
    ]
    excluded = (
        Exclusion("lm_head", "output layer (default)", 10_000, False),
        Exclusion("odd", "its dtype is int32", 500, True),
    )
    values = {
        "layers": {layer.name: layer for layer in layers},
        "excluded": excluded,
        "group_size": 128,
        "widths": WIDTHS,
        "salience": "fisher_token",
        "predicted_kl": 0.0125,
        "predicted_loss": 1 / 3,
    }
    return BitPlan(**{**values, **changes})


def test_numbers_of_a_plan():
    plan = make_plan()
    assert plan.quantized_weights == 4 * 256 + 172 * 2 + 2 * 2 * 128
    up = sum(row_stored_bits(256, bits, 128) for bits in (3, 4, 8, 4))
    conv = 2 * row_stored_bits(172, 4, 128)
    experts = sum(2 * row_stored_bits(128, bits, 128) for bits in (3, 8))
    assert plan.bits_per_weight == (up + conv + experts) / plan.quantized_weights
    assert plan.stored_bits_of("up") == up
    assert plan.bits_per_weight_of("conv") == conv / 344
    assert plan.rows_per_bits("experts") == {3: 2, 8: 2}


def test_coverage_leaves_out_what_a_default_or_the_user_excluded():
    plan = make_plan()
    assert plan.coverage == plan.quantized_weights / (plan.quantized_weights + 500)
    assert make_plan(excluded=()).coverage == 1.0


def test_with_uniform_bits_predicts_nothing():
    plan = make_plan().with_uniform_bits(5)
    assert plan.widths == (5,)
    assert plan.predicted_kl is plan.predicted_loss is None
    assert plan.salience == "none"
    assert plan.rows_per_bits("experts") == {5: 4}
    assert plan.layers["conv"].fingerprint == "b2"
    with pytest.raises(ValueError, match="bits=1"):
        plan.with_uniform_bits(1)


def test_save_and_load_round_trip(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan.json")
    loaded = BitPlan.load(str(tmp_path / "plan.json"))
    assert loaded == plan
    assert list(loaded.layers) == list(plan.layers)
    assert os.listdir(tmp_path) == ["plan.json"]
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (data["format_version"], data["kind"]) == (1, "torchmix.BitPlan")
    assert data["layers"]["up"]["row_bits"] == "3484"


def test_unknown_predictions_round_trip():
    plan = make_plan(predicted_kl=None, predicted_loss=None)
    assert BitPlan.from_dict(plan.to_dict()) == plan


def test_plans_differ_where_a_row_differs():
    plan = make_plan()
    up = replace(plan.layers["up"], row_bits=torch.tensor([3, 4, 8, 8], dtype=torch.uint8))
    assert replace(plan, layers={**plan.layers, "up": up}) != plan


def test_repr_is_one_short_line():
    text = repr(make_plan())
    assert "3 layers" in text
    assert "fisher_token" in text
    assert len(text) < 150


def test_unknown_layer_names_say_why():
    with pytest.raises(ValueError, match=r"lm_head: not a quantized layer of this plan \(output layer"):
        make_plan().rows_per_bits("lm_head")
    with pytest.raises(ValueError, match=r"nowhere: not a quantized layer of this plan \(unknown name"):
        make_plan().bits_per_weight_of("nowhere")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": {}}, "at least one layer"),
        ({"group_size": 100}, "group_size=100"),
        ({"widths": (8, 4, 3)}, "widths"),
        ({"widths": (4, 8)}, "up: has rows of 3 bits, but widths=.4, 8."),
        ({"predicted_kl": float("nan")}, "predicted_kl=nan"),
        ({"predicted_loss": -1.0}, "predicted_loss=-1.0"),
        ({"row_multiple": 0}, "row_multiple=0"),
        ({"row_multiple": 2}, "up: 2 widths have a number of rows that is not a multiple of row_multiple=2"),
        ({"tensor_parallel": 2}, "up: the 2 blocks of 2 rows hold different numbers"),
        ({"tensor_parallel": 4}, "conv: 2 rows cannot be cut|up: "),
        ({"excluded": (Exclusion("up", "x", 1, True),)}, "up: listed twice"),
        ({"excluded": (Exclusion("a", "x", 1, True),) * 2}, "a: listed twice"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(**changes)


def test_key_and_name_of_a_layer_must_agree():
    with pytest.raises(ValueError, match="other: the layer under this key calls itself 'up'"):
        make_plan(layers={"other": make_plan().layers["up"]})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "format_version=2 is unknown, this torchmix reads 1; install the torchmix"),
        ({"format_version": True}, "format_version=True"),
        ({"format_version": "1"}, "format_version='1'"),
        ({"kind": "other"}, "kind='other', not 'torchmix.BitPlan'"),
        ({"unknown": 1}, "plan: unknown key 'unknown'"),
        ({"widths": [3, 4, "8"]}, r"plan: widths\[2\]='8' must be int"),
        ({"group_size": "128"}, "plan: group_size='128' must be int"),
        ({"excluded": ["lm_head"]}, r"excluded\[0\]: expected an object"),
        ({"layers": {"up": None}}, "up: expected an object"),
        ({"predicted_kl": float("nan")}, "predicted_kl=nan"),
    ],
)
def test_edited_files_are_refused_with_the_file_name(tmp_path, changes, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**make_plan().to_dict(), **changes}))
    with pytest.raises(ValueError, match=message) as raised:
        BitPlan.load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"kind": 1}', "\xff"])
def test_files_that_are_no_plan_are_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"plan\.json"):
        BitPlan.load(path)


def test_a_layer_given_twice_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"layers": {"up": 1, "up": 2}}')
    with pytest.raises(ValueError, match="'up' is given twice"):
        BitPlan.load(path)


def test_every_missing_key_is_named():
    data = make_plan().to_dict()
    for key in data:
        with pytest.raises(ValueError, match=key):
            BitPlan.from_dict({name: value for name, value in data.items() if name != key})


def test_a_missing_file_or_folder_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        BitPlan.load(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError, match="make it first"):
        make_plan().save(tmp_path / "missing" / "plan.json")
