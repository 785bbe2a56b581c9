"""What transformers' hooks get from us: which stored names belong together, and what is refused early."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.models.tiny_models import error_of, logits, quantized_model, random_ids, tiny_model
from torchmix.checkpoint import load_pretrained, save_pretrained
from torchmix.checkpoint_format import PARTS, CheckpointConfig, LayerFormat
from torchmix.huggingface_quantizer import Assemble, TorchmixHfQuantizer, TorchmixQuantizationConfig
from torchmix.tensor import MixedPrecisionTensor

NAMES = ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.experts.down_proj", "head")


@pytest.fixture
def quantizer() -> TorchmixHfQuantizer:
    layers = {name: LayerFormat((8, 64)) for name in NAMES}
    config = CheckpointConfig(128, False, layers, bits_per_weight=4.5)
    return TorchmixHfQuantizer(TorchmixQuantizationConfig(**config.to_dict()), pre_quantized=True)


def match(quantizer: TorchmixHfQuantizer, stored: str) -> tuple[str, str | None]:
    """Parameter that a stored name belongs to, and the pattern that said so (None: nothing of ours)."""
    for converter in quantizer.get_weight_conversions():
        name, pattern = converter.rename_source_key(stored)
        if pattern is not None:
            return name, pattern
    return stored, None


def test_stored_names_lead_to_their_parameter(quantizer):
    for name in NAMES:
        for suffix in PARTS.values():
            found, pattern = match(quantizer, name + suffix)
            assert found == name
            assert pattern is not None


@pytest.mark.parametrize(
    "stored",
    [
        "model.norm.weight",
        "model.layers.0.mlp.down_proj.bias",
        "model.layers.1.mlp.down_proj.weight",  # a plain layer with a name that is quantized elsewhere
        "model.layers.1.mlp.experts.down_proj.weight",
        "model.layers.0.mlp.down_proj.weight_scale_2",
        "x.model.layers.0.mlp.down_proj.weight",
        "modelXlayers.0.mlp.down_proj.weight",
        "header",
        "a.head",
    ],
)
def test_other_names_are_left_alone(quantizer, stored):
    assert match(quantizer, stored) == (stored, None)


def test_names_with_special_characters():
    name = "block.w(1)+[0]*.weight"
    config = CheckpointConfig(128, False, {name: LayerFormat((8, 64))})
    quantizer = TorchmixHfQuantizer(TorchmixQuantizationConfig(**config.to_dict()), pre_quantized=True)
    assert match(quantizer, name + "_scale")[0] == name
    assert match(quantizer, "block.w(1)+[0]x.weight_scale")[1] is None


def test_original_renamings_are_not_applied(quantizer):
    converters = quantizer.update_weight_conversions(["renaming"], nn.Module())
    assert [type(converter).__name__ for converter in converters] == ["WeightConverter"] * 3


def test_copies_for_every_tensor_cost_nothing(quantizer):
    import copy

    (first, *_) = quantizer.get_weight_conversions()
    assert copy.deepcopy(first).operations[0] is first.operations[0]


def test_assembling_needs_all_parts(quantizer):
    model = nn.Module()
    model.head = nn.Parameter(torch.empty(8, 64, dtype=torch.bfloat16))
    weight = MixedPrecisionTensor.from_hp(torch.randn(8, 64), 4, 128)
    sources = [f"pattern{i}" for i in range(4)]
    parts = {source: [getattr(weight, part)] for source, part in zip(sources, PARTS, strict=True)}
    options: dict[str, Any] = {"full_layer_name": "head", "model": model, "source_patterns": sources}
    (parameter,) = Assemble(quantizer).convert(parts, **options).values()
    assert parameter.dtype == torch.bfloat16
    assert not parameter.requires_grad
    assert torch.equal(parameter.dequantize(torch.float32), weight.dequantize())
    del parts["pattern1"]
    with pytest.raises(ValueError, match=r"head: the checkpoint lacks \['scale'\]"):
        Assemble(quantizer).convert(parts, **options)


def test_sizes_for_the_device_map(quantizer):
    dense = torch.empty(1, dtype=torch.float32)
    assert quantizer.param_element_size(None, NAMES[0], dense) == 4.5 / 8
    assert quantizer.param_element_size(None, "model.norm.weight", dense) == 4


def test_answers_to_transformers(quantizer):
    assert quantizer.is_serializable()
    assert quantizer.is_compileable
    assert not quantizer.is_trainable
    assert quantizer.quantization_config.to_diff_dict() == quantizer.quantization_config.to_dict()


def test_disk_and_foreign_dtypes_are_refused_before_loading(quantizer, tmp_path):
    assert quantizer.update_device_map("auto") == "auto"
    assert quantizer.update_device_map({"": "cpu"}) == {"": "cpu"}
    assert quantizer.update_dtype(None) is None
    model, _ = quantized_model("llama")
    save_pretrained(model, tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    message = error_of(lambda: load(tmp_path / "out", dtype=torch.float64))
    assert message.startswith("TypeError: dtype=torch.float64 is not one that quantized weights can have")
    pytest.importorskip("accelerate")
    message = error_of(
        lambda: load(tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path / "disk")
    )
    assert message.startswith("ValueError: device_map puts weights on disk")


def test_quantizing_while_loading_is_not_offered(quantizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match="torchmix does require the model to be pre-quantized"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "original", quantization_config=quantizer.quantization_config
        )


def test_a_plain_layer_beside_experts_of_the_same_name(tmp_path):
    model, plan = quantized_model("qwen2_moe")
    assert "model.layers.0.mlp.experts.down_proj" in plan.layers
    assert "model.layers.0.mlp.shared_expert.down_proj.weight" in plan.layers
    save_pretrained(model, tmp_path / "out")
    ids = random_ids(2, 8)
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), ids), logits(model, ids))


def test_the_base_model_alone_is_refused_by_name(tmp_path):
    model, _ = quantized_model("llama")
    save_pretrained(model, tmp_path / "out")
    message = error_of(lambda: transformers.AutoModel.from_pretrained(tmp_path / "out"))
    assert (
        "model.layers.0.self_attn.q_proj.weight: the checkpoint has shape (128, 128), LlamaModel has no"
        in message
    )
    assert "load the class that config.json names under architectures" in message
