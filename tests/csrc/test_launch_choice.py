"""How products are cut into launches and pieces: csrc/cuda/launch_choice.h and schedule.h, compiled for the host."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csrc.emulated_cuda import (
    PIECES,
    Choice,
    choose_hopper,
    choose_stream,
    parts,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

A100, RTX = 166912, 101376  # bytes of shared memory that a block can have
SLOT_BYTES, LEAST_SLOTS, MOST_SLOTS, MOST_TOKENS = 2 * (4096 + 256), 4, 11, 32
MULTIPROCESSORS = 132


def check(choice: Choice, shared_bytes: int) -> None:
    assert 1 <= choice.tokens <= MOST_TOKENS
    assert LEAST_SLOTS <= choice.slots <= MOST_SLOTS
    assert choice.fixed_bytes + choice.slots * SLOT_BYTES <= shared_bytes


@given(st.integers(1, 5000), st.integers(1, 600))
def test_what_is_chosen_fits(tokens: int, groups: int) -> None:
    choice = choose_stream(tokens, groups, A100)
    if choice.tokens > 0:
        check(choice, A100)


@pytest.mark.parametrize("groups", [1, 32, 64, 112, 224])
def test_ordinary_layers_fit_devices_with_less_memory(groups: int) -> None:
    """Up to 28672 inputs; where many tokens do not fit, fewer go together."""
    for shared_bytes in (A100, RTX):
        for tokens in (1, 8, 16, 100):
            check(choose_stream(tokens, groups, shared_bytes), shared_bytes)


def test_nothing_fits() -> None:
    assert choose_stream(1, 4096, A100).tokens == 0
    assert choose_stream(1, 1, 16384).tokens == 0


@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_few_tokens_stay_few(tokens: int) -> None:
    """Up to 16 tokens the kernel quantizes, and it can for one and two tiles of 8 tokens only."""
    for groups in (1, 2, 16, 32, 86, 112, 512):
        assert choose_stream(tokens, groups, A100).tokens <= tokens


@given(st.integers(1, 100_000), st.integers(1, 512), st.integers(1, 4000))
def test_pieces_cover_the_product(tokens: int, groups: int, tiles: int) -> None:
    choice = choose_hopper(tokens, groups, tiles, MULTIPROCESSORS)
    assert choice.tokens in PIECES
    assert choice.tokens >= 16 or tokens <= 8  # 8 tokens at once is for a single piece
    assert choice.row_pieces == -(-tiles // (2 * choice.cluster))
    assert choice.token_pieces == -(-tokens // choice.tokens)
    assert 1 <= choice.clusters <= MULTIPROCESSORS // choice.cluster


def test_a_large_layer_has_all_multiprocessors() -> None:
    for tokens in (1, 16, 64, 100, 4096):
        choice = choose_hopper(tokens, 32, 448, MULTIPROCESSORS)
        assert choice.clusters * choice.cluster == MULTIPROCESSORS


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 30),
    st.integers(0, 40),
    st.integers(0, 1),
)
def test_every_group_of_every_piece_is_done_once(
    rows: int, tokens: int, groups: int, blocks: int, wide: int, wide_shift: int
) -> None:
    """And a block that finishes a piece knows all others that have a part of it, which come before it."""
    schedule = rows, tokens, groups, blocks, min(wide, rows), wide_shift
    done: dict[tuple[int, int], list[tuple[int, int, int, int, int]]] = {}
    for block in range(blocks):
        mine = parts(schedule, block)
        for i, part in enumerate(mine):
            assert 0 <= part.first < part.last <= groups
            assert (part.shared >= 0) == (part.first > 0 or part.last < groups)
            if part.last < groups:
                assert i == 0  # what another block waits for comes first
            place = part.first, part.last, block, part.shared, part.sharer
            done.setdefault((part.rows, part.tokens), []).append(place)
    assert sorted(done) == [(row, token) for row in range(rows) for token in range(tokens)]
    for pieces in done.values():
        pieces.sort()
        assert [first for first, *_ in pieces] == [0, *(last for _, last, *_ in pieces[:-1])]
        assert pieces[-1][1] == groups
        before = -1
        for _, _, block, shared, sharer in pieces:
            if shared >= 0:
                assert sharer == before
            before = block


@given(st.integers(1, 60), st.integers(1, 80), st.integers(1, 132), st.integers(0, 60))
def test_shares_are_equal(rows: int, groups: int, blocks: int, wide: int) -> None:
    """Of one piece of tokens: groups of wide rows count twice, and shares differ by what a group may cost."""
    wide = min(wide, rows)
    costs = []
    for block in range(blocks):
        mine = parts((rows, 1, groups, blocks, wide, 1), block)
        costs.append(sum((part.last - part.first) * (2 if part.rows < wide else 1) for part in mine))
    assert sum(costs) == (rows + wide) * groups
    assert max(costs) - min(costs) <= 3
