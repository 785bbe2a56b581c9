"""Compiled transformers models: fused experts, Conv1D, and decoder layers compiled one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.composition.mixed_models import GraphCounter, quantize_linears, quantized
from tests.generators import VOCABULARY, tiny_gpt2, tiny_mixtral, token_ids
from torchmix.tensor import MixedPrecisionTensor, compile_blocks

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_one_graph(model: nn.Module, lengths: tuple[int, ...] = (7, 5, 9)) -> None:
    """Logits of the compiled model have the same bits; one graph serves all lengths."""
    counter = GraphCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for length in lengths:
            ids = token_ids(2, length)
            expected = model(ids, use_cache=False).logits
            assert torch.equal(compiled(ids, use_cache=False).logits, expected)
    assert counter.count == 1


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    model = tiny_mixtral().eval()
    quantize_linears(model.model.layers[0].self_attn)
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = quantized(experts.gate_up_proj, 1)
    experts.down_proj = quantized(experts.down_proj, 2)
    return model


@pytest.mark.parametrize("implementation", ["grouped_mm", pytest.param("batched_mm", marks=pytest.mark.slow)])
def test_fused_experts(mixtral: nn.Module, implementation: str) -> None:
    """transformers' ways to run experts: a loop (``eager``), one product for all, or gathered experts."""
    ids = token_ids(2, 7)
    with torch.no_grad():
        mixtral.set_experts_implementation("eager")
        expected = mixtral(ids).logits
        mixtral.set_experts_implementation(implementation)
        torch.testing.assert_close(mixtral(ids).logits, expected, rtol=1e-5, atol=1e-6)  # order of the sums
    assert_one_graph(mixtral)


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    model = tiny_gpt2().eval()
    layers = [layer for layer in model.modules() if isinstance(layer, Conv1D)]
    for layer in layers:
        bits = torch.full((layer.weight.shape[1],), 5, dtype=torch.uint8)
        weight = MixedPrecisionTensor.from_hp(layer.weight.detach(), bits, 64, transposed=True)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    assert len(layers) == 4
    assert_one_graph(model)
    assert model.generate(token_ids(1, 4), max_new_tokens=2, do_sample=False).shape[1] > 4


def tiny_llama(quantize: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 136, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=3, max_position_embeddings=64, **sizes)
    model = LlamaForCausalLM(config).eval()
    for number, layer in enumerate(model.model.layers):
        if quantize:
            quantize_linears(layer, seed=100 * number)
    return model


def graphs_of_layers(model: nn.Module, use_cache: bool) -> int:
    """Graphs of decoder layers that are compiled one by one, over three lengths."""
    counter = GraphCounter("eager")

    def logits(length: int) -> Tensor:
        return model(token_ids(2, length), use_cache=use_cache).logits

    with torch.no_grad():
        expected = [logits(length) for length in (5, 9, 12)]
        compile_blocks(model.model.layers, fullgraph=True, dynamic=True, backend=counter)
        found = [logits(length) for length in (5, 9, 12)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    return counter.count


@pytest.mark.parametrize(("use_cache", "graphs"), [(False, 1), pytest.param(True, 3, marks=pytest.mark.slow)])
def test_decoder_layers_one_by_one(use_cache: bool, graphs: int) -> None:
    """As many graphs as the dense model: with a cache its layers differ by ``layer_idx``."""
    assert graphs_of_layers(tiny_llama(quantize=False), use_cache) == graphs
    torch._dynamo.reset()
    assert graphs_of_layers(tiny_llama(quantize=True), use_cache) == graphs
