"""A Llama with random weights, its weights in several formats, and the two steps of generation that are timed.

The decoder blocks are those of transformers. Every block gets a static cache of its own, so that all blocks look alike
to the compiler and share one graph; the loop over the blocks is written out here.

Shapes: B sequences, T tokens of a step, C places of the cache, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernel_peers import GROUP_SIZE, Mix, scattered_bits
from torch import Tensor, nn
from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM

import torchmix
from torchmix.tensor import MixedPrecisionTensor, compile_blocks

LLAMA_8B = {  # Llama 3.1 8B
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
WEIGHT_STD = 0.02


class LayerCache:
    """Keys and values of one block, written in place; what the block's attention asks of a cache.

    keys, values: (B, heads, C, head size). positions: int64 (T,), places of the tokens of this step.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys, self.values, self.positions = keys, values, positions

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the step's keys and values; return all places."""
        self.keys.index_copy_(2, self.positions, keys)
        self.values.index_copy_(2, self.positions, values)
        return self.keys, self.values


@dataclass(frozen=True)
class State:
    """What a step reads and writes: token ids (B, T), positions (T,), a cache per block."""

    tokens: Tensor
    positions: Tensor
    caches: list[LayerCache]

    @property
    def places(self) -> int:
        """Length of the cache."""
        return self.caches[0].keys.shape[2]


def random_llama(layers: int, device: str, **changes: Any) -> LlamaForCausalLM:
    """A bfloat16 model of Llama 3.1 8B's shape (but for ``changes``) with so many blocks and random weights."""
    config = LlamaConfig(**{**LLAMA_8B, **changes, "num_hidden_layers": layers})
    with torch.device(device), _default_dtype(torch.bfloat16):
        model = LlamaForCausalLM(config)
    for block in model.model.layers:
        block.self_attn.layer_idx = 0  # each block's cache has one layer, and the compiler sees equal blocks
    return model.eval().requires_grad_(False)


def new_state(model: LlamaForCausalLM, batch: int, tokens: int, places: int) -> State:
    """Random tokens at the beginning of empty caches of so many places."""
    config, weight = model.config, model.model.embed_tokens.weight
    head_size = config.hidden_size // config.num_attention_heads
    positions = torch.arange(tokens, device=weight.device)
    shape = (batch, config.num_key_value_heads, places, head_size)
    caches = [
        LayerCache(weight.new_zeros(shape), weight.new_zeros(shape), positions)
        for _ in range(config.num_hidden_layers)
    ]
    return State(torch.randint(config.vocab_size, (batch, tokens), device=weight.device), positions, caches)


def prefill(model: LlamaForCausalLM, state: State) -> Tensor:
    """Logits (B, 1, vocabulary) after the last token of the whole input, which fills the cache."""
    return _forward(model, state, None)


def decode(model: LlamaForCausalLM, state: State) -> Tensor:
    """One greedy step in place: writes the next token and moves on. Returns the logits (B, 1, vocabulary)."""
    places = torch.arange(state.places, device=state.positions.device)
    visible = (places <= state.positions).expand(len(state.tokens), 1, 1, -1)
    logits = _forward(model, state, visible)
    state.tokens.copy_(logits.argmax(-1))
    state.positions.add_(1)
    return logits


def _forward(model: LlamaForCausalLM, state: State, mask: Tensor | None) -> Tensor:
    inner, position_ids = model.model, state.positions[None]
    hidden = inner.embed_tokens(state.tokens)
    rotary = inner.rotary_emb(hidden, position_ids=position_ids)
    for block, cache in zip(inner.layers, state.caches, strict=True):
        hidden = block(
            hidden,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=rotary,
        )
    return model.lm_head(inner.norm(hidden[:, -1:]))


def compile_model(model: LlamaForCausalLM, **options: Any) -> None:
    """Compile the blocks in place; all of them share their graphs."""
    compile_blocks(model.model.layers, fullgraph=True, **options)


def block_linears(model: LlamaForCausalLM) -> Iterator[nn.Linear]:
    """Linear layers of the blocks; embedding and head stay as they are in every format."""
    return (module for module in model.model.layers.modules() if isinstance(module, nn.Linear))


def to_torchmix(model: LlamaForCausalLM, mix: Mix, fuse: bool = False) -> None:
    """Weights of mixed widths in the kernels' layout, without rounding each of them.

    Time and memory do not depend on the values: one random weight per shape is rounded to nearest, and every layer of
    that shape gets a copy of it. Rows of each width are scattered. fuse: q, k, v and gate, up are one product each.

    Raises:
        RuntimeError: on a GPU, for weights that its kernels do not read.
    """
    rounded: dict[torch.Size, MixedPrecisionTensor] = {}
    for linear in block_linears(model):
        shape = linear.weight.shape
        if shape not in rounded:
            values = torch.empty_like(linear.weight).normal_(0, WEIGHT_STD)
            bits = scattered_bits(mix, shape[0]).to(values.device)
            rounded[shape] = MixedPrecisionTensor.from_hp(values, bits, GROUP_SIZE)
        linear.weight = nn.Parameter(rounded[shape].clone(), requires_grad=False)
    left = torchmix.repack(model).left
    if left and model.device.type == "cuda":
        raise RuntimeError(f"{len(left)} weights are not repacked; {left[0][0]}: {left[0][1]}")
    if fuse:
        torchmix.fuse_projections(model)


def to_torchao(model: LlamaForCausalLM, config: Callable[[], Any]) -> None:
    """Weights as one of torchao's configurations stores them."""
    linears = set(block_linears(model))
    quantize_(model, config(), filter_fn=lambda module, name: module in linears)


def formats(mix: Mix) -> dict[str, Callable[[LlamaForCausalLM], None]]:
    """Name -> what turns the blocks' bfloat16 weights into that format, in place."""
    int4 = partial(Int4WeightOnlyConfig, group_size=GROUP_SIZE)
    tiles = partial(int4, int4_packing_format="tile_packed_to_4d")
    return {
        "bf16": lambda model: None,
        "torchmix": partial(to_torchmix, mix=mix),
        "torchmix_fused": partial(to_torchmix, mix=mix, fuse=True),
        "torchao_int4": partial(to_torchao, config=int4),
        "torchao_int4_tinygemm": partial(to_torchao, config=tiles),
        "torchao_int8_dynamic": partial(to_torchao, config=Int8DynamicActivationInt8WeightConfig),
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
