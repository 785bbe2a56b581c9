"""Problems that several test files share: packed weights with known codes, inputs, and tiny models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchmix.packing import pack_rows, pack_zero_points

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
ORDINARY_IN_FEATURES = (1, 64, 172, 320, 576, 880)
VOCABULARY = 48


@dataclass(frozen=True)
class PackedWeight:
    """A weight made from codes, not from floats: what it stores is known before anything is packed.

    codes: int8 (N, K); scale: bfloat16 (N, G); zero_points: uint8 (N, G), 0 for 8-bit rows; row_bits: uint8 (N,).
    """

    codes: Tensor
    scale: Tensor
    zero_points: Tensor
    row_bits: Tensor
    group_size: int

    def inner_on(self, device: torch.device) -> list[Tensor]:
        """:attr:`inner`, packed on the CPU, moved to a device."""
        return [part.to(device) for part in self.inner]

    @property
    def inner(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """qdata, scale, zero_point, row_bits: what the ops take."""
        return (
            pack_rows(self.codes, self.row_bits),
            self.scale,
            pack_zero_points(self.zero_points, self.row_bits),
            self.row_bits,
        )

    @property
    def centered(self) -> Tensor:
        """code - zero_point of every weight: int64 (N, K)."""
        groups = torch.arange(self.codes.shape[1]) // self.group_size
        return self.codes.long() - self.zero_points.long()[:, groups]

    @property
    def dense(self) -> Tensor:
        """scale * (code - zero_point): float64 (N, K), exact."""
        groups = torch.arange(self.codes.shape[1]) // self.group_size
        return self.scale.double()[:, groups] * self.centered.double()


def row_bits(rows: int, widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> Tensor:
    """uint8 (rows,): every width occurs where there are rows enough, in no order."""
    generator = torch.Generator().manual_seed(seed)
    cycle = torch.tensor(widths, dtype=torch.uint8).repeat(-(-rows // len(widths)))[:rows]
    return cycle[torch.randperm(rows, generator=generator)]


def random_codes(bits: Tensor, in_features: int, seed: int = 0) -> Tensor:
    """int8 (N, K): any code that a row of this width may hold (-128 is none)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 1 << 20, (len(bits), in_features), generator=generator)
    unsigned = draws % (1 << bits.long())[:, None]
    return torch.where(bits[:, None] == 8, draws % 255 - 127, unsigned).to(torch.int8)


def packed_weight(
    out_features: int,
    in_features: int,
    group_size: int = 128,
    widths: tuple[int, ...] = WIDTHS,
    seed: int = 0,
) -> PackedWeight:
    """Random codes, zero points and scales around 0.01 with rows of mixed widths."""
    generator = torch.Generator().manual_seed(seed + 1)
    bits = row_bits(out_features, widths, seed)
    groups = -(-in_features // group_size)
    draws = torch.randint(0, 1 << 20, (out_features, groups), generator=generator)
    zero_points = torch.where(bits[:, None] == 8, 0, draws % (1 << bits.long())[:, None]).to(torch.uint8)
    scale = (torch.rand((out_features, groups), generator=generator) * 0.02 + 1e-3).to(torch.bfloat16)
    return PackedWeight(random_codes(bits, in_features, seed), scale, zero_points, bits, group_size)


def correlated_inputs(tokens: int, in_features: int, seed: int = 0) -> Tensor:
    """float32 (tokens, in_features) whose features are mixtures of a few: GPTQ has something to make up with."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn((tokens, max(in_features // 4, 1)), generator=generator)
    mixing = torch.randn((few.shape[1], in_features), generator=generator)
    return few @ mixing + 0.3 * torch.randn((tokens, in_features), generator=generator)


class TinyBlock(nn.Module):
    """Gated MLP with a residual; ``gate`` and ``up`` share their input. 128 inputs, 136 in between."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(128, 136, bias=False)
        self.up = nn.Linear(128, 136, bias=False)
        self.down = nn.Linear(136, 128)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class TinyLM(nn.Module):
    """Language model without attention; each token also sees the one before it."""

    def __init__(self, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, 128)
            self.blocks = nn.Sequential(*(TinyBlock() for _ in range(blocks)))
            self.lm_head = nn.Linear(128, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(0.5)  # off while calibrating

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.lm_head(self.dropout(self.blocks(x)))


def token_ids(samples: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """int64 (samples, length)."""
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def tiny_mixtral(experts: int = 4, seed: int = 0) -> nn.Module:
    """Mixtral with random weights, 128 wide, one layer; two of ``experts`` see each token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=136,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=experts,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(config)


def tiny_gpt2(seed: int = 0) -> nn.Module:
    """GPT-2 (``Conv1D`` layers, tied head) with random weights, 128 wide, one layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=128,
        n_layer=1,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)
