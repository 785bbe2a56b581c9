"""GPTQ against the method it was derived from, and against simpler rounding on correlated inputs.

The oracle is Optimal Brain Quantization with a fixed order (arXiv 2208.11580, eq. 2): after each column the inverse
Hessian itself is updated in float64, without Cholesky factor, blocks or lazy updates.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.generators import WIDTHS, correlated_inputs, row_bits
from torchmix.primitives import code_limits, qparams_from_range
from torchmix.rounding import RoundedWeight, clip_round, gptq_round, rtn_round
from torchmix.rounding.clip_search import NO_CLIP, ClipSearch, search_grid


def problem(rows: int, in_features: int, widths: tuple[int, ...] = WIDTHS) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, row widths and Hessian of correlated inputs, some features much larger than others."""
    x = correlated_inputs(4 * in_features, in_features) * torch.logspace(-1, 1, in_features).roll(3)
    return torch.randn(rows, in_features), row_bits(rows, widths), 2 / len(x) * x.T @ x


def output_loss(weight: Tensor, rounded: RoundedWeight, hessian: Tensor) -> Tensor:
    """e H eᵀ per row: the squared error of the outputs, float64 (N,)."""
    error = (weight - rounded.dequantize()).double()
    return (error @ hessian.double() * error).sum(1)


def obq(weight: Tensor, bits: Tensor, hessian: Tensor, order: list[list[int]], clip: bool) -> Tensor:
    """Dequantized weight after rounding column by column in ``order`` (groups of columns)."""
    w, H = weight.double().clone(), hessian.double()
    inverse = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(len(H)))
    dense = torch.empty_like(w)
    smallest, largest = (limit[:, None].double() for limit in code_limits(bits))
    for group in order:
        block = w[:, group].float()
        if clip:
            grid = search_grid(block, bits, hessian.diagonal()[group], ClipSearch())
        else:
            grid = qparams_from_range(block.amin(1, keepdim=True), block.amax(1, keepdim=True), bits)
        scale, zero = (part.double() for part in grid)
        for k in group:
            column = w[:, k : k + 1]
            codes = (torch.round(column / scale) + zero).clamp(smallest, largest)
            dense[:, k : k + 1] = scale * (codes - zero)
            error = (column - dense[:, k : k + 1]) / inverse[k, k]
            w -= error * inverse[k]
            inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
            inverse[k, k] = 1.0  # column k is done: it is never read again, only kept from dividing by zero
    return dense


def groups_of(in_features: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, in_features))) for start in range(0, in_features, size)]


@pytest.mark.parametrize("in_features", [5, 16, 32, 43])  # less than a group, one, several, a short last one
@pytest.mark.parametrize("clip", [False, True])
def test_equals_optimal_brain_quantization(in_features: int, clip: bool) -> None:
    weight, bits, hessian = problem(14, in_features)
    search = None if clip else NO_CLIP
    rounded = gptq_round(weight, bits, 16, hessian, search=search, group_reorder=False)
    assert (rounded.method, rounded.note) == ("gptq", "")
    assert rounded.scale.shape == (14, -(-in_features // 16))
    expected = obq(weight, bits, hessian, groups_of(in_features, 16), clip)
    assert torch.equal(rounded.dequantize().double(), expected)


def test_groups_are_visited_by_falling_diagonal() -> None:
    """Largest sum of diag(H) first; each group keeps its place in the stored order."""
    weight, bits, hessian = problem(14, 43)
    groups = groups_of(43, 16)
    groups.sort(key=lambda group: -float(hessian.diagonal()[group].sum()))
    assert groups[0][0] != 0
    rounded = gptq_round(weight, bits, 16, hessian)
    assert torch.equal(rounded.dequantize().double(), obq(weight, bits, hessian, groups, clip=True))
    unordered = gptq_round(weight, bits, 16, hessian, group_reorder=False)
    assert not torch.equal(rounded.dequantize(), unordered.dequantize())


def test_equal_diagonals_are_visited_in_order() -> None:
    weight, bits, _ = problem(14, 48)
    x = correlated_inputs(100, 16)
    hessian = torch.kron(torch.eye(3), x.T @ x / 100)
    first, second = (gptq_round(weight, bits, 16, hessian, group_reorder=flag) for flag in (True, False))
    assert torch.equal(first.dequantize(), second.dequantize())


def test_mixed_widths_in_one_pass_equal_separate_passes() -> None:
    weight, bits, hessian = problem(28, 40)
    together = gptq_round(weight, bits, 16, hessian)
    for width in WIDTHS:
        rows = bits == width
        alone = gptq_round(weight[rows], bits[rows], 16, hessian)
        assert torch.equal(alone.codes, together.codes[rows])
        assert torch.equal(alone.scale, together.scale[rows])
        assert torch.equal(alone.zero_point, together.zero_point[rows])


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_output_error_gptq_below_clip_below_rtn(bits: int) -> None:
    """In the sum over 32 rows, with a wide margin for GPTQ; not for every single row."""
    weight, _, hessian = problem(32, 128)
    widths = torch.full((32,), bits, dtype=torch.uint8)
    gptq = output_loss(weight, gptq_round(weight, widths, 32, hessian), hessian).sum()
    clip = output_loss(weight, clip_round(weight, widths, 32, hessian), hessian).sum()
    rtn = output_loss(weight, rtn_round(weight, widths, 32), hessian).sum()
    assert gptq < 0.7 * clip
    assert clip < rtn


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    """A diagonal Hessian: no column is ever updated, so GPTQ is clip search with that Hessian."""
    weight, bits, _ = problem(14, 43)
    hessian = torch.diag(torch.rand(43) + 0.1)
    gptq, clip = gptq_round(weight, bits, 16, hessian), clip_round(weight, bits, 16, hessian)
    assert torch.equal(gptq.codes, clip.codes)
    assert torch.equal(gptq.scale, clip.scale)


def test_the_factor_of_the_hessian_does_not_matter() -> None:
    weight, bits, hessian = problem(14, 43)
    first, second = gptq_round(weight, bits, 16, hessian), gptq_round(weight, bits, 16, hessian * 2.0**20)
    assert torch.equal(first.codes, second.codes)


def test_arguments_are_left_alone() -> None:
    weight, bits, hessian = problem(14, 43)
    before = (weight.clone(), bits.clone(), hessian.clone())
    for reorder in (True, False):
        gptq_round(weight, bits, 16, hessian, group_reorder=reorder)
    assert all(torch.equal(a, b) for a, b in zip((weight, bits, hessian), before, strict=True))


def hessian_with_lowest(eigenvalue: float, size: int = 16) -> Tensor:
    """Symmetric, all eigenvalues 1 but one; mean diagonal about 1."""
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    values = torch.ones(size, dtype=torch.float64)
    values[0] = eigenvalue
    return (rotation * values @ rotation.T).float()


@pytest.mark.parametrize(("eigenvalue", "damping"), [(0.5, None), (0.0, None), (-0.05, "0.1"), (-0.5, "1")])
def test_damping_is_raised_as_far_as_needed(eigenvalue: float, damping: str | None) -> None:
    """1 % of the mean diagonal lifts 0 above zero, 10 % lifts -0.05, 100 % lifts -0.5."""
    rounded = gptq_round(torch.randn(14, 16), row_bits(14), 8, hessian_with_lowest(eigenvalue))
    assert rounded.method == "gptq"
    assert rounded.note == ("" if damping is None else f"GPTQ needed a damping of {damping} instead of 0.01")


def test_a_single_token_is_enough() -> None:
    """Rank one: singular, but the damping makes it definite."""
    x = torch.randn(1, 40)
    rounded = gptq_round(torch.randn(7, 40), row_bits(7), 16, 2 * x.T @ x)
    assert (rounded.method, rounded.note) == ("gptq", "")


def bad_hessians() -> dict[str, Tensor]:
    nan, infinite = torch.eye(16), torch.eye(16)
    nan[3, 3], infinite[2, 5] = float("nan"), float("inf")
    return {
        "even at a damping of 1": hessian_with_lowest(-3.0),
        "Hessian is zero": torch.zeros(16, 16),
        "Hessian is not finite": nan,
        "is not finite": infinite,
    }


@pytest.mark.parametrize("reason", list(bad_hessians()))
def test_useless_hessians_fall_back_to_clip_search(reason: str) -> None:
    weight, bits = torch.randn(14, 16), row_bits(14)
    rounded = gptq_round(weight, bits, 8, bad_hessians()[reason])
    assert rounded.method == "clip"
    assert reason in rounded.note
    assert "rounded with clip search instead of GPTQ" in rounded.note
    assert torch.equal(rounded.dequantize(), clip_round(weight, bits, 8).dequantize())


def test_unused_inputs_are_rounded_to_nearest() -> None:
    """A feature that is always zero says nothing about the others and is not moved by them."""
    weight, bits, hessian = problem(14, 32)
    hessian[5, :], hessian[:, 5] = 0.0, 0.0
    rounded = gptq_round(weight, bits, 16, hessian, search=NO_CLIP, group_reorder=False)
    step = rounded.scale.float()[:, :1]
    error = (weight - rounded.dequantize())[:, 5:6].abs()
    largest = code_limits(bits)[1][:, None]  # the bound of test_primitives.py
    assert bool((error <= step * (0.5 + 2.0**-16 + largest * 2.0**-8)).all())
    assert torch.isfinite(rounded.dequantize()).all()
