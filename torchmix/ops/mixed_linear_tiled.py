"""``torchmix::mixed_linear_tiled`` (L1): :mod:`torchmix.ops.mixed_linear` on a weight in the tile layout.

GPU kernels read this layout (:mod:`torchmix.tiles`). The references bring the weight back into the plain order and
do what ``mixed_linear`` does there, so both give the same bits.

Shapes: M tokens, N out_features, K in_features, G = ceil(K / 128), T tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchmix.ops.dequantize_tiles import dequantize_tiles
from torchmix.ops.mixed_linear import mixed_linear_quantized
from torchmix.ops.quantize_activation import quantize_activation
from torchmix.tiles import GROUP_SIZE, unpack_tiles

torch.library.define(
    "torchmix::mixed_linear_tiled",
    "(Tensor x, Tensor tiles, Tensor row_index, Tensor tile_table, Tensor? bias, int out_features, "
    "bool per_token=False) -> Tensor",
)
torch.library.define(
    "torchmix::mixed_linear_tiled_quantized",
    "(Tensor codes, Tensor activation_scale, Tensor group_sum, Tensor tiles, Tensor row_index, "
    "Tensor tile_table, Tensor? bias, int out_features, ScalarType dtype) -> Tensor",
)


def mixed_linear_tiled(
    x: Tensor,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    per_token: bool = False,
) -> Tensor:
    """Linear layer on activations that are quantized on the fly.

    Differentiable in ``x`` and ``bias``, as :func:`torchmix.ops.mixed_linear` is.

    Args:
        x: float32, bfloat16 or float16 (..., K), any number of leading dimensions, zero tokens allowed.
        tiles: uint8 1-D, codes, scales, zero points and sums (:mod:`torchmix.tiles`).
        row_index: int32 (T * 64,).
        tile_table: int32 (T, 4).
        bias: float (N,) or None.
        out_features: N.
        per_token: one activation scale per token instead of one per token and group.

    Returns:
        (..., N) in the dtype of ``x``, rows in their original order.

    Raises:
        ValueError: K or N are not those of the tiles. Tiles know K in steps of 128 only: the caller compares it.
    """
    return torch.ops.torchmix.mixed_linear_tiled(
        x, tiles, row_index, tile_table, bias, out_features, per_token
    )


def mixed_linear_tiled_quantized(
    codes: Tensor,
    activation_scale: Tensor,
    group_sum: Tensor,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on activations from :func:`torchmix.ops.quantize_activation` with ``group_size=128``.

    Args:
        codes: int8 (M, K).
        activation_scale: float32 (M, G).
        group_sum: int32 (M, G).
        tiles, row_index, tile_table, bias, out_features: as in :func:`mixed_linear_tiled`.
        dtype: dtype of the result.

    Returns:
        ``dtype`` (M, N).

    Raises:
        ValueError: the activations, or N, are not those of the tiles.
    """
    return torch.ops.torchmix.mixed_linear_tiled_quantized(
        codes, activation_scale, group_sum, tiles, row_index, tile_table, bias, out_features, dtype
    )


@torch.library.impl("torchmix::mixed_linear_tiled_quantized", "CompositeExplicitAutograd")
def _quantized_reference(
    codes: Tensor,
    activation_scale: Tensor,
    group_sum: Tensor,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_activations(codes, activation_scale, group_sum)
    inner = unpack_tiles(tiles, row_index, tile_table, out_features, codes.shape[1])
    return mixed_linear_quantized(codes, activation_scale, group_sum, *inner, bias, GROUP_SIZE, dtype)


@torch.library.impl("torchmix::mixed_linear_tiled", "CompositeExplicitAutograd")
def _reference(
    x: Tensor,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    per_token: bool = False,
) -> Tensor:
    parts = quantize_activation(x.reshape(-1, x.shape[-1]), GROUP_SIZE, per_token)
    y = mixed_linear_tiled_quantized(*parts, tiles, row_index, tile_table, bias, out_features, x.dtype)
    return y.view(*x.shape[:-1], out_features)


@torch.library.register_fake("torchmix::mixed_linear_tiled")
def _fake(
    x: Tensor,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    per_token: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("torchmix::mixed_linear_tiled_quantized")
def _quantized_fake(
    codes: Tensor,
    activation_scale: Tensor,
    group_sum: Tensor,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], out_features), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, row_index, tile_table, bias, out_features = inputs[:6]
    ctx.save_for_backward(tiles, row_index, tile_table)
    ctx.out_features, ctx.in_features = out_features, x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dx = dL/dy @ W with the dequantized weight; dL/dbias = sum of dL/dy over the tokens."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        inner: tuple[Tensor, Tensor, Tensor] = ctx.saved_tensors
        grad_x = grad @ dequantize_tiles(*inner, ctx.out_features, ctx.in_features, grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None


torch.library.register_autograd("torchmix::mixed_linear_tiled", _backward, setup_context=_setup_context)


def _check_activations(codes: Tensor, activation_scale: Tensor, group_sum: Tensor) -> None:
    """Raise ``ValueError`` when scales and sums are not those of the codes."""
    expected = (codes.shape[0], -(-codes.shape[1] // GROUP_SIZE))
    found = (tuple(activation_scale.shape), tuple(group_sum.shape))
    if found != (expected, expected):
        raise ValueError(
            f"mixed_linear_tiled_quantized: codes of shape {tuple(codes.shape)} need scales and sums of shape "
            f"{expected}, but these have {found[0]} and {found[1]}; quantize the activations with "
            f"group_size={GROUP_SIZE}"
        )
