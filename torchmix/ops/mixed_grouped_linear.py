"""``torchmix::mixed_grouped_linear`` (L1): one linear layer per expert over tokens sorted by expert.

The counterpart of ``torch.nn.functional.grouped_mm`` for mixture-of-experts weights of shape (E, N, K).

Shapes: S (token, expert) pairs, E experts, N out_features, K in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchmix.ops.dequantize_rows import dequantize_rows
from torchmix.ops.mixed_linear import mixed_linear
from torchmix.packing import row_offsets, zero_point_offsets

torch.library.define(
    "torchmix::mixed_grouped_linear",
    "(Tensor x, Tensor offsets, Tensor qdata, Tensor scale, Tensor zero_point, Tensor row_bits, "
    "int group_size, bool per_token=False) -> Tensor",
)


def mixed_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    group_size: int,
    per_token: bool = False,
) -> Tensor:
    """Apply expert e to the rows ``offsets[e - 1] .. offsets[e]`` of ``x``.

    Differentiable in ``x``, as :func:`torchmix.ops.mixed_linear` is.

    Args:
        x: float32, bfloat16 or float16 (S, K), sorted by expert.
        offsets: int32 or int64 (E,), where the rows of each expert end.
        qdata: uint8 1-D, packed codes of all experts, one expert after another.
        scale: bfloat16 (E, N, G).
        zero_point: uint8 1-D, packed.
        row_bits: uint8 (E, N).
        group_size: inputs per scale.
        per_token: one activation scale per token instead of one per token and group.

    Returns:
        (S, N) in the dtype of ``x``; rows from ``offsets[-1]`` on are zero.
    """
    return torch.ops.torchmix.mixed_grouped_linear(
        x, offsets, qdata, scale, zero_point, row_bits, group_size, per_token
    )


def _experts(
    offsets: Tensor, qdata: Tensor, scale: Tensor, zero_point: Tensor, row_bits: Tensor, in_features: int
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Rows of x and packed weight of every expert that has tokens."""
    rows_per_expert = row_bits.shape[1]
    ends = offsets.tolist()
    codes_at = row_offsets(row_bits, in_features)[::rows_per_expert].tolist()
    zeros_at = zero_point_offsets(row_bits, scale.shape[-1])[::rows_per_expert].tolist()
    for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start < end:
            codes = qdata[codes_at[e] : codes_at[e + 1]]
            zeros = zero_point[zeros_at[e] : zeros_at[e + 1]]
            yield slice(start, end), (codes, scale[e], zeros, row_bits[e])


@torch.library.impl("torchmix::mixed_grouped_linear", "CompositeExplicitAutograd")
def _reference(
    x: Tensor,
    offsets: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    group_size: int,
    per_token: bool = False,
) -> Tensor:
    y = x.new_zeros((x.shape[0], row_bits.shape[1]))
    for rows, weight in _experts(offsets, qdata, scale, zero_point, row_bits, x.shape[1]):
        y[rows] = mixed_linear(x[rows], *weight, None, group_size, per_token)
    return y


@torch.library.register_fake("torchmix::mixed_grouped_linear")
def _fake(
    x: Tensor,
    offsets: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    group_size: int,
    per_token: bool = False,
) -> Tensor:
    return x.new_empty((x.shape[0], row_bits.shape[1]))


torch.library.define(
    "torchmix::mixed_grouped_linear_backward",
    "(Tensor grad, Tensor offsets, Tensor qdata, Tensor scale, Tensor zero_point, Tensor row_bits, "
    "int in_features, int group_size) -> Tensor",
)


@torch.library.impl("torchmix::mixed_grouped_linear_backward", "CompositeExplicitAutograd")
def _backward_reference(
    grad: Tensor,
    offsets: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    in_features: int,
    group_size: int,
) -> Tensor:
    grad_x = grad.new_zeros((grad.shape[0], in_features))
    for rows, weight in _experts(offsets, qdata, scale, zero_point, row_bits, in_features):
        grad_x[rows] = grad[rows] @ dequantize_rows(*weight, in_features, group_size, grad.dtype)
    return grad_x


@torch.library.register_fake("torchmix::mixed_grouped_linear_backward")
def _backward_fake(
    grad: Tensor,
    offsets: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    in_features: int,
    group_size: int,
) -> Tensor:
    return grad.new_empty((grad.shape[0], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, qdata, scale, zero_point, row_bits, group_size = inputs[:7]
    ctx.save_for_backward(offsets, qdata, scale, zero_point, row_bits)
    ctx.in_features, ctx.group_size = x.shape[-1], group_size


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = torch.ops.torchmix.mixed_grouped_linear_backward(
        grad, *ctx.saved_tensors, ctx.in_features, ctx.group_size
    )
    return grad_x, None, None, None, None, None, None, None


torch.library.register_autograd("torchmix::mixed_grouped_linear", _backward, setup_context=_setup_context)
