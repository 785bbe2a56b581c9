"""The grid of a group, and rounding on grids of one's own choice."""

from __future__ import annotations

import torch

from torchmix.primitives import choose_qparams, quantize
from torchmix.rounding.grid import Grid, round_groups


def test_nearest_rounds_half_to_even_and_clamps():
    one = torch.ones(1, 1)
    grid = Grid(one, 2 * one, 0 * one, 7 * one)
    columns = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 99.0]])
    assert grid.nearest(columns).tolist() == [[0.0, 2.0, 2.0, 4.0, 7.0]]
    assert grid.values(grid.nearest(columns)).tolist() == [[-2.0, 0.0, 0.0, 2.0, 5.0]]


def test_limits_follow_the_widths():
    ones = torch.ones(3, 1)
    grid = Grid.of(ones, 0 * ones, torch.tensor([3, 6, 8], dtype=torch.uint8))
    assert grid.low[:, 0].tolist() == [0.0, 0.0, -127.0]
    assert grid.high[:, 0].tolist() == [7.0, 63.0, 127.0]


def test_groups_are_rounded_on_their_own_grids():
    """With the grids of round to nearest it is round to nearest, with a short last group."""
    weight, bits = torch.randn(5, 40), torch.tensor([3, 4, 5, 6, 8], dtype=torch.uint8)
    scale, zero_point = choose_qparams(weight, bits, 16)
    seen = []

    def choose(block, columns):
        seen.append((tuple(block.shape), columns.start))
        g = columns.start // 16
        return scale[:, g : g + 1].float(), zero_point[:, g : g + 1].float()

    rounded = round_groups(weight, bits, 16, choose, "mine")
    assert seen == [((5, 16), 0), ((5, 16), 16), ((5, 8), 32)]
    assert torch.equal(rounded.codes, quantize(weight, scale, zero_point, bits, 16))
    assert torch.equal(rounded.scale, scale)
    assert torch.equal(rounded.zero_point, zero_point)
    assert rounded.method == "mine"
