"""``torchmix::mixed_linear_tiled_prepared`` (L1): :mod:`torchmix.ops.mixed_linear_tiled` on prepared activations.

Layers which share their input prepare it once (:mod:`torchmix.ops.prepare_activation`). The reference brings the
activations back into the plain order and does what ``mixed_linear_tiled_quantized`` does, so both give the same bits.

Shapes: M tokens, N out_features, K in_features, T tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmix.ops.mixed_linear_tiled import mixed_linear_tiled_quantized
from torchmix.ops.prepare_activation import unprepare

torch.library.define(
    "torchmix::mixed_linear_tiled_prepared",
    "(Tensor prepared, SymInt tokens, SymInt in_features, Tensor tiles, Tensor row_index, Tensor tile_table, "
    "Tensor? bias, int out_features, ScalarType dtype) -> Tensor",
)


def mixed_linear_tiled_prepared(
    prepared: Tensor,
    tokens: int,
    in_features: int,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on activations from :func:`torchmix.ops.prepare_activation`. Not differentiable.

    Args:
        prepared: uint8 1-D.
        tokens: M.
        in_features: K.
        tiles: uint8 1-D, codes, scales, zero points and sums (:mod:`torchmix.tiles`).
        row_index: int32 (T * 64,).
        tile_table: int32 (T, 4).
        bias: float (N,) or None.
        out_features: N.
        dtype: dtype of the result.

    Returns:
        ``dtype`` (M, N), rows in their original order.

    Raises:
        ValueError: the prepared bytes are not those of M tokens of K inputs; K or N are not those of the tiles.
    """
    return torch.ops.torchmix.mixed_linear_tiled_prepared(
        prepared, tokens, in_features, tiles, row_index, tile_table, bias, out_features, dtype
    )


@torch.library.impl("torchmix::mixed_linear_tiled_prepared", "CompositeExplicitAutograd")
def _reference(
    prepared: Tensor,
    tokens: int,
    in_features: int,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    parts = unprepare(prepared, tokens, in_features)
    return mixed_linear_tiled_quantized(*parts, tiles, row_index, tile_table, bias, out_features, dtype)


@torch.library.register_fake("torchmix::mixed_linear_tiled_prepared")
def _fake(
    prepared: Tensor,
    tokens: int,
    in_features: int,
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    bias: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return prepared.new_empty((tokens, out_features), dtype=dtype)
