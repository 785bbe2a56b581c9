"""What was measured is stored to the bit, and any budget is planned from it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchmix.accounting import stored_bits, width_costs
from torchmix.allocation import BitPlan, Exclusion
from torchmix.calibration import Calibration, LayerStatistics

WIDTHS = (3, 4, 8)
SHAPES = {"a.weight": (40, 256), "b.weight": (24, 136), "e.weight": (3, 136, 16)}  # e: experts, transposed


def scores(shape: tuple[int, ...], seed: int) -> Tensor:
    """Falling with the width, of very different sizes between rows."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand((*shape, 1), generator=generator, dtype=torch.float64).exp() ** 8
    return size * torch.tensor([4.0**-bits for bits in WIDTHS], dtype=torch.float64)


def layer(name: str, seed: int) -> LayerStatistics:
    shape = SHAPES[name]
    transposed = len(shape) == 3
    rows = (shape[0], shape[2]) if transposed else (shape[0],)
    return LayerStatistics(
        name,
        shape,
        transposed,
        fingerprint=f"{seed:016x}",
        scores={"fisher_token": scores(rows, seed), "mixllm": scores(rows, seed + 10)},
        hessian_keys=("h", "", "h") if transposed else ("a",),
        tokens=(5, 0, 7) if transposed else (64,),
    )


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(
        layers={name: layer(name, seed) for seed, name in enumerate(SHAPES)},
        excluded=(Exclusion("lm_head.weight", "output head", 512, False, "f" * 16),),
        widths=WIDTHS,
        group_size=128,
        hessians={"a": torch.randn(256, 256), "h": torch.randn(136, 136)},
        tokens=64,
        source="a test",
        data_sha256="0" * 64,
    )


def all_rows(plan: BitPlan) -> Tensor:
    return torch.cat([plan.layers[name].row_bits.flatten() for name in plan.layers])


def bits_of_rows(plan: BitPlan) -> float:
    """True bits per weight, from the widths of the rows alone."""
    total = weights = 0
    for entry in plan.layers.values():
        total += stored_bits(entry.row_bits, entry.in_features, plan.group_size)
        weights += entry.num_weights
    return total / weights


def test_layer_statistics_know_their_rows(calibration: Calibration) -> None:
    assert calibration.layers["a.weight"].rows_shape == (40,)
    assert calibration.layers["e.weight"].rows_shape == (3, 16)
    assert [entry.in_features for entry in calibration.layers.values()] == [256, 136, 136]


def test_hessians_are_found_by_layer_and_expert(calibration: Calibration) -> None:
    assert calibration.hessian("a.weight") is calibration.hessians["a"]
    assert calibration.hessian("e.weight", 2) is calibration.hessians["h"]
    assert calibration.hessian("e.weight", 1) is None
    assert calibration.experts_without_tokens() == {"e.weight": [1]}
    assert calibration.salience == ("fisher_token", "mixllm")


def test_save_and_load(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "calibration.safetensors"
    calibration.save(path)
    loaded = Calibration.load(path)
    for name, entry in calibration.layers.items():
        found = loaded.layers[name]
        assert replace(found, scores={}).__dict__ == replace(entry, scores={}).__dict__
        assert list(found.scores) == list(entry.scores)
        assert all(torch.equal(found.scores[metric], entry.scores[metric]) for metric in entry.scores)
        assert found.scores["mixllm"].dtype == torch.float64
    assert list(loaded.layers) == list(calibration.layers)
    assert all(torch.equal(loaded.hessians[key], h) for key, h in calibration.hessians.items())
    for field in ("excluded", "widths", "group_size", "tokens", "source", "data_sha256", "salience"):
        assert getattr(loaded, field) == getattr(calibration, field)
    assert loaded.model is None
    assert loaded.plan(4.5) == calibration.plan(4.5)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_a_second_save_gives_the_same_bytes(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "a")
    Calibration.load(tmp_path / "a").save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_has_the_permissions_of_any_new_file(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(tmp_path / "calibration")
    (tmp_path / "other").touch()
    assert (tmp_path / "calibration").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none: no such calibration file; make one with calibrate"):
        Calibration.load(tmp_path / "none")


def change_header(path: Path, **changes: Any) -> None:
    tensors = load_file(path)
    text = path.read_bytes()
    (length,) = struct.unpack("<Q", text[:8])
    header = json.loads(json.loads(text[8 : 8 + length])["__metadata__"]["torchmix"])
    save_file(tensors, path, {"torchmix": json.dumps({**header, **changes})})


def test_another_version_is_refused_by_name(calibration: Calibration, tmp_path: Path) -> None:
    calibration.save(path := tmp_path / "c")
    change_header(path, format_version=2)
    with pytest.raises(ValueError, match=r"c: calibration format version 2 is unknown.*reads version 1"):
        Calibration.load(path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no calibration"),
    "another kind": lambda path: change_header(path, kind="torchmix.BitPlan"),
    "no header": lambda path: save_file(load_file(path), path),
    "header not JSON": lambda path: save_file(load_file(path), path, {"torchmix": "{"}),
    "missing tensor": lambda path: change_header(path, salience=["output_error"]),
    "missing key": lambda path: change_header(path, layers=[{"name": "a.weight"}]),
    "scores of another shape": lambda path: change_header(path, widths=[3, 4]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_refused(
    calibration: Calibration, tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    calibration.save(path := tmp_path / "c")
    damage(path)
    with pytest.raises(ValueError, match=r"/c: .*(calibrate again|make one with calibrate)"):
        Calibration.load(path)


@pytest.mark.parametrize("bits", [3.6, 4.25, 4.5, 6.0, 8.2])
def test_budgets_are_met_and_used(calibration: Calibration, bits: float) -> None:
    """Below the budget by less than two rows: one that no longer fits, and one of the costs of swapping."""
    plan = calibration.plan(bits)
    widest = max(max(width_costs(k, WIDTHS, 128)) for k in (256, 136))
    weights = sum(entry.num_weights for entry in plan.layers.values())
    assert bits - 2 * widest / weights < plan.bits_per_weight <= bits
    assert plan.bits_per_weight == pytest.approx(bits_of_rows(plan), abs=1e-12)
    assert plan.widths == WIDTHS


def test_more_bits_never_lose_more(calibration: Calibration) -> None:
    losses = [calibration.plan(bits).predicted_loss for bits in (3.6, 4.0, 4.5, 5.0, 6.0, 8.2)]
    assert losses == sorted(losses, reverse=True)


def test_predictions_are_the_scores_of_the_chosen_widths(calibration: Calibration) -> None:
    plan = calibration.plan(4.5)
    loss = 0.0
    for name, entry in calibration.layers.items():
        for row, bits in zip(
            entry.scores["fisher_token"].flatten(0, -2), plan.layers[name].row_bits.flatten(), strict=True
        ):
            loss += float(row[WIDTHS.index(int(bits))])
    assert plan.predicted_loss == pytest.approx(loss, rel=1e-12)
    assert plan.predicted_kl == pytest.approx(loss / 2 / 64, rel=1e-12)
    other = calibration.plan(4.5, salience="mixllm")
    assert (other.salience, other.predicted_kl) == ("mixllm", None)
    assert other != plan


@pytest.mark.parametrize(("bits", "hint"), [(3.0, "ask for more bits"), (9.0, "ask for fewer bits")])
def test_an_infeasible_budget_names_the_range(calibration: Calibration, bits: float, hint: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{bits:.4f} bits per weight is outside the feasible range.*{hint}"
    ) as e:
        calibration.plan(bits)
    low, high = (float(word) for word in str(e.value).split("range ")[1].split(" of")[0].split(" to "))
    assert set(all_rows(calibration.plan(low)).tolist()) == {3}
    assert (
        int((all_rows(calibration.plan(high)) != 8).sum()) <= 1
    )  # the range is given to four decimals, inwards


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_rows_at_8_bits_counts_rows(calibration: Calibration, share: float) -> None:
    """The rows with the highest 4-bit scores of the whole model, whatever they cost."""
    plan = calibration.plan(rows_at_8_bits=share)
    rows = all_rows(plan)
    assert plan.widths == (4, 8)
    assert int((rows == 8).sum()) == round(share * len(rows))
    ranked = torch.cat(
        [entry.scores["fisher_token"][..., 1].flatten() for entry in calibration.layers.values()]
    )
    if 0 < share < 1:
        assert ranked[rows == 8].min() >= ranked[rows == 4].max()
    assert plan.predicted_kl is not None


@pytest.mark.parametrize(
    "option",
    [
        {"bits": 4.5},
        {"widths": (3, 4)},
        {"row_multiple": 8},
        {"tensor_parallel": 2},
        {"fixed": {"a*": 8}},
        {"min_bits": {"a*": 4}},
    ],
    ids=str,
)
def test_rows_at_8_bits_goes_with_nothing_else(calibration: Calibration, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"rows_at_8_bits=0\.1 fixes.*{next(iter(option))}"):
        calibration.plan(rows_at_8_bits=0.1, **option)
    assert calibration.plan(rows_at_8_bits=0.1, widths=[8, 4]) == calibration.plan(rows_at_8_bits=0.1)


def test_one_width_needs_no_budget(calibration: Calibration) -> None:
    plan = calibration.plan(widths=(4,))
    assert set(all_rows(plan).tolist()) == {4}
    assert plan.predicted_loss is not None
    unscored = calibration.plan(widths=(5,))
    assert set(all_rows(unscored).tolist()) == {5}
    assert unscored.predicted_loss is None
    assert unscored.predicted_kl is None
    parallel = calibration.plan(widths=(4,), row_multiple=8, tensor_parallel=2)
    assert (parallel.row_multiple, parallel.tensor_parallel) == (8, 2)
    with pytest.raises(ValueError, match=r"a\.weight: 40 rows cannot be cut into tensor_parallel=3"):
        calibration.plan(widths=(4,), tensor_parallel=3)


def test_bounds_and_fixed_layers(calibration: Calibration) -> None:
    plan = calibration.plan(5.0, fixed={"b": 8}, min_bits={"a*": 4}, max_bits={"re:e.*": 4})
    rows = {name: set(entry.row_bits.flatten().tolist()) for name, entry in plan.layers.items()}
    assert rows == {"a.weight": {4, 8}, "b.weight": {8}, "e.weight": {3, 4}}
    assert plan.bits_per_weight <= 5.0


def test_the_first_matching_pattern_counts(calibration: Calibration) -> None:
    plan = calibration.plan(5.0, fixed={"b": 8, "[ab]*": 3})
    assert plan.rows_per_bits("b.weight") == {8: 24}
    assert plan.rows_per_bits("a.weight") == {3: 40}


def test_counts_of_rows(calibration: Calibration) -> None:
    plan = calibration.plan(4.7, row_multiple=4, tensor_parallel=2)
    for entry in plan.layers.values():
        for block in entry.row_bits.view(-1, 2, entry.row_bits.shape[-1] // 2).unbind(1):
            for rows in block:
                assert all(count % 4 == 0 for count in torch.bincount(rows.long()).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a budget is needed to choose among the widths"),
        ({"widths": (4,), "fixed": {"b": 8}}, "a budget is needed"),
        ({"bits": 4.5, "widths": (3, 5)}, r"widths \[5\] were not scored.*widths=\(3, 4, 5, 8\)"),
        ({"bits": 4.5, "salience": "output_error"}, r"'output_error' was not measured.*'mixllm'"),
        ({"bits": 4.5, "fixed": {"c": 4}}, r"'c' matches no quantized layer.*a\.weight"),
        ({"bits": 4.5, "min_bits": {"lm_head": 4}}, "'lm_head' matches no quantized layer"),
        ({"bits": 4.5, "fixed": {"b": 6}}, r"b\.weight: fixed rows have 6 bits"),
        ({"bits": float("nan")}, "positive finite"),
        ({"bits": -4.0}, "positive finite"),
        ({"rows_at_8_bits": 1.5}, "1.5"),
    ],
    ids=str,
)
def test_wrong_requests(calibration: Calibration, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration.plan(**options)


def test_the_paper_setting_needs_4_bit_scores(calibration: Calibration) -> None:
    layers = {
        name: replace(entry, scores={m: s[..., [0, 2]] for m, s in entry.scores.items()})
        for name, entry in calibration.layers.items()
    }
    without = replace(calibration, layers=layers, widths=(3, 8))
    with pytest.raises(ValueError, match=r"widths \[4\] were not scored"):
        without.plan(rows_at_8_bits=0.1)


def test_nothing_is_predicted_without_data(calibration: Calibration) -> None:
    assert replace(calibration, tokens=0).plan(4.5).predicted_kl is None
