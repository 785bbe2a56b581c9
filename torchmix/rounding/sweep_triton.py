"""The inner loops of rounding as one CUDA kernel per group (L3), in Triton; imported where they are used.

A program owns some rows and keeps their group in registers. The loop over columns is inside: a column is picked out
by a sum over a row with all other columns masked, which costs g operations per element and no memory traffic. Triton
reads the annotations of its functions, so theirs stay in comments.

Shapes: N rows, g inputs of the group, B rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchmix.primitives import MIN_RANGE
from torchmix.rounding.grid import Grid

ROWS = 16  # rows of a program: 16 x 128 floats, three times, fit the registers of four warps


@triton.jit
def _nearest(x, scale, zero_point, low, high):  # type: ignore[no-untyped-def]
    """clamp(round(x / scale) + zero_point): IEEE division, half to even."""
    ratio = tl.minimum(tl.maximum(tl.div_rn(x, scale), -1048576.0), 1048576.0)
    # adding and taking away 1.5 * 2**23 rounds to an integer, half to even, for magnitudes below 2**22
    rounded = (ratio + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(rounded + zero_point, low), high)


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    x_ptr,  # (N, g) GPTQ: weights; descent: e H
    q_ptr,  # (N, g) descent: values now; GPTQ: not read
    m_ptr,  # (g, g) GPTQ: Cholesky factor; descent: Hessian
    scale_ptr,
    zero_ptr,
    low_ptr,
    high_ptr,
    codes_ptr,  # (N, g) out
    error_ptr,  # (N, g) out: GPTQ's errors, or the steps of the descent
    rows,
    x_stride,
    q_stride,
    m_stride,
    SIZE: tl.constexpr,  # g: a constant, as there are one or two sizes in a model
    DESCENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, COLUMNS)
    inside_r, inside_c = r < rows, c < SIZE
    inside = inside_r[:, None] & inside_c[None, :]
    x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0)
    scale = tl.load(scale_ptr + r, mask=inside_r, other=1.0)
    zero = tl.load(zero_ptr + r, mask=inside_r, other=0.0)
    low = tl.load(low_ptr + r, mask=inside_r, other=0.0)
    high = tl.load(high_ptr + r, mask=inside_r, other=0.0)
    if DESCENT:
        q = tl.load(q_ptr + r[:, None] * q_stride + c[None, :], mask=inside, other=0.0)
    codes = tl.zeros((BLOCK, COLUMNS), tl.float32)
    errors = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for k in range(SIZE):
        here = c == k
        m = tl.load(m_ptr + k * m_stride + c, mask=inside_c, other=0.0)
        m_kk = tl.sum(tl.where(here, m, 0.0), 0)
        x_k = tl.sum(tl.where(here[None, :], x, 0.0), 1)
        if DESCENT:
            q_k = tl.sum(tl.where(here[None, :], q, 0.0), 1)
            code = _nearest(q_k + tl.div_rn(x_k, tl.zeros_like(x_k) + m_kk), scale, zero, low, high)
            error = scale * (code - zero) - q_k
        else:
            code = _nearest(x_k, scale, zero, low, high)
            error = tl.div_rn(x_k - scale * (code - zero), tl.zeros_like(x_k) + m_kk)
        x = tl.where(c[None, :] > k, x - error[:, None] * m[None, :], x)
        codes = tl.where(here[None, :], code[:, None], codes)
        errors = tl.where(here[None, :], error[:, None], errors)
    out = r[:, None] * SIZE + c[None, :]
    tl.store(codes_ptr + out, codes, mask=inside)
    tl.store(error_ptr + out, errors, mask=inside)


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    x_ptr,  # (N, g) weights
    diagonal_ptr,  # (g,)
    factors_ptr,  # (FACTORS,)
    low_ptr,
    high_ptr,
    scale_ptr,  # (N,) out
    zero_ptr,  # (N,) out
    rows,
    x_stride,
    min_range,
    SIZE: tl.constexpr,
    FACTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, COLUMNS)
    inside_r, inside_c = r < rows, c < SIZE
    inside = inside_r[:, None] & inside_c[None, :]
    x = tl.load(x_ptr + r[:, None] * x_stride + c[None, :], mask=inside, other=0.0)
    weight = tl.load(diagonal_ptr + c, mask=inside_c, other=0.0)
    low = tl.load(low_ptr + r, mask=inside_r, other=0.0)
    high = tl.load(high_ptr + r, mask=inside_r, other=1.0)
    symmetric = low < 0.0  # only the codes of 8-bit rows have a sign
    smallest, largest = (
        tl.min(x, 1),
        tl.max(x, 1),
    )  # masked columns count as 0, which the range contains anyway
    best = tl.full((BLOCK,), float("inf"), tl.float32)
    best_scale = tl.full((BLOCK,), 1.0, tl.float32)
    best_zero = tl.zeros((BLOCK,), tl.float32)
    for f in range(FACTORS):
        factor = tl.load(factors_ptr + f)
        bottom, top = tl.minimum(smallest * factor, 0.0), tl.maximum(largest * factor, 0.0)
        extent = tl.where(symmetric, tl.maximum(-bottom, top), top - bottom)
        scale = tl.div_rn(extent, high).to(tl.bfloat16).to(tl.float32)
        scale = tl.where(extent < min_range, 1.0, scale)
        zero = tl.where(symmetric, 0.0, _nearest(-bottom, scale, 0.0, 0.0, high))
        code = _nearest(x, scale[:, None], zero[:, None], low[:, None], high[:, None])
        error = x - scale[:, None] * (code - zero[:, None])
        loss = tl.sum(error * error * weight[None, :], 1)
        better = loss < best  # of equal ones the first
        best = tl.where(better, loss, best)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    tl.store(scale_ptr + r, best_scale, mask=inside_r)
    tl.store(zero_ptr + r, best_zero, mask=inside_r)


def search_group(
    block_Ng: Tensor, limits: tuple[Tensor, Tensor], diagonal: Tensor | None, factors: list[float]
) -> tuple[Tensor, Tensor]:
    """See :func:`torchmix.rounding.clip_search.search_grid`; ``limits`` are the codes' (N,) each."""
    block_Ng = block_Ng if block_Ng.stride(-1) == 1 else block_Ng.contiguous()
    rows, columns = block_Ng.shape
    weight = block_Ng.new_ones(columns) if diagonal is None else diagonal.to(block_Ng).contiguous()
    scale, zero_point = block_Ng.new_empty(rows, 1), block_Ng.new_empty(rows, 1)
    with torch.cuda.device_of(block_Ng):
        _search[(triton.cdiv(rows, ROWS),)](
            block_Ng,
            weight,
            block_Ng.new_tensor(factors),
            *limits,
            scale,
            zero_point,
            rows,
            block_Ng.stride(0),
            MIN_RANGE,
            SIZE=columns,
            FACTORS=len(factors),
            COLUMNS=triton.next_power_of_2(columns),
            BLOCK=ROWS,
        )
    return scale, zero_point


def _launch(x: Tensor, q: Tensor, matrix: Tensor, grid: Grid, descent: bool) -> tuple[Tensor, Tensor]:
    """One kernel for all rows; the last dimension of every operand is contiguous, or is made so."""
    x, q, matrix = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, q, matrix))
    per_row = [t.float().contiguous() for t in (grid.scale, grid.zero_point, grid.low, grid.high)]
    rows, columns = x.shape
    codes, errors = x.new_empty(rows, columns), x.new_empty(rows, columns)
    with torch.cuda.device_of(x):
        _sweep[(triton.cdiv(rows, ROWS),)](
            x,
            q,
            matrix,
            *per_row,
            codes,
            errors,
            rows,
            x.stride(0),
            q.stride(0),
            matrix.stride(0),
            SIZE=columns,
            DESCENT=descent,
            COLUMNS=triton.next_power_of_2(columns),
            BLOCK=ROWS,
        )
    return codes, errors


def gptq_group(W_Ng: Tensor, U_gg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """See :func:`torchmix.rounding.sweep.gptq_group`; ``W_Ng`` is not changed."""
    return _launch(W_Ng, W_Ng, U_gg, grid, descent=False)


def descend_group(pull_Ng: Tensor, H_gg: Tensor, q_Ng: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """See :func:`torchmix.rounding.sweep.descend_group`; ``pull_Ng`` is not changed."""
    return _launch(pull_Ng, q_Ng, H_gg, grid, descent=True)
