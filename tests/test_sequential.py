"""Sequential rounding: which layers, from which inputs, and what it gains over one-shot GPTQ."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import torchmix
from tests.models.tiny_models import random_ids, tiny_model
from torchmix.capture import NotReplayableError
from torchmix.evaluation import sqnr_db
from torchmix.rounding import gptq_round
from torchmix.selection import select_parameters
from torchmix.sequential import SequentialRounding, round_sequentially

SETTINGS = SequentialRounding(group_size=128, per_token=False, refit=0.5)


@pytest.fixture(scope="module")
def measured():
    """A tiny Llama, its calibration and a plan of 4 bits."""
    model, samples = tiny_model("llama"), random_ids(8, 64)
    calibration = torchmix.calibrate(model, samples, num_samples=8, sequence_length=64)
    return model, samples, calibration, calibration.plan(widths=(4,))


def run(measured, settings=SETTINGS):
    model, samples, _, plan = measured
    widths = {name: layer.row_bits for name, layer in plan.layers.items()}
    return round_sequentially(model, select_parameters(model).targets, widths, samples, settings)


def test_every_layer_is_rounded_and_the_model_is_untouched(measured):
    model, *_, plan = measured
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = run(measured)
    assert list(rounded) == list(plan.layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_runs_give_the_same_codes(measured):
    first, second = run(measured), run(measured)
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)


def test_first_layer_without_refit_is_gptq_on_int8_inputs(measured):
    """Nothing is quantized before the first layers, so only the activation quantizer changes their Hessian."""
    model, samples, _, plan = measured
    name = "model.layers.0.self_attn.q_proj.weight"
    rounded = run(measured, SequentialRounding(128, False, refit=0.0, refine=0))
    block = model.model.layers[0]
    with torch.no_grad():
        x = block.input_layernorm(model.model.embed_tokens(samples)).flatten(0, 1)
    codes, scale, _ = torch.ops.torchmix.quantize_activation(x, 128)
    x = codes.float() * scale
    expected = gptq_round(block.self_attn.q_proj.weight.detach(), plan.layers[name].row_bits, 128, x.T @ x)
    agree = (rounded[name].codes == expected.codes).float().mean()
    assert agree > 0.99  # sums over samples in another order can tip a rounding


def test_refit_brings_the_outputs_closer_than_one_shot_gptq(measured):
    model, samples, calibration, plan = measured
    one_shot, sequential = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(one_shot, torchmix.mixllm_config(plan, calibration, rounding="gptq"))
    quantize_(sequential, torchmix.mixllm_config(plan, calibration, rounding="sequential", model=sequential))
    with torch.no_grad():
        wanted = model(samples).logits
        assert sqnr_db(wanted, sequential(samples).logits) > sqnr_db(wanted, one_shot(samples).logits)


def test_experts_are_left_to_the_caller():
    model, samples = tiny_model("mixtral"), random_ids(2, 32)
    targets = select_parameters(model).targets
    widths = {t.name: torch.full(t.rows.shape[:-1], 4, dtype=torch.uint8) for t in targets}
    rounded = round_sequentially(model, targets, widths, samples, SETTINGS)
    assert rounded
    assert not any("experts" in name for name in rounded)


def test_conv1d_weights_are_rounded_by_their_rows():
    model, samples = tiny_model("gpt2"), random_ids(2, 32)
    targets = select_parameters(model).targets
    widths = {t.name: torch.full(t.rows.shape[:-1], 4, dtype=torch.uint8) for t in targets}
    rounded = round_sequentially(model, targets, widths, samples, SETTINGS)
    assert {t.name: tuple(t.rows.shape) for t in targets} == {
        n: tuple(r.codes.shape) for n, r in rounded.items()
    }


def test_a_module_without_blocks_is_refused():
    model = nn.Sequential(nn.Embedding(10, 128), nn.Linear(128, 128))
    targets = select_parameters(model).targets
    with pytest.raises(NotReplayableError, match="no ModuleList"):
        round_sequentially(model, targets, {}, torch.zeros(1, 4, dtype=torch.long), SETTINGS)
