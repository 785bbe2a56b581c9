"""The whole way for every supported family: calibrate, plan, quantize, run, save, load, generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

import torchmix
from tests.models.tiny_models import generated, logits, random_ids, sequential, tiny_model
from torchmix.evaluation import sqnr_db
from torchmix.selection import linear_weights
from torchmix.tensor import MixedPrecisionTensor

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gpt2", "mixtral", "qwen3_moe")
BITS = 5.25
# Gaussian weights at 5 bits: 128 inputs span about 5.2 sigma, so a step is 5.2/31 sigma, its noise step²/12 and the
# ratio 26 dB; 8-bit activations add little (above 40 dB). Errors of the layers are independent and add up in power:
# two blocks with four quantized layers in sequence (v, o, up, down) lose at most 10 log10(8) = 9 dB.
MIN_SQNR_DB = 26 - 9
TARGETS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
}


def quantized(model: Any) -> torchmix.BitPlan:
    """Quantize with real calibration; returns the plan."""
    calibration = torchmix.calibrate(model, random_ids(3, 32), sequence_length=32, num_samples=3)
    plan = calibration.plan(bits=BITS)
    config = torchmix.mixllm_config(plan, calibration)
    quantize_(model, config)
    assert {record.name for record in config.records} == set(plan.layers)
    assert all(record.method in ("sequential", "gptq") and not record.notes for record in config.records)
    return plan


def leaves(names: Any) -> set[str]:
    """The last word of each name that is not "weight"."""
    return {name.removesuffix(".weight").rpartition(".")[2] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_way(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    ids = random_ids(2, 24, seed=1)
    original = logits(model, ids)
    linears = set(linear_weights(model))
    plan = quantized(model)
    assert BITS - 0.05 < plan.bits_per_weight <= BITS
    assert leaves(plan.layers) == TARGETS.get(family, leaves(plan.layers))
    assert set(plan.layers) | {exclusion.name for exclusion in plan.excluded} >= linears

    after = logits(model, ids)
    assert sqnr_db(original, after) > MIN_SQNR_DB

    planned = torchmix.planned_checkpoint_bytes(tiny_model(family), plan)
    info = torchmix.save_pretrained(model, tmp_path / "out", plan=plan)
    assert info.checkpoint_bytes == planned
    loaded = torchmix.load_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, ids), after)
    tokens = generated(model, use_cache=True)
    for other in (model, loaded):
        for use_cache in (True, False):
            assert torch.equal(generated(other, use_cache=use_cache), tokens)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.float16), ("gpt2", torch.float16), ("mixtral", torch.bfloat16)]
)
def test_half_precision_models(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(family, dtype)
    ids = random_ids(2, 24, seed=1)
    original = logits(model, ids)
    plan = quantized(model)
    after = logits(model, ids)
    assert after.dtype == dtype
    assert sqnr_db(original.float(), after.float()) > MIN_SQNR_DB
    torchmix.save_pretrained(model, tmp_path / "out", plan=plan)
    loaded = torchmix.load_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, ids), after)


def test_the_bias_stays_beside_the_quantized_weight(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    for _, bias in model.named_parameters():
        if bias.dim() == 1:
            nn.init.normal_(bias)
    biases = {name: bias.clone() for name, bias in model.named_parameters() if name.endswith("bias")}
    assert biases
    quantized(model)
    torchmix.save_pretrained(model, tmp_path / "out")
    loaded = torchmix.load_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.get_parameter(name), bias) for name, bias in biases.items())


def squared_error(batch: tuple[Tensor, Tensor]) -> Callable[[nn.Module], Tensor]:
    """Loss of a regression on one batch."""
    x, y = batch
    return lambda model: (model(x) - y).square().sum()


def test_a_module_of_plain_linears(tmp_path: Path) -> None:
    model = sequential()
    x = torch.randn(64, 172)
    with torch.no_grad():
        original = model(x)
    # more rows than inputs: what GPTQ and refinement fit to fewer rows does not carry over to others
    batches = [(torch.randn(250, 172), torch.randn(250, 5)) for _ in range(4)]
    calibration = torchmix.calibrate(model, batches, loss_fn=lambda m, batch: squared_error(batch)(m))
    plan = calibration.plan(bits=BITS)
    quantize_(model, torchmix.mixllm_config(plan, calibration))
    with torch.no_grad():
        after = model(x)
    # three layers in sequence; rows of 172, 136 and 320 inputs have a short last group, which only helps
    assert sqnr_db(original, after) > 26 - 5
    info = torchmix.save_pretrained(model, tmp_path / "out", plan=plan)
    assert info.checkpoint_bytes == torchmix.planned_checkpoint_bytes(sequential(), plan)
    loaded: Any = torchmix.load_pretrained(tmp_path / "out", model=sequential())
    with torch.no_grad():
        assert torch.equal(loaded(x), after)
    assert isinstance(loaded[0].weight, MixedPrecisionTensor)
