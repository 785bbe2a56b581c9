"""Llama's parts are found by name, and a model that only looks like Llama is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.models.tiny_models import quantized_model, tiny_model
from torchmix.transforms import map_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_parts_of_a_llama(family: str) -> None:
    model = tiny_model(family)
    parts, block = map_model(model), model.model.layers[1]
    assert (parts.hidden_size, len(parts.branches)) == (128, 4)
    assert parts.embedding is model.model.embed_tokens
    assert parts.final_norm is model.model.norm
    assert parts.head is model.lm_head
    attention, mlp = parts.branches[2:]
    assert attention.norm is block.input_layernorm
    assert attention.readers == (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
    assert attention.writer is block.self_attn.o_proj
    assert mlp.norm is block.post_attention_layernorm
    assert mlp.readers == (block.mlp.gate_proj, block.mlp.up_proj)
    assert mlp.writer is block.mlp.down_proj


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("gpt2", r"GPT2LMHeadModel lacks model.embed_tokens \(Embedding\), model.norm, model.layers"),
        ("phi3", r"lacks model.layers.0.self_attn.q_proj \(Linear\)"),
        ("mixtral", r"lacks model.layers.0.mlp.gate_proj \(Linear\)"),
    ],
)
def test_missing_parts_are_named(family: str, missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        map_model(tiny_model(family))


def gemma(version: str) -> Any:
    """Llama's names, but norms with 1 + weight, and in version 2 two more norms per block."""
    import transformers

    config = getattr(transformers, f"Gemma{version}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def test_models_that_only_look_like_llama() -> None:
    with pytest.raises(ValueError, match=r"\(GemmaRMSNorm\) does not compute weight \* x / rms\(x\)"):
        map_model(gemma(""))
    with pytest.raises(
        ValueError, match=r"does not know what model.layers.0.pre_feedforward_layernorm.weight"
    ):
        map_model(gemma("2"))


def test_other_norms() -> None:
    model = tiny_model("llama")
    model.model.norm = nn.LayerNorm(128, bias=False)
    with pytest.raises(ValueError, match=r"model.norm \(LayerNorm\) does not compute"):
        map_model(model)
    model.model.norm = nn.LayerNorm(128)
    with pytest.raises(ValueError, match=r"model.norm has the parameters \['bias', 'weight'\]"):
        map_model(model)
    model.model.norm = nn.RMSNorm(128, eps=1e-6)
    assert map_model(model).final_norm is model.model.norm


def test_shared_and_quantized_weights() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    assert map_model(model).head.weight is model.model.embed_tokens.weight
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_proj.weight and .*layers.1.* share one weight"):
        map_model(model)
    with pytest.raises(ValueError, match=r"q_proj.weight is no plain float weight; rotate the original"):
        map_model(quantized_model("llama")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norms_of_any_dtype(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    model.model.norm.weight.data = torch.randn(128).to(dtype)
    assert map_model(model).final_norm is model.model.norm
