"""The inner loops against plain loops in float64, for groups of any size."""

from __future__ import annotations

import pytest
import torch

from torchmix.primitives import code_limits, qparams_from_range
from torchmix.rounding.grid import Grid
from torchmix.rounding.sweep import descend_group, gptq_group

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
]


def problem(rows, size, device="cpu"):
    """A block of weights, a grid of mixed widths, and a positive definite matrix."""
    generator = torch.Generator().manual_seed(rows * 1000 + size)
    block = torch.randn(rows, size, generator=generator)
    bits = torch.tensor([3, 4, 5, 6, 8] * rows, dtype=torch.uint8)[:rows]
    scale, zero = qparams_from_range(block.amin(1, keepdim=True), block.amax(1, keepdim=True), bits)
    low, high = (limit[:, None] for limit in code_limits(bits))
    x = torch.randn(4 * size, size, generator=generator)
    grid = Grid(*(part.to(device) for part in (scale, zero, low, high)))
    return block.to(device), grid, (x.T @ x / len(x) + 0.1 * torch.eye(size)).to(device)


def gptq_by_hand(block, upper, grid):
    w, codes, errors = block.double().cpu(), [], []
    upper = upper.double().cpu()
    scale, zero, low, high = (
        part.double().cpu()[:, 0] for part in (grid.scale, grid.zero_point, grid.low, grid.high)
    )
    for k in range(w.shape[1]):
        code = torch.minimum(torch.maximum(torch.round(w[:, k] / scale) + zero, low), high)
        error = (w[:, k] - scale * (code - zero)) / upper[k, k]
        w[:, k + 1 :] -= error[:, None] * upper[k, k + 1 :]
        codes.append(code)
        errors.append(error)
    return torch.stack(codes, 1), torch.stack(errors, 1)


def descend_by_hand(block, values, hessian, grid):
    """One input after another, the whole error computed anew each time."""
    w, q, H = block.double().cpu(), values.double().cpu().clone(), hessian.double().cpu()
    scale, zero, low, high = (
        part.double().cpu()[:, 0] for part in (grid.scale, grid.zero_point, grid.low, grid.high)
    )
    codes = torch.empty_like(q)
    for k in range(q.shape[1]):
        wanted = q[:, k] + ((w - q) @ H[:, k]) / H[k, k]
        codes[:, k] = torch.minimum(torch.maximum(torch.round(wanted / scale) + zero, low), high)
        q[:, k] = scale * (codes[:, k] - zero)
    return codes, q


def agree(found, expected):
    """Rows whose codes are all equal; float32 may tip a rounding, after which the rest of the row may differ."""
    equal = (found.double().cpu() == expected).all(1)
    assert equal.float().mean() >= 0.9
    return equal


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (40, 16), (33, 43), (100, 128)])
def test_gptq_group(rows, size, device):
    block, grid, hessian = problem(rows, size, device)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    expected, errors = gptq_by_hand(block, upper, grid)
    codes, found = gptq_group(block.clone(), upper, grid)
    equal = agree(codes, expected)
    torch.testing.assert_close(found.double().cpu()[equal], errors[equal], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 5), (40, 16), (33, 43), (100, 128)])
def test_descend_group(rows, size, device):
    block, grid, hessian = problem(rows, size, device)
    values = grid.values(grid.nearest(block))
    expected, moved = descend_by_hand(block, values, hessian, grid)
    codes, step = descend_group((block - values) @ hessian, hessian, values, grid)
    equal = agree(codes, expected)
    torch.testing.assert_close((values + step).double().cpu()[equal], moved[equal], rtol=1e-4, atol=1e-5)
