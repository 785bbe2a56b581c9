"""The machine that emulates a GPU: it runs what is right, and reports what is not (emulator/selftest.cu)."""

from __future__ import annotations

import pytest
import torch

from tests.csrc.emulated_cuda import EmulatedError, selftest, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

SEEDS = range(12)
THREADS = torch.arange(64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("copy_works", THREADS),
        ("cluster_works", torch.full((64,), 15)),
        ("pushes_work", 103 + THREADS % 16),
        ("group_multiply_works", torch.zeros(64)),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_right_gives_the_same_by_every_seed(name: str, expected: torch.Tensor, seed: int) -> None:
    assert torch.equal(selftest(name, seed), expected.int())


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("copy_of_wrong_length", "deadlock.*(\n.*)*0 of 1 arrivals and 16 bytes missing"),
        ("copy_to_odd_place", "copy_bytes: the target .* is not aligned to 16 bytes"),
        ("copy_from_beyond", "256 bytes from byte 384 of 512 of source are not global memory"),
        ("copy_never_waited_for", "asynchronous copies were not done|bytes that never come"),
        ("arrival_too_many", "barrier_arrive: more arrivals than 2"),
        ("barrier_missing", "barrier_wait: no barrier was initialized"),
        ("barrier_written_over", "barrier_wait: the barrier at .* was written over"),
        ("half_of_a_block_waits", "deadlock.*\n.*warps 0: barrier 3 of the block: 32 of 64 threads"),
        ("lanes_part", "lanes went apart: this one is at .*__"),
        ("write_constant", "no access to byte .* of 512 of source"),
        ("read_misaligned", "undefined behaviour"),
        ("cluster_leaves_early", "memory of a block that has ended"),
        (
            "cluster_waits_alone",
            "deadlock.*\n.*rank 0, warps 0 1: cluster_wait: .*\n.*rank 1, .*barrier_wait",
        ),
    ],
)
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_mistakes_are_reported(name: str, error: str, seed: int) -> None:
    with pytest.raises(EmulatedError, match=error):
        selftest(name, seed)


@pytest.mark.parametrize("name", ["read_beyond_shared", "read_beyond_global"])
def test_reads_out_of_bounds_are_reported_by_most_seeds(name: str) -> None:
    """Some seeds put memory at the start of its pages instead of the end; reads beyond it are NaN bytes then."""
    reports = 0
    for seed in SEEDS:
        try:
            assert bool((selftest(name, seed) == 255).all())
        except EmulatedError as error:
            assert "no access to byte" in str(error)  # noqa: PT017
            reports += 1
    assert reports > 0


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("copy_without_wait", 255), ("not_initialized", 255), ("group_multiply_without_wait", 0x7F7F7F7F)],
)
def test_what_is_not_there_yet_is_poison(name: str, wrong: int) -> None:
    assert any(bool((selftest(name, seed) == wrong).all()) for seed in SEEDS)
