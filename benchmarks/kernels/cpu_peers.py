"""The peers of the CPU benchmark: how each stores a weight, and what it does for one call.

All are made from one bfloat16 weight; quantized ones get random codes of the right size where only time matters.
Times include the quantization of the activations wherever a peer has one, except for ``qlinear``, which takes its
activations quantized.

Shapes: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from kernel_peers import GROUP_SIZE, parse_mix, scattered_bits
from torch import Tensor, nn
from torch.nn.functional import linear

from torchmix.ops import mixed_linear
from torchmix.packing import packed_sizes

BASELINE = "bf16"
MIXED = "8:10,4:90"
OUR_MIXES = (MIXED, "3", "4", "5", "6", "8")
Call = Callable[[Tensor], Tensor]  # bfloat16 (M, K) -> (M, N)


@dataclass(frozen=True)
class CpuPeer:
    """A weight in the form of one peer.

    weight_bytes: as stored. call: the whole operation. make_copy: the same with its own memory.
    most_tokens: the largest M that is worth the time.
    """

    weight_bytes: int
    make_copy: Callable[[], Call]
    most_tokens: int | None = None


def our_weight(weight: Tensor, mix: str) -> tuple[Tensor, ...]:
    """qdata, scale, zero_point and row_bits with random codes."""
    rows, inputs = weight.shape
    bits = scattered_bits(parse_mix(mix), rows)
    codes, zero_points = packed_sizes(bits, inputs, GROUP_SIZE)
    scale = torch.rand(rows, -(-inputs // GROUP_SIZE)).add_(0.5).mul_(0.01).bfloat16()
    return (_random_bytes(codes), scale, _random_bytes(zero_points), bits)


def _random_bytes(count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


def ours(weight: Tensor, mix: str) -> CpuPeer:
    """torchmix, activations quantized inside."""
    inner = our_weight(weight, mix)

    def make_copy() -> Call:
        own = [part.clone() for part in inner]
        return lambda x: mixed_linear(x, *own, None, GROUP_SIZE)

    return CpuPeer(sum(part.nbytes for part in inner), make_copy)


def dense(weight: Tensor, dtype: torch.dtype) -> CpuPeer:
    """``F.linear`` on activations of the same dtype."""

    def make_copy() -> Call:
        own = weight.to(dtype, copy=True)
        return lambda x: linear(x.to(dtype), own)

    return CpuPeer(weight.numel() * dtype.itemsize, make_copy)


def int4pack(weight: Tensor) -> CpuPeer:
    """Weight-only 4 bits, groups of 128."""
    rows, inputs = weight.shape
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.int32)
    scales = torch.rand(inputs // GROUP_SIZE, rows, 2).mul_(0.01).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    def make_copy() -> Call:
        own, parameters = packed.clone(), scales.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, own, GROUP_SIZE, parameters)

    return CpuPeer(packed.nbytes + scales.nbytes, make_copy, most_tokens=64)


def qlinear(weight: Tensor) -> CpuPeer:
    """oneDNN int8, one scale per row, activations uint8 per tensor and quantized outside of the time."""
    rows = weight.shape[0]
    codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8)

    def make_copy() -> Call:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        scales, zeros = torch.full((rows,), 0.01), torch.zeros(rows, dtype=torch.int32)
        inputs: dict[int, Tensor] = {}

        def call(x: Tensor) -> Tensor:
            if len(x) not in inputs:
                inputs[len(x)] = x.float().mul(20).add(128).clamp(0, 255).to(torch.uint8)
            operands = (
                inputs[len(x)],
                0.05,
                128,
                packed,
                scales,
                zeros,
                None,
                1.0,
                0,
                torch.bfloat16,
                "none",
                [],
                "",
            )
            return torch.ops.onednn.qlinear_pointwise(*operands)

        return call

    return CpuPeer(codes.nbytes, make_copy)


def linear_dynamic(weight: Tensor) -> CpuPeer:
    """``quantized.linear_dynamic``: int8, float32 activations quantized per tensor inside."""
    scales, zeros = torch.full((weight.shape[0],), 0.01), torch.zeros(weight.shape[0], dtype=torch.long)
    quantized = torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)

    def make_copy() -> Call:
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed)

    return CpuPeer(weight.numel(), make_copy)


def torchao_w8a8(weight: Tensor) -> CpuPeer:
    """torchao's dynamic int8 configuration, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    rows, inputs = weight.shape
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # every copy is compiled for every number of tokens

    def make_copy() -> Call:
        layer = nn.Linear(inputs, rows, bias=False, dtype=torch.bfloat16)
        layer.weight.data = weight.clone()
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        return torch.compile(layer, dynamic=False)

    return CpuPeer(weight.numel(), make_copy)


PEERS: dict[str, Callable[[Tensor], CpuPeer]] = {
    BASELINE: lambda weight: dense(weight, torch.bfloat16),
    "fp32": lambda weight: dense(weight, torch.float32),
    "int4pack": int4pack,
    "qlinear": qlinear,
    "linear_dynamic": linear_dynamic,
    "torchao_w8a8": torchao_w8a8,
    **{f"torchmix {mix}": lambda weight, mix=mix: ours(weight, mix) for mix in OUR_MIXES},
}


def chosen_peers(names: Sequence[str]) -> list[str]:
    """The baseline first, then the others once each. Raises ValueError for a name that is none."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not among {'; '.join(PEERS)}")
    return list(dict.fromkeys((BASELINE, *names)))
