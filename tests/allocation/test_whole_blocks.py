"""Whole blocks are promoted strictly by rank."""

from __future__ import annotations

import pytest

from torchmix.allocation import promote_blocks

SCORES = {"a": -0.9, "b": 0.3, "c": -0.5, "d": 0.1}
BITS = {"a": {4: 40, 8: 80}, "b": {4: 40, 8: 80}, "c": {4: 40, 8: 80}, "d": {4: 100, 8: 200}}


@pytest.mark.parametrize(
    ("budget", "promoted"),
    [
        (220, ""),
        (259, ""),
        (260, "b"),
        (359, "b"),  # d does not fit, and c behind it is not squeezed in though it would
        (360, "bd"),
        (400, "bdc"),
        (439, "bdc"),
        (440, "bdca"),
        (10**9, "bdca"),
    ],
)
def test_ranking_and_budget(budget: int, promoted: str) -> None:
    widths = promote_blocks(SCORES, BITS, budget)
    assert widths == {block: 8 if block in promoted else 4 for block in "abcd"}
    assert list(widths) == list(SCORES)
    assert sum(BITS[block][width] for block, width in widths.items()) <= budget


def test_equal_scores_keep_the_order_of_the_blocks() -> None:
    bits = {block: {3: 3, 5: 5} for block in "xyz"}
    assert promote_blocks(dict.fromkeys("xyz", 1.0), bits, 13, low=3, high=5) == {"x": 5, "y": 5, "z": 3}


def test_wrong_arguments() -> None:
    with pytest.raises(
        ValueError, match="budget_bits=219 does not hold the blocks at 4 bits, which take 220"
    ):
        promote_blocks(SCORES, BITS, 219)
    with pytest.raises(ValueError, match="must be rising"):
        promote_blocks(SCORES, BITS, 1000, low=8, high=4)
    with pytest.raises(ValueError, match="d, e: blocks need both"):
        promote_blocks(SCORES, {**{k: BITS[k] for k in "abc"}, "e": BITS["a"]}, 1000)
    with pytest.raises(ValueError, match="score of c is NaN"):
        promote_blocks({**SCORES, "c": float("nan")}, BITS, 1000)
    with pytest.raises(ValueError, match=r"block_bits of a lacks \[3\]; it has \[4, 8\]"):
        promote_blocks(SCORES, BITS, 1000, low=3)
