"""Operations that look at the same bytes in another shape (L2): ``t``, ``transpose``, ``view``, ``unsqueeze``.

The stored rows stay output features. Swapping the last two dimensions sets a flag, so ``x @ weight.t()`` finds
the rows it needs, and experts (E, N, K) and the rows of all experts (E * N, K) are the same bytes.

Shapes: N out_features, K in_features, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor
from torchmix.tensor.packed_tensor import PackedTensor
from torchmix.tensor.tiled_tensor import implements as implements_both

aten = torch.ops.aten
implements = MixedPrecisionTensor.implements
Packed = TypeVar("Packed", bound=PackedTensor)
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def swapped(weight: Packed) -> Packed:
    """The same weight with the last two dimensions swapped; shares all data."""
    shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    return weight.with_parts(shape=shape, transposed=not weight.transposed)


@implements_both([aten.t.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    if args[0].dim() != 2:
        raise RuntimeError(f"t() expects a 2-D weight, got shape {tuple(args[0].shape)}; use .mT for experts")
    return return_and_correct_aliasing(func, args, kwargs, swapped(args[0]))


@implements_both([aten.transpose.int])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, first, second = args
    order = list(range(weight.dim()))
    order[first], order[second] = order[second], order[first]
    return return_and_correct_aliasing(func, args, kwargs, _permuted(weight, order))


@implements_both([aten.permute.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, dims = args
    order = [dim % weight.dim() for dim in dims]
    return return_and_correct_aliasing(func, args, kwargs, _permuted(weight, order))


def _permuted(weight: Packed, order: list[int]) -> Packed:
    """Dimensions in another order, of which two are possible."""
    plain = list(range(weight.dim()))
    if order == plain:
        return weight.with_parts()
    if order == [*plain[:-2], plain[-1], plain[-2]]:
        return swapped(weight)
    raise NotImplementedError(
        f"only the last two dimensions of a MixedPrecisionTensor can be swapped, got the order {order}; "
        "dequantize() it first"
    )


@implements([aten.view.default, aten._unsafe_view.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, size = args
    return return_and_correct_aliasing(func, args, kwargs, _viewed(weight, _resolved(size, weight.numel())))


def _resolved(size: Sequence[int], numel: int) -> tuple[int, ...]:
    """Sizes with a -1 filled in."""
    known = 1
    for length in size:
        known *= length if length != -1 else 1
    return tuple(numel // known if length == -1 else length for length in size)


def _viewed(weight: MixedPrecisionTensor, size: tuple[int, ...]) -> MixedPrecisionTensor:
    """Same shape, or rows of all experts (E * N, K) as experts (E, N, K) and back."""
    if size == tuple(weight.shape):
        return weight.with_parts()
    rows = 1
    for length in size[:-1]:
        rows *= length
    if (
        weight.transposed
        or len(size) not in (2, 3)
        or (rows, size[-1]) != (weight.row_bits.numel(), weight.in_features)
    ):
        raise NotImplementedError(
            f"a MixedPrecisionTensor of shape {tuple(weight.shape)}{' (transposed)' if weight.transposed else ''} "
            f"cannot be viewed as {size}; dequantize() it first"
        )
    return _with_row_shape(weight, size[:-1])


def _with_row_shape(weight: MixedPrecisionTensor, rows: Sequence[int]) -> MixedPrecisionTensor:
    """The stored rows arranged as (N,) or (E, N)."""
    last = (weight.in_features, rows[-1]) if weight.transposed else (rows[-1], weight.in_features)
    return weight.with_parts(
        scale=weight.scale.view(*rows, weight.scale.shape[-1]),
        row_bits=weight.row_bits.view(*rows),
        shape=(*rows[:-1], *last),
    )


@implements([aten.unsqueeze.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, dim = args
    if weight.dim() != 2 or dim not in (0, -3):
        raise NotImplementedError(
            f"unsqueeze makes one expert (dim 0) of a 2-D MixedPrecisionTensor, got dim={dim} of shape "
            f"{tuple(weight.shape)}; dequantize() it first"
        )
    experts = _with_row_shape(weight, (1, *weight.row_bits.shape))
    return return_and_correct_aliasing(func, args, kwargs, experts)


@implements([aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, dims = args if len(args) > 1 else (args[0], range(args[0].dim()))
    dims = [dim % weight.dim() for dim in (dims if not isinstance(dims, int) else [dims])]
    wanted = [dim for dim in dims if weight.shape[dim] == 1]
    if not wanted:
        return return_and_correct_aliasing(func, args, kwargs, weight.with_parts())
    if wanted != [0] or weight.dim() != 3:
        raise NotImplementedError(
            f"squeeze drops the first dimension of a single expert only, got dims {wanted} of shape "
            f"{tuple(weight.shape)}; dequantize() it first"
        )
    matrix = _with_row_shape(weight, weight.row_bits.shape[1:])
    return return_and_correct_aliasing(func, args, kwargs, matrix)


@implements([aten.expand.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, size = args[:2]
    if [length if length != -1 else own for length, own in zip(size, weight.shape, strict=False)] != [
        *weight.shape
    ] or len(size) != weight.dim():
        raise NotImplementedError(
            f"a MixedPrecisionTensor of shape {tuple(weight.shape)} cannot be expanded to {tuple(size)}; "
            "dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs, weight.with_parts())
