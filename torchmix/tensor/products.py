"""Matrix products with a quantized weight (L2): ``F.linear``, ``mm``, ``addmm``, ``bmm``, ``grouped_mm``.

``x @ W.T`` sums over the inputs of each row: it goes to the registered ops, which quantize the activations.
``g @ W`` sums over the output features, along which nothing shares a scale. It occurs when gradients flow back
through ``x @ W.T`` and multiplies with the dequantized weight.

Shapes: N out_features, K in_features, E experts, M tokens, S (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchmix.ops import mixed_grouped_linear, mixed_linear, mixed_linear_tiled
from torchmix.tensor import tiled_tensor
from torchmix.tensor.mixed_precision_tensor import OPS_BY_NAME, MixedPrecisionTensor
from torchmix.tensor.packed_tensor import PackedTensor
from torchmix.tensor.shapes import swapped
from torchmix.tensor.tiled_tensor import TiledTensor

aten = torch.ops.aten
implements = MixedPrecisionTensor.implements
implements_torch_function = MixedPrecisionTensor.implements_torch_function
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def linear(x: Tensor, weight: PackedTensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a 2-D weight as the model sees it: x (..., K), weight (N, K) -> (..., N).

    A ``transposed`` weight is stored by the rows of its other dimension; it is dequantized.

    Raises:
        ValueError: for a weight that is not 2-D, or an input of another size.
    """
    if weight.dim() != 2:
        raise ValueError(
            f"linear needs a weight of shape (out_features, in_features), but this one is {tuple(weight.shape)}; "
            "index one expert first"
        )
    x = _autocast(x)
    if weight.transposed:
        dense = weight.dequantize(x.dtype)
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))
    _check_inputs("linear", x, weight)
    if isinstance(weight, TiledTensor):
        tiles = (weight.tiles, weight.row_index, weight.tile_table)
        return mixed_linear_tiled(x, *tiles, bias, weight.out_features, weight.per_token)
    return mixed_linear(x, *_inner(weight), bias, weight.group_size, weight.per_token)


def _check_inputs(name: str, x: Tensor, weight: PackedTensor) -> None:
    """Raise ``ValueError`` unless the last dimension of ``x`` is the weight's K; padding would hide the difference."""
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"{name}: the input of shape {tuple(x.shape)} has {x.shape[-1]} features, but the weight takes "
            f"{weight.in_features} (shape {tuple(weight.shape)}); the input belongs to another layer"
        )


def _inner(weight: MixedPrecisionTensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inner tensors in the order of the ops' arguments."""
    return weight.qdata, weight.scale, weight.zero_point, weight.row_bits


def _autocast(x: Tensor) -> Tensor:
    """The dtype that ``F.linear`` would compute in: calls that reach the subclass skip autocast's own casts."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@tiled_tensor.implements([aten.linear.default])
@tiled_tensor.implements_torch_function([torch.nn.functional.linear])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, PackedTensor) or isinstance(input, PackedTensor):
            raise NotImplementedError(
                f"linear: a quantized weight can only be the weight, but input and weight are "
                f"{type(input).__name__} and {type(weight).__name__}"
            )
        return linear(input, weight, bias)

    return call(*args, **(kwargs or {}))


@tiled_tensor.implements([aten.mm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    return _product(*args)


@tiled_tensor.implements([aten.addmm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    bias, left, right = args
    alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
    if alpha == beta == 1 and bias.dim() == 1 and isinstance(right, PackedTensor):
        return linear(left, swapped(right), bias)
    y = _product(left, right)
    return y * alpha + bias * beta


def _product(left: Any, right: Any) -> Tensor:
    """left @ right with a quantized weight on one side."""
    if isinstance(left, PackedTensor):
        _check_one_quantized(right)
        return _product(right.t(), swapped(left)).t()
    return linear(left, swapped(right))


def _check_one_quantized(other: Tensor) -> None:
    """Raise when both operands are quantized."""
    if isinstance(other, PackedTensor):
        raise NotImplementedError(
            "a product of two MixedPrecisionTensors is not defined; dequantize() one of them first"
        )


def _grouped_mm(x: Tensor, weight: Any, offs: Tensor | None = None, **kwargs: Any) -> Tensor:
    """grouped_mm(x (S, K), weight (E, K, N), offs (E,)) -> (S, N)."""
    if (
        offs is None
        or not isinstance(weight, MixedPrecisionTensor)
        or weight.dim() != 3
        or not weight.transposed
        or any(value is not None for value in kwargs.values())
    ):
        raise NotImplementedError(
            f"grouped_mm needs offsets and quantized expert weights as (experts, in_features, out_features), "
            f"weight.transpose(-2, -1) of the stored (experts, out_features, in_features), and no further options; "
            f"got {type(weight).__name__} of shape {tuple(weight.shape)}, offs={offs} and options {kwargs}"
        )
    _check_inputs("grouped_mm", x, weight)
    return mixed_grouped_linear(_autocast(x), offs, *_inner(weight), weight.group_size, weight.per_token)


@implements_torch_function([torch._grouped_mm, torch.nn.functional.grouped_mm])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    return _grouped_mm(*args, **(kwargs or {}))


@implements([aten._grouped_mm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    return _grouped_mm(*args, **kwargs)


@implements([aten.bmm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """Batched product with one weight per batch entry, on either side."""
    return _batched(*args)


@implements([aten.baddbmm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    bias, left, right = args
    return _batched(left, right) * kwargs.get("alpha", 1) + bias * kwargs.get("beta", 1)


def _batched(left: Any, right: Any) -> Tensor:
    """left (S, M, K) @ right (S, K, N) with a quantized weight on one side; M rows per expert."""
    if isinstance(left, MixedPrecisionTensor):  # (S, N, K) @ (S, K, M) = ((S, M, K) @ (S, K, N)) transposed
        _check_one_quantized(right)
        return _batched(right.transpose(1, 2), swapped(left)).transpose(1, 2)
    if not right.transposed:
        return torch.bmm(left, right.dequantize(left.dtype))
    batch, tokens, in_features = left.shape
    offs = torch.arange(1, batch + 1, device=left.device, dtype=torch.int32) * tokens
    return _grouped_mm(left.reshape(-1, in_features), right, offs).view(batch, tokens, right.shape[2])


# transformers' own op for experts in graphs whose weights are not bfloat16, and its gradient.
def _grouped_mm_fallback(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    return _grouped_mm(*args, **kwargs)


def _grouped_mm_fallback_backward(
    func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs
) -> tuple[Tensor, Tensor]:
    def call(input: Tensor, weight: Any, offs: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        sizes = (weight.in_features, weight.group_size)
        backward = torch.ops.torchmix.mixed_grouped_linear_backward
        unused = grad_output.new_zeros(())  # the frozen weight has no gradient
        return backward(grad_output, offs, *_inner(weight), *sizes), unused

    return call(*args, **kwargs)


OPS_BY_NAME["transformers::grouped_mm_fallback"] = _grouped_mm_fallback
OPS_BY_NAME["transformers::grouped_mm_fallback_backward"] = _grouped_mm_fallback_backward
