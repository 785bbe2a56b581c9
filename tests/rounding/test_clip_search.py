"""Clip search finds the best of its factors, and never loses against round-to-nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.generators import WIDTHS, correlated_inputs, row_bits
from torchmix.primitives import code_limits, qparams_from_range, split_groups
from torchmix.rounding import ClipSearch, clip_round, rtn_round
from torchmix.rounding.clip_search import NO_CLIP, search_grid


def group_losses(error: Tensor, hessian: Tensor | None, group_size: int) -> Tensor:
    """sum_k e_k² H_kk of every row and group, float64 (N, G)."""
    groups = split_groups(error.double(), group_size)
    columns = []
    for g, start in enumerate(range(0, error.shape[1], group_size)):
        size = min(group_size, error.shape[1] - start)
        part = slice(start, start + size)
        block = torch.eye(size) if hessian is None else hessian.diagonal()[part].diag()
        e = groups[:, g, :size]
        columns.append((e @ block.double() * e).sum(1))
    return torch.stack(columns, 1)


def by_trial(block: Tensor, bits: int, diagonal: Tensor | None) -> tuple[float, float]:
    """Best scale and zero point of one row of one group: every factor tried in float64."""
    best, found = float("inf"), (0.0, 0.0)
    for step in range(11):
        factor = 1 - 0.02 * step
        low, high = (min(float(block.min()), 0.0) * factor, max(float(block.max()), 0.0) * factor)
        extent = max(-low, high) if bits == 8 else high - low
        largest = 127 if bits == 8 else 2**bits - 1
        scale = float(torch.tensor(extent / largest).bfloat16())
        zero = 0.0 if bits == 8 else min(max(round(-low / scale), 0), largest)
        codes = (torch.round(block.double() / scale) + zero).clamp(-127 if bits == 8 else 0, largest)
        error = block.double() - scale * (codes - zero)
        loss = float(error @ error if diagonal is None else error.square() @ diagonal.double())
        if loss < best:
            best, found = loss, (scale, zero)
    return found


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_hessian", [False, True])
def test_best_factor_is_found(with_hessian: bool, device: str) -> None:
    bits = row_bits(21)
    weight, x = torch.randn(21, 16), correlated_inputs(64, 16)
    diagonal = x.square().mean(0) if with_hessian else None
    on_device = diagonal.to(device) if diagonal is not None else None
    scale, zero_point = search_grid(weight.to(device), bits.to(device), on_device, ClipSearch())
    found = list(zip(scale[:, 0].tolist(), zero_point[:, 0].tolist(), strict=True))
    assert found == [by_trial(row, int(b), diagonal) for row, b in zip(weight, bits, strict=True)]
    assert len({round(s / t, 2) for (s, _), t in zip(found, full_scales(weight, bits), strict=True)}) > 2


def full_scales(weight: Tensor, bits: Tensor) -> list[float]:
    """Scales without clipping, to see that several factors were chosen."""
    return qparams_from_range(weight.amin(1), weight.amax(1), bits)[0].tolist()


@pytest.mark.parametrize("in_features", [5, 16, 40, 44])  # less than a group, one, several, a short last one
@pytest.mark.parametrize("with_hessian", [False, True])
def test_no_group_loses_against_rtn(in_features: int, with_hessian: bool) -> None:
    """Factor 1 is among the factors. Slack: losses are compared in float32 (a relative 2**-20 here)."""
    bits = row_bits(14)
    weight, x = torch.randn(14, in_features), correlated_inputs(64, in_features)
    hessian = x.T @ x / 64 if with_hessian else None
    clip, rtn = clip_round(weight, bits, 16, hessian), rtn_round(weight, bits, 16)
    clip_loss = group_losses(weight - clip.dequantize(), hessian, 16)
    rtn_loss = group_losses(weight - rtn.dequantize(), hessian, 16)
    assert bool((clip_loss <= rtn_loss * (1 + 2.0**-20)).all())
    assert float(clip_loss.sum()) < float(rtn_loss.sum())
    assert clip.method == "clip"


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_stay_in_range(bits: int) -> None:
    width = torch.full((9,), bits, dtype=torch.uint8)
    rounded = clip_round(torch.randn(9, 20) * 10, width, 8)
    smallest, largest = code_limits(width)
    assert int(rounded.codes.min()) >= int(smallest[0])
    assert int(rounded.codes.max()) <= int(largest[0])
    assert (rounded.codes.dtype, rounded.scale.dtype, rounded.zero_point.dtype) == (
        torch.int8,
        torch.bfloat16,
        torch.uint8,
    )


def test_one_factor_is_round_to_nearest() -> None:
    weight, bits = torch.randn(14, 44), row_bits(14)
    clip, rtn = clip_round(weight, bits, 16, search=NO_CLIP), rtn_round(weight, bits, 16)
    assert torch.equal(clip.codes, rtn.codes)
    assert torch.equal(clip.scale, rtn.scale)
    assert torch.equal(clip.zero_point, rtn.zero_point)


def test_zero_groups_stay_zero() -> None:
    weight = torch.randn(7, 24)
    weight[:, 8:16] = 0.0
    dense = clip_round(weight, row_bits(7), 8).dequantize()
    assert not dense[:, 8:16].any()


def test_factors_are_the_papers() -> None:
    assert ClipSearch().factors() == pytest.approx([1 - 0.02 * i for i in range(11)], abs=1e-12)
    assert NO_CLIP.factors() == [1.0]
    assert ClipSearch(1, 0.5).factors() == [1.0]


@pytest.mark.parametrize(("points", "shrink"), [(0, 0.2), (-1, 0.2), (11, -0.1), (11, 1.0)])
def test_impossible_grids_are_refused(points: int, shrink: float) -> None:
    with pytest.raises(
        ValueError, match=rf"grid_points >= 1 and 0 <= max_shrink < 1, got {points} and {shrink}"
    ):
        ClipSearch(points, shrink)
