"""``torchmix::dequantize_tiles`` (L1): a weight in the tile layout back to a dense weight.

Shapes: N out_features, K in_features, T tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmix.ops.dequantize_rows import dequantize_rows
from torchmix.tiles import GROUP_SIZE, unpack_tiles

torch.library.define(
    "torchmix::dequantize_tiles",
    "(Tensor tiles, Tensor row_index, Tensor tile_table, int out_features, int in_features, "
    "ScalarType dtype) -> Tensor",
)


def dequantize_tiles(
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """``scale * (code - zero_point)`` for every weight: what :func:`torchmix.ops.dequantize_rows` gives, to the bit.

    Args:
        tiles: uint8 1-D (:mod:`torchmix.tiles`).
        row_index: int32 (T * 64,).
        tile_table: int32 (T, 4).
        out_features: N.
        in_features: K.
        dtype: dtype of the result; float32 is exact.

    Returns:
        ``dtype`` (N, K), rows in their original order.
    """
    return torch.ops.torchmix.dequantize_tiles(tiles, row_index, tile_table, out_features, in_features, dtype)


@torch.library.impl("torchmix::dequantize_tiles", "CompositeExplicitAutograd")
def _reference(
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    inner = unpack_tiles(tiles, row_index, tile_table, out_features, in_features)
    return dequantize_rows(*inner, in_features, GROUP_SIZE, dtype)


@torch.library.register_fake("torchmix::dequantize_tiles")
def _fake(
    tiles: Tensor,
    row_index: Tensor,
    tile_table: Tensor,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    return tiles.new_empty((out_features, in_features), dtype=dtype)
