"""Rows that move together keep their counts, and exchanges only ever lower the sum of scores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmix.allocation.row_tiles import exchange, make_tiles
from torchmix.allocation.rules import check_row_counts


def random_scores(seed, experts, rows, widths):
    return np.random.default_rng(seed).random((experts, rows, widths))


def loss(scores_ENW, columns_EN):
    return np.take_along_axis(scores_ENW, columns_EN[..., None], axis=-1).sum()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 3),
    block_rows=st.integers(1, 11),
    row_multiple=st.integers(1, 6),
    tensor_parallel=st.integers(1, 3),
)
def test_any_choice_of_tiles_keeps_the_rules(seed, experts, block_rows, row_multiple, tensor_parallel):
    scores = random_scores(seed, experts, block_rows * tensor_parallel, 3)
    tiles = make_tiles(scores, row_multiple, tensor_parallel)
    assert tiles.rows.sum() == experts * block_rows * tensor_parallel
    columns = np.random.default_rng(seed).integers(0, 3, len(tiles.rows))
    rows_EN = tiles.expand(columns)
    check_row_counts("up", torch.from_numpy(rows_EN + 3), row_multiple, tensor_parallel)
    expected = np.take_along_axis(tiles.scores, columns[:, None], axis=1).sum()
    np.testing.assert_allclose(loss(scores, rows_EN), expected, rtol=1e-12)


def test_a_tile_is_a_row_when_nothing_is_asked():
    scores = random_scores(0, 2, 5, 3)
    tiles = make_tiles(scores, 1, 1)
    assert np.array_equal(tiles.scores, scores.reshape(10, 3))
    assert np.array_equal(tiles.expand(np.arange(10)), np.arange(10).reshape(2, 5))


def test_the_remainder_is_the_rows_that_gain_least():
    scores = np.stack([np.array([5.0, 1.0, 4.0, 2.0, 3.0]), np.zeros(5)], axis=1)[None]
    tiles = make_tiles(scores, 2, 1)
    assert tiles.rows.tolist() == [2, 2, 1]
    assert tiles.expand(np.array([0, 1, 2])).tolist() == [[0, 2, 0, 1, 1]]


def test_equal_ranks_of_all_blocks_move_together():
    gains = np.array([1.0, 2.0, 3.0, 9.0, 7.0, 8.0])
    scores = np.stack([gains, np.zeros(6)], axis=1)[None]
    tiles = make_tiles(scores, 1, 2)
    assert tiles.scores[:, 0].tolist() == [12.0, 10.0, 8.0]
    assert tiles.expand(np.array([0, 1, 2])).tolist() == [[2, 1, 0, 0, 2, 1]]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    experts=st.integers(1, 2),
    block_rows=st.integers(1, 9),
    widths=st.integers(2, 5),
    tensor_parallel=st.integers(1, 3),
)
def test_exchange_keeps_counts_and_never_loses(seed, experts, block_rows, widths, tensor_parallel):
    scores = random_scores(seed, experts, block_rows * tensor_parallel, widths)
    before = np.random.default_rng(seed + 1).integers(0, widths, scores.shape[:2])
    kept = before.copy()
    after = exchange(scores, before, tensor_parallel)
    assert np.array_equal(before, kept), "the argument must not change"
    blocks = (experts * tensor_parallel, block_rows)
    assert np.array_equal(np.sort(after.reshape(blocks)), np.sort(before.reshape(blocks)))
    assert loss(scores, after) <= loss(scores, before) + 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_exchange_of_two_widths_is_optimal(seed):
    scores = random_scores(seed, 1, 6, 2)
    before = np.array([[0, 0, 0, 1, 1, 1]])
    best = min(loss(scores, np.array([choice])) for choice in set(itertools.permutations(before[0])))
    np.testing.assert_allclose(loss(scores, exchange(scores, before, 1)), best, rtol=1e-12)


def test_rows_with_equal_scores_stay_where_they_are():
    before = np.array([[0, 2, 1, 0, 2, 1]])
    assert np.array_equal(exchange(np.ones((1, 6, 3)), before, 1), before)
