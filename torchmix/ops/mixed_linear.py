"""``torchmix::mixed_linear`` (L1): y = x @ W.T + bias with int8 activations and rows of mixed widths.

``mixed_linear`` quantizes the activations itself; ``mixed_linear_quantized`` takes them quantized, so that
layers which share an input can share that work. For each token and group of inputs the products of integers
are summed exactly; the sums are scaled and added up over the groups in float32 (MixLLM, arXiv 2412.14590,
section 3.3).

Shapes: M tokens, N out_features, K in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchmix.ops.dequantize_rows import centered_codes, dequantize_rows
from torchmix.ops.quantize_activation import quantize_activation
from torchmix.primitives import split_groups

torch.library.define(
    "torchmix::mixed_linear",
    "(Tensor x, Tensor qdata, Tensor scale, Tensor zero_point, Tensor row_bits, Tensor? bias, "
    "int group_size, bool per_token=False) -> Tensor",
)
torch.library.define(
    "torchmix::mixed_linear_quantized",
    "(Tensor codes, Tensor activation_scale, Tensor group_sum, Tensor qdata, Tensor scale, Tensor zero_point, "
    "Tensor row_bits, Tensor? bias, int group_size, ScalarType dtype) -> Tensor",
)


def mixed_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    bias: Tensor | None,
    group_size: int,
    per_token: bool = False,
) -> Tensor:
    """Linear layer on activations that are quantized on the fly.

    Differentiable in ``x`` and ``bias``; the activation quantizer counts as the identity there (straight-through),
    so that adapters can be trained through the frozen layer.

    Args:
        x: float32, bfloat16 or float16 (..., K), any number of leading dimensions, zero tokens allowed.
        qdata: uint8 1-D, packed codes (:mod:`torchmix.packing`).
        scale: bfloat16 (N, G).
        zero_point: uint8 1-D, packed.
        row_bits: uint8 (N,).
        bias: float (N,) or None.
        group_size: inputs per scale, of weights and activations; at most 512, up to which sums are exact.
        per_token: one activation scale per token instead of one per token and group.

    Returns:
        (..., N) in the dtype of ``x``, rows in their original order.
    """
    return torch.ops.torchmix.mixed_linear(x, qdata, scale, zero_point, row_bits, bias, group_size, per_token)


def mixed_linear_quantized(
    codes: Tensor,
    activation_scale: Tensor,
    group_sum: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Linear layer on activations from :func:`torchmix.ops.quantize_activation`.

    Args:
        codes: int8 (M, K).
        activation_scale: float32 (M, G).
        group_sum: int32 (M, G).
        qdata, scale, zero_point, row_bits, bias, group_size: as in :func:`mixed_linear`.
        dtype: dtype of the result.

    Returns:
        ``dtype`` (M, N).
    """
    return torch.ops.torchmix.mixed_linear_quantized(
        codes, activation_scale, group_sum, qdata, scale, zero_point, row_bits, bias, group_size, dtype
    )


def integer_linear(codes: Tensor, activation_scale: Tensor, centered: Tensor, scale: Tensor) -> Tensor:
    """Sum over groups of (integer dot product) * weight scale * activation scale.

    The zero point is subtracted from the weight codes beforehand, which gives the same integers as subtracting
    ``zero_point * group_sum`` afterwards. A float32 matrix product is exact here: every partial sum stays below
    group_size * 127 * 127 < 2**24.

    Args:
        codes: int8 (M, K).
        activation_scale: float32 (M, G).
        centered: float32 integers (N, G, group_size), code minus zero point.
        scale: bfloat16 (N, G).

    Returns:
        float32 (M, N).
    """
    groups_MG = split_groups(codes.float(), centered.shape[2])
    scale_NG = scale.float()
    y = groups_MG.new_zeros((codes.shape[0], centered.shape[0]))
    with torch.autocast(codes.device.type, enabled=False):  # the caller's autocast would round the integers
        for g in range(centered.shape[1]):
            dot_MN = groups_MG[:, g] @ centered[:, g].T
            y.addcmul_(dot_MN.mul_(scale_NG[:, g]), activation_scale[:, g, None])
    return y


@torch.library.impl("torchmix::mixed_linear_quantized", "CompositeExplicitAutograd")
def _quantized_reference(
    codes: Tensor,
    activation_scale: Tensor,
    group_sum: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_shapes(codes.shape[-1], scale, row_bits, group_size)
    centered = centered_codes(qdata, zero_point, row_bits, codes.shape[1], group_size)
    y = integer_linear(codes, activation_scale, centered, scale)
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


@torch.library.impl("torchmix::mixed_linear", "CompositeExplicitAutograd")
def _reference(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    bias: Tensor | None,
    group_size: int,
    per_token: bool = False,
) -> Tensor:
    tokens = x.reshape(-1, x.shape[-1])
    codes, activation_scale, group_sum = quantize_activation(tokens, group_size, per_token)
    weight = (qdata, scale, zero_point, row_bits, bias, group_size)
    y = mixed_linear_quantized(codes, activation_scale, group_sum, *weight, x.dtype)
    return y.view(*x.shape[:-1], row_bits.shape[0])


@torch.library.register_fake("torchmix::mixed_linear")
def _fake(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    bias: Tensor | None,
    group_size: int,
    per_token: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], row_bits.shape[0]))


@torch.library.register_fake("torchmix::mixed_linear_quantized")
def _quantized_fake(
    codes: Tensor,
    activation_scale: Tensor,
    group_sum: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((codes.shape[0], row_bits.shape[0]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qdata, scale, zero_point, row_bits, bias, group_size = inputs[:7]
    ctx.save_for_backward(qdata, scale, zero_point, row_bits)
    ctx.in_features, ctx.group_size = x.shape[-1], group_size
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dx = dL/dy @ W with the dequantized weight; dL/dbias = sum of dL/dy over the tokens."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        inner: tuple[Tensor, Tensor, Tensor, Tensor] = ctx.saved_tensors
        weight = dequantize_rows(*inner, ctx.in_features, ctx.group_size, grad.dtype)
        grad_x = grad @ weight
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None


torch.library.register_autograd("torchmix::mixed_linear", _backward, setup_context=_setup_context)


def _check_shapes(in_features: int, scale: Tensor, row_bits: Tensor, group_size: int) -> None:
    """Raise ``ValueError`` when the activations do not fit the weight."""
    expected = (*row_bits.shape, -(-in_features // group_size))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"mixed_linear: the input has {in_features} features, so with group_size={group_size} and "
            f"{row_bits.shape[0]} rows the weight needs scales of shape {expected}, but they have "
            f"{tuple(scale.shape)}; the layer was built for another input size"
        )
