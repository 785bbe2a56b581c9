"""Rows that move together (L3): how an allocation keeps ``row_multiple`` and ``tensor_parallel``.

The N rows of a layer (of each expert) are cut into ``tensor_parallel`` blocks of consecutive rows. Inside a
block rows are ranked by what they gain from the widest width; ``row_multiple`` rows of neighbouring rank form
a *tile*, and the tiles of equal rank of all blocks move together. So every block holds the same number of
rows of each width, and the number is a multiple. The rows left over, those that gain least, form one smaller
tile: they mostly end in the narrowest width that the block uses, where padding to a whole kernel tile costs
the fewest bytes.

With both options at 1 a tile is a row and keeps its place.

Shapes: E experts, B blocks, R rows of a block, T tiles of an expert, W widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_SWEEPS = 8  # of exchanges; two are almost always enough


@dataclass(frozen=True, eq=False)
class RowTiles:
    """The tiles of one layer.

    scores: float64 (E * T, W), sums over the rows of a tile.
    rows: int64 (E * T,), rows of a tile over all blocks.
    """

    scores: np.ndarray
    rows: np.ndarray
    _rank_EBR: np.ndarray | None
    _tile_R: np.ndarray

    def expand(self, columns: np.ndarray) -> np.ndarray:
        """From tiles to rows: intp (E * T,) -> intp (E, N), the column of each row in its original place."""
        if self._rank_EBR is None:
            return columns.reshape(-1, len(self._tile_R))
        experts, blocks, _ = self._rank_EBR.shape
        by_rank_ER = columns.reshape(experts, -1)[:, self._tile_R]
        columns_EBR = np.take_along_axis(
            np.repeat(by_rank_ER[:, None], blocks, axis=1), self._rank_EBR, axis=2
        )
        return columns_EBR.reshape(experts, -1)


def make_tiles(scores_ENW: np.ndarray, row_multiple: int, tensor_parallel: int) -> RowTiles:
    """Group the rows of one layer.

    Args:
        scores_ENW: float64 (E, N, W), columns of the widths that the rows may choose, narrowest first.
        row_multiple: rows of a tile in one block.
        tensor_parallel: number of blocks; divides N.
    """
    experts, rows, widths = scores_ENW.shape
    if row_multiple == tensor_parallel == 1:
        ones = np.ones(experts * rows, np.int64)
        return RowTiles(scores_ENW.reshape(-1, widths), ones, None, np.arange(rows))
    scores_EBRW = scores_ENW.reshape(experts, tensor_parallel, -1, widths)
    order_EBR = np.argsort(scores_EBRW[..., -1] - scores_EBRW[..., 0], axis=2, kind="stable")
    tile_R = np.arange(order_EBR.shape[2]) // row_multiple
    starts_T = np.arange(0, order_EBR.shape[2], row_multiple)
    ranked = np.take_along_axis(scores_EBRW, order_EBR[..., None], axis=2).sum(axis=1)
    scores_ETW = np.add.reduceat(ranked, starts_T, axis=1)
    rows_T = np.bincount(tile_R) * tensor_parallel
    rank_EBR = np.argsort(order_EBR, axis=2, kind="stable")
    return RowTiles(scores_ETW.reshape(-1, widths), np.tile(rows_T, experts), rank_EBR, tile_R)


def exchange(scores_ENW: np.ndarray, columns_EN: np.ndarray, tensor_parallel: int) -> np.ndarray:
    """Let rows of a block swap their widths where that lowers the sum of scores; no count changes.

    Tiles are formed by one ranking, but with three widths or more the best rows for 8 bits need not be the
    best rows for 5. For each pair of widths the rows that hold one of them are ranked again by their own
    difference.

    Args:
        scores_ENW: float64 (E, N, W).
        columns_EN: intp (E, N), the column of each row.
        tensor_parallel: number of blocks.

    Returns:
        intp (E, N): never a larger sum of scores, the same number of rows of each width in every block.
    """
    experts, rows, widths = scores_ENW.shape
    scores_BRW = scores_ENW.reshape(experts * tensor_parallel, -1, widths)
    columns_BR = columns_EN.reshape(scores_BRW.shape[:2]).copy()
    pairs = [(low, high) for low in range(widths - 1) for high in range(low + 1, widths)]
    for _ in range(MAX_SWEEPS):
        changed = [_exchange_pair(scores_BRW, columns_BR, low, high) for low, high in pairs]
        if not any(changed):
            break
    return columns_BR.reshape(experts, rows)


def _exchange_pair(scores_BRW: np.ndarray, columns_BR: np.ndarray, low: int, high: int) -> bool:
    """Give column ``high`` to those rows of columns ``low`` and ``high`` that gain most from it, in place.

    Only blocks where that lowers the sum are touched. Returns whether there was one.
    """
    change_BR = scores_BRW[..., high] - scores_BRW[..., low]
    worst_kept_B = np.where(columns_BR == high, change_BR, -np.inf).max(axis=1)
    best_left_B = np.where(columns_BR == low, change_BR, np.inf).min(axis=1)
    better = worst_kept_B > best_left_B
    if not better.any():
        return False
    columns_CR = columns_BR[better]  # C: the blocks to change
    either_CR = (columns_CR == low) | (columns_CR == high)
    order_CR = np.argsort(np.where(either_CR, change_BR[better], np.inf), axis=1, kind="stable")
    first_CR = np.arange(order_CR.shape[1]) < (columns_CR == high).sum(axis=1, keepdims=True)
    gets_high_CR = np.zeros_like(either_CR)
    np.put_along_axis(gets_high_CR, order_CR, first_CR, axis=1)
    columns_BR[better] = np.where(gets_high_CR, high, np.where(either_CR, low, columns_CR))
    return True
