"""How products are cut into launches: csrc/cuda/launch_choice.h, compiled for the host."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.csrc.emulated_cuda import Choice, choose_stream, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

H200 = (132, 232448, True)  # multiprocessors, bytes of shared memory per block, clusters
A100 = (108, 166912, False)
RTX = (84, 101376, False)
SLOT_BYTES, LEAST_SLOTS, MOST_SLOTS, MOST_TOKENS = 4 * (2048 + 128), 4, 11, 32


def check(choice: Choice, groups: int, device: tuple[int, int, bool]) -> None:
    _, shared_bytes, clusters = device
    assert 1 <= choice.tokens <= MOST_TOKENS
    assert choice.blocks in ((1, 2, 4, 8) if clusters else (1,))
    assert choice.blocks <= groups
    assert LEAST_SLOTS <= choice.slots <= MOST_SLOTS
    assert choice.fixed_bytes + choice.slots * SLOT_BYTES <= shared_bytes


@given(st.integers(1, 5000), st.integers(1, 512), st.integers(1, 4000))
def test_everything_fits_an_h200(tokens: int, groups: int, tiles: int) -> None:
    """Up to 65536 inputs."""
    check(choose_stream(tokens, groups, tiles, *H200), groups, H200)


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 4000))
def test_what_is_chosen_fits_a_device_without_clusters(tokens: int, groups: int, tiles: int) -> None:
    choice = choose_stream(tokens, groups, tiles, *A100)
    if choice.tokens > 0:
        check(choice, groups, A100)


@pytest.mark.parametrize("groups", [1, 32, 64, 112, 224])
def test_ordinary_layers_fit_devices_without_clusters(groups: int) -> None:
    """Up to 28672 inputs; where many tokens do not fit, fewer go together."""
    for device in (A100, RTX):
        for tokens in (1, 8, 16, 100):
            check(choose_stream(tokens, groups, 64, *device), groups, device)


def test_nothing_fits() -> None:
    assert choose_stream(1, 4096, 64, *A100).tokens == 0
    assert choose_stream(1, 1, 64, 132, 16384, True).tokens == 0


@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_few_tokens_stay_few(tokens: int) -> None:
    """Up to 16 tokens the kernel quantizes, and it can for one and two tiles of 8 tokens only."""
    for groups in (1, 2, 16, 32, 86, 112, 512):
        assert choose_stream(tokens, groups, 100, *H200).tokens <= tokens
