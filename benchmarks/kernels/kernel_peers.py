"""The peers of the kernel benchmark: how each stores a weight, takes its activations, and multiplies.

All are made from one bfloat16 weight of normal numbers; activations are normal with a few outlier inputs. What a peer
does to its activations beforehand is outside of its time, except for ``torchmix+activation``. Every peer says which
float32 operands it stands for, so that its result can be checked.

Shapes: M tokens, N out_features, K in_features, G = K / 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from kernel_results import ACTIVATION, BASELINE, OURS, OURS_WITH_ACTIVATION, PREPARED
from torch import Tensor

from torchmix.ops import prepare_activation, quantize_activation
from torchmix.ops.prepare_activation import unprepare
from torchmix.packing import pack_rows, pack_zero_points
from torchmix.primitives import choose_qparams, dequantize, quantize
from torchmix.tiles import pack_tiles

GROUP_SIZE = 128
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
INT8_MAX = 127.0
TINYGEMM_INNER_TILES, TINYGEMM_MIDDLE = 8, 8
OUTLIER_INPUTS, OUTLIER_FACTOR = 8, 16.0
MOST_CHECKED_TOKENS, CHECKED_ROWS_AT_A_TIME = 32, 8192
LARGEST_ERROR = 0.02  # fp8 with its fast accumulation has 0.005 at K = 28672

Operands = tuple[Tensor, ...]
Mix = dict[int, float]  # width -> share of the rows


@dataclass(frozen=True)
class Layer:
    """A weight in the form of one peer.

    weights: what its multiplication reads, whole; the benchmark rotates over copies of it.
    activate: bf16 (M, K) -> operands, outside of the time. multiply: (operands, weights) -> (M, N).
    dense: float32 values of rows of the weight. dense_input: float32 (M, K) values of the operands.
    """

    weights: Operands
    activate: Callable[[Tensor], Operands]
    multiply: Callable[[Operands, Operands], Tensor]
    dense: Callable[[slice], Tensor]
    dense_input: Callable[[Operands], Tensor]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as this peer stores it, parameters included."""
        return sum(tensor.nbytes for tensor in self.weights)


@dataclass(frozen=True)
class Peer:
    """How to build a layer, and for how many tokens it is meant."""

    build: Callable[[Tensor], Layer]
    least_tokens: int = 1
    most_tokens: int | None = None

    def takes(self, tokens: int) -> bool:
        """Whether the peer is measured with so many tokens."""
        return self.least_tokens <= tokens and (self.most_tokens is None or tokens <= self.most_tokens)


def random_weight(out_features: int, in_features: int, device: str) -> Tensor:
    """Normal numbers with standard deviation 0.02: bfloat16 (N, K)."""
    return torch.empty((out_features, in_features), dtype=torch.bfloat16, device=device).normal_(0, 0.02)


def random_input(tokens: int, in_features: int, device: str) -> Tensor:
    """Normal numbers, some inputs 16 times larger: bfloat16 (M, K)."""
    x = torch.randn((tokens, in_features), device=device)
    x[:, torch.randperm(in_features, device=device)[:OUTLIER_INPUTS]] *= OUTLIER_FACTOR
    return x.bfloat16()


def bf16(weight: Tensor) -> Layer:
    """``F.linear`` in bfloat16, which is cuBLAS."""
    return Layer(
        (weight,),
        lambda x: (x,),
        lambda x, w: torch.nn.functional.linear(x[0], w[0]),
        lambda rows: weight[rows].float(),
        lambda x: x[0].float(),
    )


def fp8(weight: Tensor, by_row: bool) -> Layer:
    """``torch._scaled_mm``, e4m3 with fast accumulation, one scale per tensor or per token and row."""

    def scaled(values: Tensor) -> Operands:
        largest = values.abs().amax(-1, keepdim=True) if by_row else values.abs().amax()
        scale = largest.float() / FP8_MAX
        return (values.float() / scale).to(FP8), scale

    def multiply(x: Operands, w: Operands) -> Tensor:
        return torch._scaled_mm(
            x[0], w[0].t(), scale_a=x[1], scale_b=w[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )

    codes, scale = scaled(weight)
    return Layer(
        (codes, scale),
        scaled,
        multiply,
        lambda rows: codes[rows].float() * (scale[rows] if by_row else scale),
        lambda x: x[0].float() * x[1],
    )


def int8(weight: Tensor) -> Layer:
    """``torch._int_mm``: integers of one scale per tensor, int32 out, nothing scaled."""

    def integers(values: Tensor) -> Operands:
        scale = values.abs().amax().float() / INT8_MAX
        return (torch.round(values.float() / scale).to(torch.int8),)

    weights = integers(weight)
    return Layer(
        weights,
        integers,
        lambda x, w: torch._int_mm(x[0], w[0].t()),
        lambda rows: weights[0][rows].float(),
        lambda x: x[0].float(),
    )


def tinygemm(weight: Tensor) -> Layer:
    """``_weight_int4pack_mm``: 4 bits, groups of 128, bfloat16 activations and parameters."""
    bits = torch.full((weight.shape[0],), 4, dtype=torch.uint8, device=weight.device)
    scale, zero_point = choose_qparams(weight, bits, GROUP_SIZE)
    codes = quantize(weight, scale, zero_point, bits, GROUP_SIZE)
    nibbles = codes.view(torch.uint8)
    nibbles = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(nibbles.contiguous(), TINYGEMM_INNER_TILES)
    # Its weight is scale * (code - 8) + offset.
    offset = ((TINYGEMM_MIDDLE - zero_point.float()) * scale.float()).bfloat16()
    scale_and_offset = torch.stack([scale, offset], -1).transpose(0, 1).contiguous()  # (G, N, 2)

    def dense(rows: slice) -> Tensor:
        middle = torch.full_like(scale[rows], TINYGEMM_MIDDLE)
        values = dequantize(codes[rows], scale[rows], middle, GROUP_SIZE)
        return values + offset[rows].float().repeat_interleave(GROUP_SIZE, 1)[:, : values.shape[1]]

    return Layer(
        (packed, scale_and_offset),
        lambda x: (x,),
        lambda x, w: torch.ops.aten._weight_int4pack_mm(x[0], w[0], GROUP_SIZE, w[1]),
        dense,
        lambda x: x[0].float(),
    )


def our_layers(weight: Tensor, mix: Mix) -> dict[str, Layer]:
    """torchmix in its tile layout, on activations prepared outside of the time, and with their quantization inside.

    Args:
        weight: bfloat16 (N, K).
        mix: shares of the widths; the rows of each width are scattered at random.
    """
    out_features, in_features = weight.shape
    bits = scattered_bits(mix, out_features).to(weight.device)
    scale, zero_point = choose_qparams(weight, bits, GROUP_SIZE)
    codes = quantize(weight, scale, zero_point, bits, GROUP_SIZE)
    packed = pack_rows(codes, bits), scale, pack_zero_points(zero_point, bits)
    ops = torch.ops.torchmix

    def values(codes: Tensor, activation_scale: Tensor, _: Tensor) -> Tensor:
        return dequantize(codes, activation_scale, torch.zeros_like(activation_scale), GROUP_SIZE)

    def multiply(x: Operands, w: Operands) -> Tensor:
        sizes = len(x[1]), in_features
        return ops.mixed_linear_tiled_prepared(x[0], *sizes, *w, None, out_features, torch.bfloat16)

    outside = Layer(
        tuple(pack_tiles(*packed, bits, in_features)),
        lambda x: (prepare_activation(x), x),  # x says how many tokens there are
        multiply,
        lambda rows: dequantize(codes[rows], scale[rows], zero_point[rows], GROUP_SIZE),
        lambda x: values(*unprepare(x[0], len(x[1]), in_features)),
    )
    inside = replace(
        outside,
        activate=lambda x: (x,),
        multiply=lambda x, w: ops.mixed_linear_tiled(x[0], *w, None, out_features),
        dense_input=lambda x: values(*quantize_activation(x[0], GROUP_SIZE)),
    )
    return {OURS: outside, OURS_WITH_ACTIVATION: inside}


PEERS: dict[str, Peer] = {
    BASELINE: Peer(bf16),
    "fp8_tensor": Peer(partial(fp8, by_row=False)),
    "fp8_row": Peer(partial(fp8, by_row=True)),
    "int8_int_mm": Peer(int8, least_tokens=32),
    "tinygemm_w4a16": Peer(tinygemm, most_tokens=16),
}


ACTIVATIONS: dict[str, Callable[[Tensor], Operands]] = {
    ACTIVATION: lambda x: quantize_activation(x, GROUP_SIZE),
    PREPARED: lambda x: (prepare_activation(x),),
}


def activation_codes(name: str, result: Operands, x: Tensor) -> Tensor:
    """Codes int8 (M, K) among what one of :data:`ACTIVATIONS` gives for x (M, K)."""
    return result[0] if name == ACTIVATION else unprepare(result[0], *x.shape)[0]


def parse_mix(text: str) -> Mix:
    """Shares from ``"8:10,4:90"`` (percent of the rows at each width) or ``"8"`` (all rows).

    Raises:
        ValueError: for a width outside 2..8, one that comes twice, or shares that do not add up to 100.
    """
    shares: Mix = {}
    for part in text.split(","):
        width, _, percent = part.partition(":")
        try:
            bits, share = int(width), float(percent or 100)
        except ValueError as error:
            raise ValueError(f"--row-bits {text!r}: write widths and percents like 8:10,4:90") from error
        if not 2 <= bits <= 8 or bits in shares or share <= 0:
            raise ValueError(f"--row-bits {text!r}: {part!r} is no new width of 2..8 with a positive share")
        shares[bits] = share / 100
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(
            f"--row-bits {text!r}: the shares add up to {100 * sum(shares.values()):g} %, not to 100"
        )
    return dict(sorted(shares.items(), reverse=True))


def mix_name(mix: Mix) -> str:
    """The text that :func:`parse_mix` reads, widest first: "8:10,4:90", or "8" for one width."""
    if len(mix) == 1:
        return str(next(iter(mix)))
    return ",".join(f"{bits}:{100 * share:g}" for bits, share in mix.items())


def scattered_bits(mix: Mix, num_rows: int) -> Tensor:
    """A width for every row, each width as often as its share says, in random order: uint8 (N,)."""
    ends = [0]
    for share in mix.values():
        ends.append(ends[-1] + share * num_rows)
    counts = [round(end) - round(start) for start, end in pairwise(ends)]
    bits = torch.repeat_interleave(torch.tensor(list(mix), dtype=torch.uint8), torch.tensor(counts))
    return bits[torch.randperm(num_rows)]


def relative_error(layer: Layer, operands: Operands, result: Tensor) -> float:
    """|result - exact| / |exact| over some tokens, first and last among them, and all rows, in float32."""
    tokens = _some_tokens(result)
    x = layer.dense_input(operands)[tokens]
    error = norm = 0.0
    for start in range(0, result.shape[1], CHECKED_ROWS_AT_A_TIME):
        rows = slice(start, start + CHECKED_ROWS_AT_A_TIME)
        exact = x @ layer.dense(rows).T
        error += (result[tokens, rows].float() - exact).double().square().sum()
        norm += exact.double().square().sum()
    return float((error / norm) ** 0.5)


def wrong_codes(x: Tensor, codes: Tensor) -> float:
    """Share of the activation codes int8 (M, K) that are not those of the reference on the CPU; of some tokens."""
    tokens = _some_tokens(x)
    expected, _, _ = quantize_activation(x[tokens].cpu(), GROUP_SIZE)
    return float((codes[tokens].cpu() != expected).double().mean())


def missing_kernel(device: str) -> str | None:
    """Why ours cannot be measured on this device, None where it can; a CPU runs the reference."""
    if torch.device(device).type != "cuda":
        return None
    ops = ("quantize_activation", "prepare_activation", "mixed_linear_tiled_prepared", "mixed_linear_tiled")
    for op in ops:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchmix::{op}", "CUDA"):
            return f"torchmix::{op} has no CUDA kernel in this build"
    return None


def _some_tokens(values: Tensor) -> Tensor:
    """Numbers of at most so many rows as are checked, evenly spread, first and last among them."""
    checked = min(len(values), MOST_CHECKED_TOKENS)
    return torch.linspace(0, len(values) - 1, checked, device=values.device).round().long()
