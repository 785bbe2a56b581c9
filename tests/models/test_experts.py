"""Fused experts: every way in which transformers runs them, experts without tokens, original checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torchao.quantization import quantize_

import torchmix
from tests.models.tiny_models import (
    EXPERT_FAMILIES,
    apply_plan,
    logits,
    quantized_model,
    random_ids,
    random_plan,
    tiny_model,
)
from torchmix.evaluation import sqnr_db
from torchmix.huggingface import load_model
from torchmix.tensor import MixedPrecisionTensor

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# The integer products are equal; what differs is the order of a few float additions and, in bfloat16, where the
# result of one expert is rounded (8 bits of mantissa: a relative error of 2**-9, so 54 dB).
MIN_SQNR_DB = {torch.float32: 100.0, torch.bfloat16: 40.0}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("mixtral", torch.float32), ("mixtral", torch.bfloat16), ("qwen3_moe", torch.float32)],
)
def test_all_implementations_agree(family: str, dtype: torch.dtype) -> None:
    model, _ = quantized_model(family, dtype, num_hidden_layers=1)
    ids = random_ids(2, 8)
    outputs = {}
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        outputs[implementation] = logits(model, ids).float()
    dense = tiny_model(family, dtype, num_hidden_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if isinstance(parameter, MixedPrecisionTensor):
                dense.get_parameter(name).copy_(parameter.dequantize())
    for implementation, output in outputs.items():
        assert sqnr_db(outputs["eager"], output) > MIN_SQNR_DB[dtype], implementation
        # against the dequantized model only the 8-bit activations differ
        assert sqnr_db(logits(dense, ids).float(), output) > 30, implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_compiled_without_graph_breaks(family: str, dtype: torch.dtype) -> None:
    model, _ = quantized_model(family, dtype, num_hidden_layers=1)
    model.set_experts_implementation("grouped_mm")
    ids = random_ids(2, 16)
    expected = logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert sqnr_db(expected.float(), logits(compiled, ids).float()) > MIN_SQNR_DB[dtype]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_without_tokens(implementation: str, tmp_path: Path) -> None:
    sizes = {"num_local_experts": 16, "num_hidden_layers": 1}
    model = tiny_model("mixtral", **sizes)
    calibration = torchmix.calibrate(model, random_ids(1, 4), sequence_length=4, num_samples=1)
    without = calibration.experts_without_tokens()
    assert set(without) == {name for name in calibration.layers if "experts" in name}
    assert all(8 <= len(experts) <= 14 for experts in without.values())  # 4 tokens reach 2 to 8 of 16 experts
    plan = calibration.plan(bits=4.5)
    config = torchmix.mixllm_config(plan, calibration)
    quantize_(model, config)
    for record in config.records:
        assert bool(record.notes) == (record.name in without)
        if record.notes:
            assert "no calibration token" in record.notes[0]
    model.set_experts_implementation(implementation)
    ids = random_ids(2, 16)  # now other experts are asked
    output = logits(model, ids)
    assert output.isfinite().all()
    # 4.25 bits for codes give 21 dB per layer also without data; four layers in sequence lose 6 dB
    assert sqnr_db(logits(tiny_model("mixtral", **sizes), ids), output) > 15
    torchmix.save_pretrained(model, tmp_path / "out", plan=plan)
    loaded: Any = torchmix.load_pretrained(tmp_path / "out")
    loaded.set_experts_implementation(implementation)
    assert torch.equal(logits(loaded, ids), output)


def keys(directory: Path) -> set[str]:
    """Names of all stored tensors."""
    found: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.down_proj.weight"),
    ],
)
def test_checkpoints_with_one_key_per_expert(family: str, key: str, tmp_path: Path) -> None:
    original = tiny_model(family)
    original.save_pretrained(tmp_path / "original")
    assert key in keys(tmp_path / "original")
    model = load_model(tmp_path / "original")
    ids = random_ids(2, 8)
    assert torch.equal(logits(model, ids), logits(original, ids))
    plan = random_plan(model)
    apply_plan(model, plan)
    torchmix.save_pretrained(model, tmp_path / "out", plan=plan)
    assert {"model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj_scale"} <= keys(
        tmp_path / "out"
    )
    loaded: Any = torchmix.load_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    loaded.save_pretrained(tmp_path / "again")
    assert keys(tmp_path / "again") == keys(tmp_path / "out")
    assert torch.equal(logits(torchmix.load_pretrained(tmp_path / "again"), ids), logits(model, ids))
    data = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert data["layers"]["model.layers.1.mlp.experts.down_proj"]["shape"][0] == 4
