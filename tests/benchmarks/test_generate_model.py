"""The written-out loop gives what transformers gives, token by token too, and all blocks share their graphs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from generate_model import block_linears, compile_model, decode, formats, new_state, prefill, random_llama
from torch._dynamo.testing import CompileCounter
from transformers import LlamaForCausalLM

import torchmix
from torchmix.tensor import TiledTensor

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
TOKENS = 6


@pytest.fixture(autouse=True)
def _no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def token_by_token(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    state = new_state(model, len(tokens), 1, TOKENS)
    for place in range(TOKENS):
        state.tokens.copy_(tokens[:, place : place + 1])
        logits = decode(model, state)
    assert state.positions.tolist() == [TOKENS]
    assert torch.equal(state.tokens, logits.argmax(-1))
    return logits


def test_steps_give_what_transformers_gives() -> None:
    model = random_llama(2, "cpu", **TINY)
    state = new_state(model, 2, TOKENS, TOKENS)
    expected = model(state.tokens, use_cache=False).logits[:, -1:]
    assert torch.equal(prefill(model, state), expected)
    # One token's product may be summed up in another order than many tokens' product.
    torch.testing.assert_close(token_by_token(model, state.tokens), expected, atol=0.02, rtol=0.02)


def test_all_blocks_share_their_graphs() -> None:
    model = random_llama(12, "cpu", **TINY)  # above the limit of 8 recompilations
    state = new_state(model, 2, TOKENS, TOKENS)
    expected = prefill(model, state), token_by_token(model, state.tokens)
    counter = CompileCounter()
    compile_model(model, backend=counter)
    assert torch.equal(token_by_token(model, state.tokens), expected[1])
    assert counter.frame_count == 1
    assert torch.equal(prefill(model, state), expected[0])
    assert counter.frame_count == 2


def mixed_llama(layers: int, monkeypatch: pytest.MonkeyPatch, name: str = "torchmix") -> LlamaForCausalLM:
    """torchmix weights in tiles, as on a GPU with kernels."""
    monkeypatch.setattr(torchmix, "repack", partial(torchmix.repack, force=True))
    model = random_llama(layers, "cpu", **TINY)
    formats({8: 0.25, 4: 0.75})[name](model)
    return model


def test_torchmix_weights_have_the_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed_llama(2, monkeypatch)
    weights = [linear.weight for linear in block_linears(model)]
    assert len(weights) == 14
    assert all(isinstance(weight, TiledTensor) for weight in weights)
    for weight in weights:
        assert int((weight.to_plain().row_bits == 8).sum()) == weight.shape[0] // 4
    assert len({weight.tiles.data_ptr() for weight in weights}) == len(weights)
    assert not isinstance(model.lm_head.weight, TiledTensor)
    assert torch.isfinite(prefill(model, new_state(model, 1, 3, 3))).all()


@pytest.mark.parametrize("name", ["torchmix", "torchmix_fused"])
def test_torchmix_blocks_share_their_graphs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = mixed_llama(10, monkeypatch, name)
    state = new_state(model, 2, TOKENS, TOKENS)
    expected = prefill(model, state)
    counter = CompileCounter()
    compile_model(model, backend=counter)
    assert torch.equal(prefill(model, state), expected)
    assert counter.frame_count == 1


def test_bf16_is_left_as_it_is() -> None:
    model = random_llama(1, "cpu", **TINY)
    formats({4: 1.0})["bf16"](model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
