"""Which row gets which width (L3): least predicted loss under a budget of stored bits.

A multiple-choice knapsack: row i pays c(i, b) bits for width b and loses S(i, b). For a multiplier lambda
every row by itself takes the width with the least S + lambda * c, and only widths on the lower convex hull of
its points (c, S) are ever taken. From hull point to hull point a row makes *steps* of falling gain per bit,
so lambda picks the steps that gain more than lambda per bit, and a bisection over lambda finds the steps that
the budget pays for. The next step, which the budget pays only in part, is left out, and what remains of the
budget is spent greedily. The result loses at most the gain of that one step more than the optimum, and
nothing more where the steps use up the budget exactly.

Order of equal gains per bit: first steps of all rows before second ones, then layers by name, then rows.
Nothing depends on the order of the layers, on random numbers or on the number of threads.

Shapes: E experts, N rows of an expert, T tiles of a layer (:mod:`torchmix.allocation.row_tiles`; a tile is a
row unless rows must move together), W widths, S = W - 1 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from torchmix.accounting import check_bits
from torchmix.allocation.problem import (
    Allocation,
    AllocationProblem,
    LayerChoices,
    check_scores,
    given_columns,
)
from torchmix.allocation.row_tiles import RowTiles, exchange, make_tiles

SORT_BELOW = 1 << 14  # steps; a bisection that is down to so few ends with a sort


def allocate(problem: AllocationProblem) -> Allocation:
    """Choose a width for every row.

    Equal scores count as a gain of 0, so what the budget leaves over goes to rows whose score does not change
    (experts that saw no token, for example), narrowest first.

    Args:
        problem: layers, widths, budget and rules; see :class:`AllocationProblem`.

    Returns:
        Widths within the budget. ``predicted_loss - lower_bound`` bounds the distance from the optimum;
        without ``row_multiple`` and ``tensor_parallel`` it is at most ``multiplier`` times the bits of one
        row's step.

    Raises:
        ValueError: the budget is below the narrowest or above the widest choice; says the feasible range.
    """
    problem.check_budget()
    free = sorted((layer for layer in problem.layers if layer.row_bits is None), key=lambda layer: layer.name)
    room = None if problem.budget_bits is None else problem.budget_bits - problem.feasible_bits[0]
    frontiers = [_frontier(layer, problem) for layer in free]
    multiplier = _spend(frontiers, room)
    columns = {frontier.layer.name: _row_columns(frontier, problem) for frontier in frontiers}
    bounds = [-multiplier * (room or 0), *(_dual(frontier, multiplier) for frontier in frontiers)]
    for layer in problem.layers:
        if layer.row_bits is not None:
            columns[layer.name] = given_columns(layer, problem.widths)
            bounds.append(_loss(layer, columns[layer.name]))
    return _allocation(problem, columns, math.fsum(bounds), multiplier)


def top_rows(
    scores: Mapping[str, Tensor], fraction: float, high_bits: int = 8, low_bits: int = 4
) -> dict[str, Tensor]:
    """The setting of the MixLLM paper: a share of all rows gets 8 bits, the others 4.

    One ranking over all layers by falling score (MixLLM, arXiv 2412.14590, Algorithm 1); rows are counted,
    whatever their in_features, so the share says little about bits. Equal scores: layers by name, then rows.

    Args:
        scores: by layer name, floating (N,) or (E, N), one score per row.
        fraction: share of rows, 0 to 1; their number is rounded down as in the paper's code. The decimal
            number that was written counts, not its nearest float.
        high_bits: width of the rows with the largest scores.
        low_bits: width of the others.

    Returns:
        uint8 by layer name, each in the shape of its scores.

    Raises:
        ValueError: fraction outside 0 to 1, no layer, or a score that is negative, NaN or infinite.
    """
    check_bits(high_bits)
    check_bits(low_bits)
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"fraction={fraction!r} of rows at {high_bits} bits must lie from 0 to 1; 0.10 is 10 %"
        )
    if not scores:
        raise ValueError(f"a ranking needs at least one layer, got {list(scores)}; widen include")
    for name, layer_scores in scores.items():
        check_scores(name, layer_scores[..., None])
    names = sorted(scores)
    ranked = np.concatenate(
        [scores[name].detach().to("cpu", torch.float64).flatten().numpy() for name in names]
    )
    count = int(Fraction(str(fraction)) * len(ranked))
    bits = np.full(len(ranked), low_bits, np.uint8)
    bits[np.argsort(-ranked, kind="stable")[:count]] = high_bits
    pieces = torch.from_numpy(bits).split([scores[name].numel() for name in names])
    by_name = dict(zip(names, pieces, strict=True))
    return {name: by_name[name].reshape(layer_scores.shape).clone() for name, layer_scores in scores.items()}


@dataclass(eq=False)
class _Frontier:
    """The steps of the tiles of one layer, and where each tile stands.

    first: the layer's first allowed column.
    costs: int64, bits of one row at the allowed columns.
    hull: int8 (S + 1, T), allowed column before the first step, after it, and so on.
    gain_per_bit: float64 (S, T), never rising along S, -1 where a tile has no such step.
    step_bits: int64 (S, T).
    columns: intp (T,), allowed column that each tile has now; changes as bits are spent.
    """

    layer: LayerChoices
    tiles: RowTiles
    first: int
    costs: np.ndarray
    hull: np.ndarray
    gain_per_bit: np.ndarray
    step_bits: np.ndarray
    columns: np.ndarray


def _frontier(layer: LayerChoices, problem: AllocationProblem) -> _Frontier:
    """Tiles of a layer, each at its cheapest column, with their steps along the hull."""
    allowed = problem.columns(layer)
    costs = np.asarray(layer.costs[allowed], np.int64)
    tiles = make_tiles(layer.scores_ENW[..., allowed], problem.row_multiple, problem.tensor_parallel)
    hull, gain_per_bit = _lower_hull(tiles.scores, costs, len(problem.widths) - 1)
    step_bits = np.diff(costs[hull], axis=0) * tiles.rows
    gain_per_bit /= tiles.rows
    gain_per_bit[step_bits == 0] = -1.0
    columns = hull[0].astype(np.intp)
    return _Frontier(layer, tiles, allowed.start, costs, hull, gain_per_bit, step_bits, columns)


def _lower_hull(scores_TW: np.ndarray, costs_W: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Walk each tile along the lower convex hull of its points (cost, score) while the score does not rise.

    Returns:
        hull: int8 (steps + 1, T), columns; the last one is repeated when a tile has fewer steps.
        gain_per_cost: float64 (steps, T), never rising along a tile's steps.
    """
    tiles = np.arange(len(scores_TW))
    cheapest = scores_TW[:, costs_W == costs_W[0]].argmin(axis=1)
    hull = np.empty((steps + 1, len(tiles)), np.int8)
    gain_per_cost = np.empty((steps, len(tiles)))
    hull[0] = column_T = cheapest
    ceiling_T = np.full(len(tiles), np.inf)  # rounding must not make a later step better than an earlier one
    for step in range(steps):
        rate_TW = _gain_rate(scores_TW, costs_W, column_T)
        best_T = rate_TW.argmax(axis=1)  # of several points on one line the nearest
        rate_T = rate_TW[tiles, best_T]
        column_T = np.where(rate_T >= 0, best_T, column_T)
        ceiling_T = np.minimum(ceiling_T, rate_T)
        hull[step + 1], gain_per_cost[step] = column_T, ceiling_T
    return hull, gain_per_cost


def _gain_rate(scores_TW: np.ndarray, costs_W: np.ndarray, column_T: np.ndarray) -> np.ndarray:
    """Score saved per cost by going from each tile's column to every other.

    Returns:
        float64 (T, W); -1 where the other column is not dearer or has a larger score.
    """
    gain_TW = np.take_along_axis(scores_TW, column_T[:, None], axis=1) - scores_TW
    extra_TW = costs_W - costs_W[column_T][:, None]
    possible = (extra_TW > 0) & (gain_TW >= 0)
    return np.divide(gain_TW, extra_TW, out=np.full(gain_TW.shape, -1.0), where=possible)


def _spend(frontiers: list[_Frontier], room: int | None) -> float:
    """Move tiles along their steps while ``room`` bits last (None: without end); returns the multiplier."""
    if not frontiers:
        return 0.0
    gain = np.concatenate([frontier.gain_per_bit for frontier in frontiers], axis=1)
    bits = np.concatenate([frontier.step_bits for frontier in frontiers], axis=1)
    taken, multiplier = _best_steps(gain.ravel(), bits.ravel(), room)
    levels = taken.reshape(gain.shape).sum(axis=0)
    ends = np.cumsum([len(frontier.columns) for frontier in frontiers])
    for frontier, level_T in zip(frontiers, np.split(levels, ends[:-1]), strict=True):
        frontier.columns = frontier.hull[level_T, np.arange(len(level_T))].astype(np.intp)
    if room is not None:
        _fill(frontiers, room - int(bits.ravel()[taken].sum()))
    return multiplier


def _best_steps(gain: np.ndarray, bits: np.ndarray, room: int | None) -> tuple[np.ndarray, float]:
    """Take steps by falling gain per bit until the first that does not fit.

    A bisection over the multiplier: the median gain of the steps still open is tried, and the half that is
    decided is closed, so the work is linear in the number of steps.

    Args:
        gain: float64, gain per bit of all steps; below 0 where there is no step.
        bits: int64, same shape; equal gains are taken in the order given.
        room: bits that can be spent; None for no limit.

    Returns:
        bool, steps taken; and the gain per bit of the first step that does not fit, 0 if all fit.
    """
    taken = gain >= 0
    if room is None or int(bits[taken].sum()) <= room:
        return taken, 0.0
    open_steps = np.flatnonzero(taken)
    taken = np.zeros(len(gain), bool)
    while len(open_steps) > SORT_BELOW:
        open_gain = gain[open_steps]
        above = open_gain > np.partition(open_gain, len(open_gain) // 2)[len(open_gain) // 2]
        price = int(bits[open_steps[above]].sum())
        if not above.any():
            break  # at least half of the steps are equal
        if price > room:
            open_steps = open_steps[above]
        else:
            taken[open_steps[above]] = True
            room, open_steps = room - price, open_steps[~above]
    order = open_steps[np.argsort(-gain[open_steps], kind="stable")]
    fitting = int(np.searchsorted(np.cumsum(bits[order]), room, side="right"))
    taken[order[:fitting]] = True
    return taken, float(gain[order[fitting]])


def _fill(frontiers: list[_Frontier], left: int) -> None:
    """Spend the last ``left`` bits: again and again the move with the best gain per bit that still fits.

    Moves may end beside the hull here. Each round lists the moves of all tiles and takes as many as fit, one
    per tile; rounds go on until none fits.
    """
    while True:
        moves = [_moves(frontier, left) for frontier in frontiers]
        gain, bits, tile, column = (np.concatenate(part) for part in zip(*moves, strict=True))
        owner = np.repeat(np.arange(len(moves)), [len(move[0]) for move in moves])
        if not len(gain):
            return
        open_moves = np.arange(len(gain))
        while len(open_moves):
            best = open_moves[gain[open_moves].argmax()]
            frontiers[owner[best]].columns[tile[best]] = column[best]
            left -= int(bits[best])
            same_tile = (owner[open_moves] == owner[best]) & (tile[open_moves] == tile[best])
            open_moves = open_moves[~same_tile & (bits[open_moves] <= left)]


def _moves(frontier: _Frontier, left: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Moves of a layer's tiles that ``left`` bits pay for: gain per bit, bits, tile and new column."""
    extra_TW = (frontier.costs - frontier.costs[frontier.columns][:, None]) * frontier.tiles.rows[:, None]
    rate_TW = (
        _gain_rate(frontier.tiles.scores, frontier.costs, frontier.columns) / frontier.tiles.rows[:, None]
    )
    tile, column = np.nonzero((extra_TW > 0) & (extra_TW <= left) & (rate_TW >= 0))
    return rate_TW[tile, column], extra_TW[tile, column], tile, column


def _row_columns(frontier: _Frontier, problem: AllocationProblem) -> np.ndarray:
    """The column of each row of a layer: intp (E, N)."""
    columns_EN = frontier.tiles.expand(frontier.columns + frontier.first)
    if problem.row_multiple == problem.tensor_parallel == 1:
        return columns_EN
    return exchange(frontier.layer.scores_ENW, columns_EN, problem.tensor_parallel)


def _dual(frontier: _Frontier, multiplier: float) -> float:
    """Least score + multiplier * (cost above the cheapest) of each row by itself, summed over a layer."""
    width = slice(frontier.first, frontier.first + len(frontier.costs))
    scores_ENW = frontier.layer.scores_ENW[..., width]
    return float((scores_ENW + multiplier * (frontier.costs - frontier.costs[0])).min(axis=-1).sum())


def _loss(layer: LayerChoices, columns_EN: np.ndarray) -> float:
    """Sum of the scores of a layer's rows at their columns."""
    return float(np.take_along_axis(layer.scores_ENW, columns_EN[..., None], axis=-1).sum())


def _allocation(
    problem: AllocationProblem, columns: dict[str, np.ndarray], bound: float, multiplier: float
) -> Allocation:
    """Put the answer together, in the order of the problem's layers."""
    widths = np.asarray(problem.widths, np.uint8)
    row_bits: dict[str, Tensor] = {}
    total_bits = 0
    for layer in problem.layers:
        columns_EN = columns[layer.name]
        total_bits += int(np.asarray(layer.costs, np.int64)[columns_EN].sum())
        row_bits[layer.name] = torch.from_numpy(widths[columns_EN]).reshape(layer.scores.shape[:-1])
    # fsum is exact, so the total is the same in whatever order the layers come
    loss = math.fsum(_loss(layer, columns[layer.name]) for layer in problem.layers)
    return Allocation(row_bits, total_bits, loss, min(bound, loss), multiplier)
