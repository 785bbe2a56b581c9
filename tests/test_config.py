"""``quantize_(model, mixllm_config(...))``: every weight finds its rows, and nothing else is touched."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import quantize_

from tests.generators import TinyLM, tiny_gpt2, tiny_mixtral, token_ids
from torchmix.accounting import width_costs
from torchmix.allocation import BitPlan
from torchmix.calibration import Calibration
from torchmix.config import LayerRecord, MixLLMConfig, mixllm_config
from torchmix.rounding import round_weight
from torchmix.selection import Target, select_parameters
from torchmix.tensor import MixedPrecisionTensor
from torchmix.workflow import calibrate


def calibrated(model: nn.Module, **options: Any) -> Calibration:
    return calibrate(model, token_ids(2, 16), sequence_length=16, num_samples=2, **options)


@pytest.fixture
def model() -> nn.Module:
    return TinyLM()


@pytest.fixture
def calibration(model: nn.Module) -> Calibration:
    return calibrated(model)


def expected(target: Target, plan: BitPlan, calibration: Calibration | None, method: str) -> Tensor:
    """The dense weight that one layer must have afterwards, shape as the model sees it."""
    bits = plan.layers[target.name].row_bits
    rows, widths = target.rows.detach(), bits
    if rows.dim() == 2:
        rows, widths = rows[None], bits[None]
    dense = []
    for e, (weight, row_bits) in enumerate(zip(rows, widths, strict=True)):
        hessian = None if calibration is None else calibration.hessian(target.name, e)
        chosen = "clip" if method == "gptq" and hessian is None else method
        dense.append(round_weight(weight, row_bits, plan.group_size, chosen, hessian, refine=3).dequantize())
    stacked = torch.stack(dense) if bits.dim() == 2 else dense[0]
    return stacked.transpose(-1, -2) if target.transposed else stacked


def check(
    before: nn.Module, after: nn.Module, plan: BitPlan, calibration: Calibration | None, method: str
) -> None:
    """Planned weights are what rounding alone gives with the plan's widths, all other parameters are unchanged."""
    targets = {target.name: target for target in select_parameters(before, include=list(plan.layers)).targets}
    assert set(targets) == set(plan.layers)
    originals = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        if name not in targets:
            assert type(parameter) is nn.Parameter
            assert torch.equal(parameter, originals[name])
            continue
        assert isinstance(parameter, MixedPrecisionTensor)
        assert not parameter.requires_grad
        assert torch.equal(parameter.row_bits, plan.layers[name].row_bits)
        assert parameter.shape == originals[name].shape
        dense = parameter.dequantize(torch.float32)
        assert torch.equal(dense, expected(targets[name], plan, calibration, method))


def test_plan_and_calibration(model: nn.Module, calibration: Calibration) -> None:
    before, plan = copy.deepcopy(model), calibration.plan(4.5)
    config = mixllm_config(plan, calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(model, config)
    check(before, model, plan, calibration, "gptq")
    ids = token_ids(2, 8)
    assert model.eval()(ids).shape == (2, 8, 48)
    assert [record.name for record in config.records] == list(plan.layers)
    assert {record.method for record in config.records} == {"gptq"}
    for record in config.records:
        assert record.notes == ()
        assert record.bits_per_weight == pytest.approx(plan.bits_per_weight_of(record.name), abs=1e-12)
        assert 10 < record.sqnr_db < 60
        assert record.seconds > 0


def test_a_plan_alone_is_rounded_with_clip_search(model: nn.Module, calibration: Calibration) -> None:
    before, plan = copy.deepcopy(model), calibration.plan(4.5)
    quantize_(model, mixllm_config(plan))
    check(before, model, plan, None, "clip")


@pytest.mark.parametrize("rounding", ["rtn", "clip", "gptq"])
def test_rounding_choices(model: nn.Module, calibration: Calibration, rounding: str) -> None:
    """Clip search uses the Hessian where there is one."""
    before, plan = copy.deepcopy(model), calibration.plan(4.5)
    config = mixllm_config(plan, calibration, rounding=rounding)
    quantize_(model, config)
    check(before, model, plan, calibration, rounding)
    assert {record.method for record in config.records} == {rounding}


def test_plan_and_calibration_from_files(model: nn.Module, calibration: Calibration, tmp_path: Path) -> None:
    calibration.plan(4.5).save(tmp_path / "plan.json")
    calibration.save(tmp_path / "calibration")
    plan, read = BitPlan.load(tmp_path / "plan.json"), Calibration.load(tmp_path / "calibration")
    before = copy.deepcopy(model)
    quantize_(model, mixllm_config(plan, read))
    check(before, model, plan, calibration, "gptq")


def test_a_copy_of_the_model(model: nn.Module, calibration: Calibration) -> None:
    """Also when the names are not those of the plan: a layer is recognised by its weights."""
    plan, copied = calibration.plan(4.5), copy.deepcopy(model)
    quantize_(copied, mixllm_config(plan, calibration))
    check(model, copied, plan, calibration, "gptq")
    wrapped = nn.Sequential(copy.deepcopy(model))
    quantize_(wrapped, mixllm_config(plan, calibration))
    check(model, wrapped[0], plan, calibration, "gptq")


def test_one_config_for_two_models(model: nn.Module, calibration: Calibration) -> None:
    plan = calibration.plan(4.5)
    config = mixllm_config(plan, calibration)
    for copied in (copy.deepcopy(model), copy.deepcopy(model)):
        quantize_(copied, config)
        check(model, copied, plan, calibration, "gptq")
    assert len(config.records) == 2 * len(plan.layers)


def test_short_floats_keep_their_dtype(model: nn.Module) -> None:
    model = model.to(torch.bfloat16)
    calibration = calibrated(model)
    quantize_(model, mixllm_config(calibration.plan(4.5), calibration))
    assert model.blocks[0].up.weight.dtype == torch.bfloat16
    assert model.eval()(token_ids(1, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(("group", "per_token"), [("group", False), ("token", True)])
def test_activation_groups(model: nn.Module, calibration: Calibration, group: Any, per_token: bool) -> None:
    quantize_(model, mixllm_config(calibration.plan(4.5), activation_group=group))
    assert model.blocks[0].up.weight.per_token == per_token


def test_group_size_comes_from_the_plan(model: nn.Module) -> None:
    plan = calibrated(model, group_size=64).plan(5.0)
    quantize_(model, mixllm_config(plan))
    assert model.blocks[0].up.weight.group_size == 64
    assert model.blocks[0].up.weight.scale.shape == (136, 2)


def test_tied_layers_stay_tied() -> None:
    tied = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.Linear(128, 128))
    tied[2].weight = tied[0].weight
    plan = calibrate(tied).plan(widths=(4,))
    for config in (mixllm_config(plan), None):
        model = copy.deepcopy(tied)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if config is None else "error")
            quantize_(model, config or mixllm_config())
        assert model[2].weight is model[0].weight
        assert isinstance(model[3].weight, MixedPrecisionTensor)
        assert model[3].weight is not model[0].weight


def equal_layers() -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(128, 40) for _ in range(3)))
    for layer in model:
        layer.load_state_dict(model[0].state_dict())
    return model


def test_layers_with_equal_weights_take_turns() -> None:
    """Equal fingerprints: the plan's order is the model's."""
    model = equal_layers()
    calibration = calibrate(model, widths=(3, 4, 8))
    plan = calibration.plan(5.0, fixed={"1": 8, "2": 3})
    for copied in (copy.deepcopy(model), copy.deepcopy(model)):
        quantize_(copied, mixllm_config(plan))
        check(model, copied, plan, None, "clip")


def test_an_excluded_layer_with_the_weights_of_another() -> None:
    """Told apart by the model, and refused without it."""
    model = equal_layers()
    calibration = calibrate(model, exclude=["0"])
    plan, before = calibration.plan(4.5), copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=r"1\.weight and the excluded 0\.weight hold equal weights.*model=model"
    ):
        quantize_(copy.deepcopy(model), mixllm_config(plan))
    copied = copy.deepcopy(model)
    quantize_(copied, mixllm_config(plan, model=copied))
    check(before, copied, plan, None, "clip")
    quantize_(model, mixllm_config(plan, calibration))
    check(before, model, plan, None, "clip")


def test_a_filter_leaves_layers_out(model: nn.Module, calibration: Calibration) -> None:
    config = mixllm_config(calibration.plan(4.5))
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "up" in name)
    assert [record.name for record in config.records] == ["blocks.0.up.weight", "blocks.1.up.weight"]


def test_the_wrong_model(model: nn.Module, calibration: Calibration) -> None:
    plan = calibration.plan(4.5)
    with pytest.raises(ValueError, match=r"Linear\(.*no layer of the plan has these weights"):
        quantize_(TinyLM(seed=1), mixllm_config(plan, calibration))
    with torch.no_grad():
        model.blocks[1].down.weight[3, 3] += 1
    with pytest.raises(ValueError, match="before its weights changed"):
        quantize_(model, mixllm_config(plan, calibration))


def test_the_wrong_calibration(model: nn.Module, calibration: Calibration) -> None:
    plan = calibration.plan(4.5)
    with pytest.raises(ValueError, match=r"blocks\.0\.gate\.weight: the plan and the cal.*\(other weights\)"):
        mixllm_config(plan, calibrated(TinyLM(seed=1)))
    with pytest.raises(ValueError, match=r"blocks\.1\.gate\.weight: .*not measured"):
        mixllm_config(plan, calibrated(model, include=["blocks.0.*"]))


def test_already_quantized(model: nn.Module, calibration: Calibration) -> None:
    config = mixllm_config(calibration.plan(4.5))
    quantize_(model, config)
    quantize_(model, config)  # the same configuration knows its own work
    assert len(config.records) == 6
    with pytest.raises(TypeError, match="is already quantized"):
        quantize_(model, mixllm_config(calibration.plan(4.5)))


def test_meta_weights() -> None:
    with torch.device("meta"):
        model = TinyLM()
    with pytest.raises(ValueError, match="meta device"):
        quantize_(model, mixllm_config(calibrate(TinyLM()).plan(4.5)))
    with pytest.raises(ValueError, match="meta device"), pytest.warns(UserWarning, match="without a plan"):
        quantize_(model, mixllm_config())


def test_progress(model: nn.Module, calibration: Calibration) -> None:
    seen: list[tuple[int, int, str]] = []
    plan = calibration.plan(4.5)
    quantize_(model, mixllm_config(plan, progress=lambda *step: seen.append(step)))
    assert seen == [(i + 1, 6, name) for i, name in enumerate(plan.layers)]


def test_fallbacks_are_recorded_and_logged(
    model: nn.Module, calibration: Calibration, caplog: pytest.LogCaptureFixture
) -> None:
    calibration.hessians["blocks.0.down.weight"].zero_()
    config = mixllm_config(calibration.plan(4.5), calibration)
    with caplog.at_level(logging.WARNING, "torchmix"):
        quantize_(model, config)
    notes = {record.name: (record.method, record.notes) for record in config.records if record.notes}
    assert list(notes) == ["blocks.0.down.weight"]
    method, (note,) = notes["blocks.0.down.weight"]
    assert method == "clip"
    assert "the Hessian is zero" in note
    assert "no ModuleList" in caplog.messages[0]  # why not layer after layer
    assert caplog.messages[1:] == [f"blocks.0.down.weight: {note}"]


def test_without_arguments() -> None:
    """Any module: one warning, every layer within its budget, short rows left alone."""
    model = nn.Sequential(nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 128), nn.Linear(128, 64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantize_(model, config := mixllm_config())
    assert len([w for w in caught if "without a plan" in str(w.message)]) == 1
    assert [isinstance(model[i].weight, MixedPrecisionTensor) for i in (0, 2, 3)] == [True, False, True]
    assert [record.method for record in config.records] == ["clip", "clip"]
    for layer in (model[0], model[3]):
        row = max(width_costs(128, (8,), 128)) / layer.weight.numel()  # less than one row short of the budget
        assert 4.5 - row < layer.weight.bits_per_weight <= 4.5
        assert len(layer.weight.row_bits.unique()) > 1
    assert model(torch.randn(3, 128)).shape == (3, 64)


@pytest.mark.parametrize(("bits", "width"), [(1.0, 3), (100.0, 8)])
def test_a_data_free_budget_beyond_the_widths(bits: float, width: int) -> None:
    model = nn.Sequential(nn.Linear(128, 40))
    with pytest.warns(UserWarning, match="without a plan"):
        quantize_(model, mixllm_config(bits=bits))
    assert set(model[0].weight.row_bits.tolist()) == {width}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "awq"}, r"rounding='awq' is not known.*'gptq'"),
        ({"rounding": "gptq"}, "needs a calibration with Hessians"),
        ({"activation_group": "row"}, "activation_group='row' must be 'group' or 'token'"),
        ({"group_size": 100}, "group_size=100"),
    ],
    ids=str,
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixllm_config(**options)


def test_contradictions(model: nn.Module, calibration: Calibration) -> None:
    with pytest.raises(ValueError, match="a calibration without a plan"):
        mixllm_config(calibration=calibration)
    without = calibrated(model, hessians=False)
    with pytest.raises(ValueError, match="needs a calibration with Hessians"):
        mixllm_config(without.plan(4.5), without, rounding="gptq")
    assert mixllm_config(without.plan(4.5), without)._method == "clip"


def test_torchao_serializes_the_data_free_config() -> None:
    config = mixllm_config(rounding="rtn", group_size=64, activation_group="token", bits=5.0)
    stored = json.loads(json.dumps(config_to_dict(config)))
    read = config_from_dict(stored)
    assert isinstance(read, MixLLMConfig)
    assert read == config
    model = nn.Sequential(nn.Linear(128, 40))
    with pytest.warns(UserWarning, match="without a plan"):
        quantize_(model, read)
    assert isinstance(model[0].weight, MixedPrecisionTensor)


def test_configs_can_be_copied(model: nn.Module, calibration: Calibration) -> None:
    """As transformers does with the configurations it is given."""
    plan = calibration.plan(4.5)
    config = copy.deepcopy(mixllm_config(plan, calibration))
    before = copy.deepcopy(model)
    quantize_(model, config)
    check(before, model, plan, calibration, "gptq")


def test_conv1d() -> None:
    """GPT-2: stored as (K, N), never shown by ``quantize_``, quantized when the head comes by; the head stays."""
    model = tiny_gpt2().eval()
    calibration = calibrated(model)
    plan, before = calibration.plan(4.5), copy.deepcopy(model)
    config = mixllm_config(plan, calibration, rounding="gptq")
    quantize_(model, config)
    check(before, model, plan, calibration, "gptq")
    assert len(config.records) == 4
    assert model(token_ids(1, 8)).logits.shape == (1, 8, 48)


def test_experts_with_a_dead_one() -> None:
    model = tiny_mixtral(experts=8).eval()
    calibration = calibrate(model, token_ids(1, 2), sequence_length=2, num_samples=1)
    plan, before = calibration.plan(4.5), copy.deepcopy(model)
    config = mixllm_config(plan, calibration, rounding="gptq")
    quantize_(model, config)
    check(before, model, plan, calibration, "gptq")
    dead = calibration.experts_without_tokens()
    assert dead
    records: dict[str, LayerRecord] = {record.name: record for record in config.records}
    for name, experts in dead.items():
        assert records[name].method == "clip/gptq"
        assert all(str(expert) in " ".join(records[name].notes) for expert in experts)
    assert model(token_ids(1, 8)).logits.shape == (1, 8, 48)


def test_experts_and_conv1d_need_the_model() -> None:
    model, copied = tiny_gpt2(), tiny_gpt2()
    calibration = calibrated(model)
    plan = calibration.plan(4.5)
    name = next(iter(plan.layers))
    with pytest.raises(ValueError, match=rf"{name}: quantize_ shows only nn\.Linear.*model=model"):
        mixllm_config(plan)
    with pytest.raises(ValueError, match=rf"{name}: .*belong to another model object"):
        quantize_(copied, mixllm_config(plan, calibration))
    before = copy.deepcopy(copied)
    quantize_(copied, config := mixllm_config(plan, calibration, model=copied, rounding="gptq"))
    check(before, copied, plan, calibration, "gptq")
    with pytest.raises(ValueError, match="another model object"):
        quantize_(before, config)  # its weights would be left out without a word
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[3, 3] += 1
    with pytest.raises(ValueError, match=rf"{name}: the weights differ from those that were measured"):
        quantize_(model, mixllm_config(plan, calibration))


def test_layers_refuse_inputs_of_another_size(model: nn.Module, calibration: Calibration) -> None:
    """Padding to groups and to eight codes would hide a few features more or less."""
    quantize_(model, mixllm_config(calibration.plan(4.5)))
    layer = model.blocks[0].down
    assert layer(torch.randn(2, 136)).shape == (2, 128)
    for in_features in (130, 135, 137):
        with pytest.raises(ValueError, match=f"{in_features}"):
            layer(torch.randn(2, in_features))
