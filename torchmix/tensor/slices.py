"""Operations that pick or join rows, experts and groups of inputs (L2): ``slice``, ``split``, ``select``, ``cat``.

The codes stay as they are; nothing is rounded again. Rows (and experts) are consecutive bytes, so slices of them
are views, as ``param.narrow(...).copy_(...)`` of a loader needs. Inputs can be cut at group borders only. Where
row widths are unknown, because a graph is being traced, slices are gathered by an op instead.

Shapes: N out_features, K in_features, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchmix.ops import gather_rows
from torchmix.packing import pack_rows, pack_zero_points, row_offsets, zero_point_offsets
from torchmix.tensor.mixed_precision_tensor import MixedPrecisionTensor

aten = torch.ops.aten
implements = MixedPrecisionTensor.implements
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@implements([aten.slice.Tensor])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, dim, start, end, step = _slice_arguments(*args)
    dim %= weight.dim()
    length = weight.shape[dim]
    start, end, step = slice(start, end, step).indices(length)
    if step != 1:
        raise NotImplementedError(
            f"slices of a MixedPrecisionTensor need step 1, got {step}; index with the row numbers instead"
        )
    end = max(start, end)
    piece = weight.with_parts() if (start, end) == (0, length) else _narrow(weight, dim, start, end)
    return return_and_correct_aliasing(func, args, kwargs, piece)


def _slice_arguments(weight: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Args:
    """Arguments of aten.slice with its defaults."""
    return weight, dim, start, end, step


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> list[Tensor]:
    weight, sizes, dim = (*args, 0)[:3]
    dim = kwargs.get("dim", dim) % weight.dim()
    length = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)] or [0]
    if sum(sizes) != length:
        raise RuntimeError(f"split sizes {list(sizes)} must add up to the {length} entries of dim {dim}")
    pieces: list[Tensor] = []
    at = 0
    for size in sizes:
        pieces.append(_narrow(weight, dim, at, at + size))
        at += size
    return pieces


@implements([aten.select.int])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, dim, index = args
    if dim % weight.dim() or weight.dim() != 3:
        raise NotImplementedError(
            f"select is defined for the experts of a 3-D MixedPrecisionTensor (dim 0), got dim={dim} of shape "
            f"{tuple(weight.shape)}; slice with [{index}:{index + 1}] or dequantize()"
        )
    if not -weight.shape[0] <= index < weight.shape[0]:
        raise IndexError(f"expert {index} of a MixedPrecisionTensor with {weight.shape[0]} experts")
    return return_and_correct_aliasing(func, args, kwargs, _expert(weight, index % weight.shape[0]))


@implements([aten.unbind.int])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> tuple[Tensor, ...]:
    weight, dim = (*args, 0)[:2]
    return tuple(aten.select.int(weight, dim, index) for index in range(weight.shape[dim]))


def _expert(weight: MixedPrecisionTensor, index: int) -> MixedPrecisionTensor:
    """One expert of a 3-D weight as a 2-D weight."""
    return _as_matrix(_narrow(weight, 0, index, index + 1))


def _as_matrix(weight: MixedPrecisionTensor) -> MixedPrecisionTensor:
    """The 2-D weight of a 3-D weight with one expert."""
    return weight.with_parts(scale=weight.scale[0], row_bits=weight.row_bits[0], shape=weight.shape[1:])


@implements([aten.index.Tensor])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """Gather rows (2-D) or whole experts (3-D): weight[ids], ids 1-D or a mask; or one expert with ids 0-D."""
    weight, indices = args
    if len(indices) != 1 or indices[0] is None or indices[0].dim() > 1:
        raise NotImplementedError(
            f"a MixedPrecisionTensor of shape {tuple(weight.shape)} can be indexed with one 1-D tensor along dim 0 "
            "only; dequantize() it first"
        )
    ids = indices[0]
    if ids.dtype == torch.bool:
        ids = ids.nonzero().squeeze(1)
    if ids.dim() == 0 and weight.dim() == 3:
        return _as_matrix(_gathered(weight, ids[None]))
    return _gathered(weight, ids)


@implements([aten.index_select.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight, dim, ids = args
    if dim % weight.dim():
        raise NotImplementedError(
            f"a MixedPrecisionTensor can be indexed along dim 0 only, got dim={dim} of {tuple(weight.shape)}"
        )
    return _gathered(weight, ids)


def _gathered(weight: MixedPrecisionTensor, ids: Tensor) -> MixedPrecisionTensor:
    """Rows of a 2-D weight, or experts of a 3-D weight, by number; negative numbers count from the end."""
    if weight.dim() == 2 and weight.transposed:
        raise NotImplementedError(
            f"the inputs (dim 0 of the transposed shape {tuple(weight.shape)}) of a MixedPrecisionTensor cannot be "
            "indexed; dequantize() it first"
        )
    if ids.dim() != 1:
        raise NotImplementedError(f"rows are indexed with a 1-D tensor, got shape {tuple(ids.shape)}")
    ids = torch.where(ids < 0, ids + weight.shape[0], ids).long()
    rows_each = weight.out_features if weight.dim() == 3 else 1
    rows = (ids[:, None] * rows_each + torch.arange(rows_each, device=ids.device)).flatten()
    return weight.with_parts(
        **_gathered_bytes(weight, rows),
        scale=weight.scale[ids],
        row_bits=weight.row_bits[ids],
        shape=(ids.shape[0], *weight.shape[1:]),
    )


def _gathered_bytes(weight: MixedPrecisionTensor, rows: Tensor) -> dict[str, Tensor]:
    """Packed codes and zero points of the stored rows ``rows``."""
    sizes = (weight.in_features, weight.scale.shape[-1])
    qdata, zero_point = gather_rows(weight.qdata, weight.zero_point, weight.row_bits, rows, *sizes)
    return {"qdata": qdata, "zero_point": zero_point}


@implements([aten.cat.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """Concatenate rows (2-D) or experts (3-D): codes are joined as they are."""
    tensors, dim = (*args, 0)[:2]
    dim = kwargs.get("dim", dim)
    if not _alike(tensors) or dim % tensors[0].dim() or (tensors[0].dim() == 2 and tensors[0].transposed):
        raise NotImplementedError(
            f"cat joins rows (dim 0) of MixedPrecisionTensors with equal inputs and settings, got dim={dim} and "
            f"{[str(t) for t in tensors]}"
        )
    return _concatenated(tensors)


@implements([aten.stack.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """Make the experts of a 3-D weight from 2-D weights."""
    tensors, dim = (*args, 0)[:2]
    dim = kwargs.get("dim", dim)
    if not _alike(tensors) or dim or any(t.dim() != 2 or t.shape != tensors[0].shape for t in tensors):
        raise NotImplementedError(
            f"stack makes experts (dim 0) of 2-D MixedPrecisionTensors of equal shapes and settings, got dim={dim} "
            f"and {[str(t) for t in tensors]}"
        )
    return _concatenated([t.unsqueeze(0) for t in tensors])


def _alike(tensors: Sequence[Any]) -> bool:
    """All quantized, with equal inputs and settings."""
    first = tensors[0]
    names = ("group_size", "dtype", "packing", "per_token", "transposed")
    return all(
        isinstance(t, MixedPrecisionTensor)
        and t.shape[1:] == first.shape[1:]
        and all(getattr(t, name) == getattr(first, name) for name in names)
        for t in tensors
    )


def _concatenated(tensors: Sequence[MixedPrecisionTensor]) -> MixedPrecisionTensor:
    """Join along the first dimension."""
    names = MixedPrecisionTensor.tensor_data_names
    inner = {name: torch.cat([getattr(t, name) for t in tensors]) for name in names}
    return tensors[0].with_parts(**inner, shape=(sum(t.shape[0] for t in tensors), *tensors[0].shape[1:]))


def _narrow(weight: MixedPrecisionTensor, dim: int, start: int, end: int) -> MixedPrecisionTensor:
    """Slice one dimension of the shape that the model sees."""
    shape = [*weight.shape]
    shape[dim] = end - start
    if dim == weight.dim() - (2 if weight.transposed else 1):
        inner = _narrow_inputs(weight, start, end)
    elif weight.dim() == 3 and dim > 0:
        inner = _narrow_expert_rows(weight, start, end)
    else:
        inner = _narrow_rows(weight, start, end)
    return weight.with_parts(**inner, shape=tuple(shape))


def _narrow_rows(weight: MixedPrecisionTensor, start: int, end: int) -> dict[str, Tensor]:
    """Consecutive rows, or consecutive experts: views of the stored bytes."""
    rows_each = weight.out_features if weight.dim() == 3 else 1
    parts = {"scale": weight.scale[start:end], "row_bits": weight.row_bits[start:end]}
    if bool(is_fake(weight)):  # bool: type checkers take is_fake for a narrowing to Tensor
        rows = torch.arange(start * rows_each, end * rows_each, device=weight.device)
        return parts | _gathered_bytes(weight, rows)
    if weight.device.type == "meta":
        raise ValueError(
            f"rows {start}..{end} of a MixedPrecisionTensor of shape {tuple(weight.shape)} on the meta device: "
            "where they are stored depends on the row widths, which have no values here; load the weight first"
        )
    bits = weight.row_bits.flatten()
    ends = torch.tensor([start * rows_each, end * rows_each], device=bits.device)
    codes_from, codes_to = row_offsets(bits, weight.in_features)[ends].tolist()
    zeros_from, zeros_to = zero_point_offsets(bits, weight.scale.shape[-1])[ends].tolist()
    return parts | {
        "qdata": weight.qdata[codes_from:codes_to],
        "zero_point": weight.zero_point[zeros_from:zeros_to],
    }


def _narrow_expert_rows(weight: MixedPrecisionTensor, start: int, end: int) -> dict[str, Tensor]:
    """The same rows of every expert: their bytes are gathered."""
    experts = torch.arange(weight.shape[0], device=weight.device)[:, None] * weight.out_features
    rows = (experts + torch.arange(start, end, device=weight.device)).flatten()
    return _gathered_bytes(weight, rows) | {
        "scale": weight.scale[:, start:end].contiguous(),
        "row_bits": weight.row_bits[:, start:end].contiguous(),
    }


def _narrow_inputs(weight: MixedPrecisionTensor, start: int, end: int) -> dict[str, Tensor]:
    """Inputs start..end of every row; both ends must be group borders, because a scale cannot be cut."""
    size, in_features = weight.group_size, weight.in_features
    if start % size or (end % size and end != in_features):
        raise ValueError(
            f"inputs {start}..{end} of a MixedPrecisionTensor with {in_features} inputs cut through a group; "
            f"start and end must be multiples of group_size={size} (or the end of the row)"
        )
    if is_fake(weight):
        raise NotImplementedError(
            f"inputs {start}..{end} of a MixedPrecisionTensor cannot be cut inside a graph; cut the weight before "
            "torch.compile or torch.export"
        )
    groups = slice(start // size, -(-end // size))
    bits = weight.row_bits.flatten()
    codes = weight.codes()[..., start:end].reshape(bits.numel(), -1)
    zero_points = weight.zero_points()[..., groups].reshape(bits.numel(), -1)
    return {
        "qdata": pack_rows(codes, bits),
        "scale": weight.scale[..., groups].contiguous(),
        "zero_point": pack_zero_points(zero_points, bits),
        "row_bits": weight.row_bits.contiguous(),
    }
