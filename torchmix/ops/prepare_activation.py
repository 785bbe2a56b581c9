"""``torchmix::prepare_activation`` (L1): activations quantized, and laid out as GPU kernels read them.

The bytes are three parts, one after the other::

    codes   G * Mp * 128 bytes   [g][token][8 places of 16 bytes]
    scale   G * Mp float32       [g][place of the token]
    sums    C * Mp * 64 bytes    bfloat16 [chunk][token // 8][part = 0, 1][k // 8][token % 8][k % 8]

Inputs 16 * p .. 16 * p + 15 of a group stand at place p ^ (token % 8), so that reads of 8 tokens meet no bank of shared
memory twice. A byte is the code + 128; inputs beyond K have code 0. The scales of 16 tokens are ordered as the lanes of
a tensor-core product need them::

    place = token // 16 * 16 + token % 8 // 2 * 4 + token % 16 // 8 * 2 + token % 2

The sums are value = scale * group_sum in float32, as two bfloat16 which add up to it but for its last bits:
part 0 = bfloat16(value), part 1 = bfloat16(value - part 0). A chunk is 16 groups, 0 beyond G. Its group
g = 16 * chunk + 4 * q + e (e < 4) stands at k = 2 * q + e for e < 2, else at k = 8 + 2 * q + e - 2.

Tokens M..Mp - 1 fill up the last 16: bytes 128, scales and sums 0.

Shapes: M tokens, K in_features, G = ceil(K / 128), Mp = M rounded up to a multiple of 16, C = ceil(G / 16).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchmix.ops.quantize_activation import quantize_activation
from torchmix.tiles import GROUP_SIZE, SIGN

TOKENS = 16  # they are filled up to a multiple of it
CHUNK_GROUPS = 16  # groups whose sums lie together
PLACES, PLACE_BYTES = 8, 16  # of a token's codes in one group
SCALE_BYTES, SUM_BYTES = 4, 64  # per token: a group's scale, a chunk's sums

torch.library.define("torchmix::prepare_activation", "(Tensor x, bool per_token=False) -> Tensor")


def prepare_activation(x: Tensor, per_token: bool = False) -> Tensor:
    """What :func:`torchmix.ops.quantize_activation` gives with ``group_size=128``, as GPU kernels read it.

    Several linear layers with the same input can share it (:func:`torchmix.ops.mixed_linear_tiled_prepared`). The
    reference and kernels write the same bytes, padding included. Not differentiable.

    Args:
        x: float32, bfloat16 or float16 (M, K).
        per_token: one activation scale per token instead of one per token and group.

    Returns:
        uint8 1-D of Mp * (132 * G + 64 * C) bytes.
    """
    return torch.ops.torchmix.prepare_activation(x, per_token)


def unprepare(prepared: Tensor, tokens: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of :func:`prepare_activation`: the activations that it has quantized, bit for bit.

    Args:
        prepared: uint8 1-D.
        tokens: M.
        in_features: K.

    Returns:
        codes int8 (M, K); scale float32 (M, G); group_sum int32 (M, G), added up from the codes.

    Raises:
        ValueError: the bytes are not those of activations of this shape.
    """
    padded, groups, _ = _sizes(tokens, in_features)
    _check_length(prepared, tokens, in_features)
    codes, scale, _ = prepared.split(_part_bytes(tokens, in_features))
    codes = _exchange_places(codes.reshape(groups, padded, PLACES, PLACE_BYTES) ^ SIGN)
    codes = codes.view(torch.int8).view(groups, padded, GROUP_SIZE)[:, :tokens].transpose(0, 1)
    scale = scale.clone().view(torch.float32).view(groups, padded // TOKENS, 4, 2, 2)
    scale = scale.transpose(2, 3).reshape(groups, padded)[:, :tokens].t().contiguous()
    group_sum = codes.sum(2, dtype=torch.int32)
    return codes.reshape(tokens, groups * GROUP_SIZE)[:, :in_features].contiguous(), scale, group_sum


@torch.library.impl("torchmix::prepare_activation", "CompositeExplicitAutograd")
def _reference(x: Tensor, per_token: bool = False) -> Tensor:
    tokens, in_features = x.shape
    padded, groups, _ = _sizes(tokens, in_features)
    codes, scale, group_sum = quantize_activation(x, GROUP_SIZE, per_token)
    more = padded - tokens
    codes = pad(codes, (0, groups * GROUP_SIZE - in_features, 0, more)).view(torch.uint8) ^ SIGN
    scale, group_sum = pad(scale, (0, 0, 0, more)), pad(group_sum, (0, 0, 0, more))
    codes = codes.view(padded, groups, PLACES, PLACE_BYTES).transpose(0, 1)
    scales = scale.t().reshape(groups, padded // TOKENS, 2, 4, 2).transpose(2, 3)
    parts = (_exchange_places(codes), scales, _sums(scale * group_sum.float()))
    return torch.cat([part.flatten().view(torch.uint8) for part in parts])


@torch.library.register_fake("torchmix::prepare_activation")
def _fake(x: Tensor, per_token: bool = False) -> Tensor:
    return x.new_empty((sum(_part_bytes(*x.shape)),), dtype=torch.uint8)


def _sizes(tokens: int, in_features: int) -> tuple[int, int, int]:
    """Mp, G and C."""
    groups = (in_features + GROUP_SIZE - 1) // GROUP_SIZE
    return (tokens + TOKENS - 1) // TOKENS * TOKENS, groups, (groups + CHUNK_GROUPS - 1) // CHUNK_GROUPS


def _part_bytes(tokens: int, in_features: int) -> list[int]:
    """Bytes of codes, scales and sums."""
    padded, groups, chunks = _sizes(tokens, in_features)
    return [padded * groups * GROUP_SIZE, padded * groups * SCALE_BYTES, padded * chunks * SUM_BYTES]


def _exchange_places(codes: Tensor) -> Tensor:
    """Part p of each token at place p ^ (token % 8), and back: (G, Mp, 8, 16)."""
    groups, padded = codes.shape[:2]
    token = torch.arange(PLACES, device=codes.device)[:, None]
    parts = codes.reshape(groups, padded // PLACES, PLACES, PLACES, PLACE_BYTES)
    return parts[:, :, token, token ^ token.t()].contiguous().view(codes.shape)


def _sums(values: Tensor) -> Tensor:
    """The two parts of float32 (Mp, G): bfloat16 (C, Mp / 8, 2, 2, 8, 8)."""
    padded, groups = values.shape
    chunks = -(-groups // CHUNK_GROUPS)
    high = values.bfloat16()
    parts = torch.stack([high, (values - high.float()).bfloat16()])
    parts = pad(parts, (0, chunks * CHUNK_GROUPS - groups))
    # part, token // 8, token % 8, chunk, q, e // 2, e % 2
    parts = parts.view(2, padded // 8, 8, chunks, 4, 2, 2)
    return parts.permute(3, 1, 0, 5, 2, 4, 6).reshape(chunks, padded // 8, 2, 2, 8, 8)


def _check_length(prepared: Tensor, tokens: int, in_features: int) -> None:
    """Raise ``ValueError`` unless there are as many bytes as activations of this shape take."""
    needed = sum(_part_bytes(tokens, in_features))
    if prepared.numel() != needed:
        raise ValueError(
            f"prepared activations of {prepared.numel()} bytes, but {tokens} tokens of {in_features} inputs take "
            f"{needed}; pass the shape that prepare_activation has seen"
        )
