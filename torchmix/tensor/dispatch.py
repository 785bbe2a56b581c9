"""What PyTorch operations do with a :class:`MixedPrecisionTensor` (L2).

Linear layers and matrix products go to the registered ops. Slices along rows, and along inputs at group
borders, give quantized tensors again. Everything that PyTorch's own composition asks for (``t``, ``view`` to the
same shape, ``.to``) is here too; anything else raises, because a silent ``dequantize`` would hide a cost.

Shapes: N out_features, K in_features, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchmix.ops import mixed_grouped_linear, mixed_linear
from torchmix.packing import pack_rows, pack_zero_points, row_offsets, zero_point_offsets
from torchmix.tensor.mixed_precision_tensor import WEIGHT_DTYPES, MixedPrecisionTensor

aten = torch.ops.aten
implements = MixedPrecisionTensor.implements
implements_torch_function = MixedPrecisionTensor.implements_torch_function
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
REGISTERED = True


def linear(x: Tensor, weight: MixedPrecisionTensor, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a 2-D weight as the model sees it: x (..., K), weight (N, K) -> (..., N)."""
    if weight.transposed or weight.dim() != 2:
        raise NotImplementedError(
            f"linear needs a weight of shape (out_features, in_features), but this one is "
            f"{'transposed ' if weight.transposed else ''}{tuple(weight.shape)}; index the experts or call .t() first"
        )
    _check_inputs("linear", x, weight)
    x = _autocast(x)
    return mixed_linear(
        x,
        weight.qdata,
        weight.scale,
        weight.zero_point,
        weight.row_bits,
        bias,
        weight.group_size,
        weight.per_token,
    )


def _check_inputs(name: str, x: Tensor, weight: MixedPrecisionTensor) -> None:
    """Raise ``ValueError`` unless the last dimension of ``x`` is the weight's K; padding would hide the difference."""
    if x.shape[-1] != weight.in_features:
        raise ValueError(
            f"{name}: the input of shape {tuple(x.shape)} has {x.shape[-1]} features, but the weight takes "
            f"{weight.in_features} (shape {tuple(weight.shape)}); the input belongs to another layer"
        )


def _autocast(x: Tensor) -> Tensor:
    """The dtype that ``F.linear`` would compute in: calls that reach the subclass skip autocast's own casts."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


@implements([aten.linear.default])
@implements_torch_function([torch.nn.functional.linear])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, MixedPrecisionTensor):
            raise TypeError(
                f"linear: a MixedPrecisionTensor can only be the weight, but the weight is {type(weight)}"
            )
        return linear(input, weight, bias)

    return call(*args, **(kwargs or {}))


@implements([aten.mm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    return linear(args[0], _right_operand("mm", args[1]))


@implements([aten.addmm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    if any((kwargs or {}).get(name, 1) != 1 for name in ("alpha", "beta")):
        raise NotImplementedError(
            f"addmm with a MixedPrecisionTensor supports alpha = beta = 1 only, got {kwargs}"
        )
    bias, x, weight = args
    y = linear(x, _right_operand("addmm", weight))
    return y + bias


def _right_operand(name: str, weight: Any) -> MixedPrecisionTensor:
    """The weight of ``x @ weight`` as (N, K), without copying."""
    if not isinstance(weight, MixedPrecisionTensor):
        raise TypeError(
            f"{name}: a MixedPrecisionTensor can only be the right operand, but that is {type(weight)}"
        )
    return _swapped(weight)


def _grouped_mm(x: Tensor, weight: Any, offs: Tensor, **kwargs: Any) -> Tensor:
    """grouped_mm(x (S, K), weight (E, K, N), offs (E,)) -> (S, N)."""
    weight = _right_operand("grouped_mm", weight)
    if weight.transposed or weight.dim() != 3 or any(value is not None for value in kwargs.values()):
        raise NotImplementedError(
            f"grouped_mm needs expert weights of shape (experts, in_features, out_features) and no further "
            f"options, but got stored shape {tuple(weight.shape)} and options {kwargs}"
        )
    _check_inputs("grouped_mm", x, weight)
    inner = (weight.qdata, weight.scale, weight.zero_point, weight.row_bits)
    return mixed_grouped_linear(_autocast(x), offs, *inner, weight.group_size, weight.per_token)


@implements_torch_function([torch._grouped_mm, torch.nn.functional.grouped_mm])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    return _grouped_mm(*args, **(kwargs or {}))


@implements([aten._grouped_mm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    return _grouped_mm(*args, **(kwargs or {}))


@implements([aten.bmm.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    """Batched product with one weight per batch entry, on either side."""
    left, right = args
    if isinstance(left, MixedPrecisionTensor):  # (S, N, K) @ (S, K, M) = ((S, M, K) @ (S, K, N)) transposed
        return _batched(right.transpose(1, 2), _swapped(left)).transpose(1, 2)
    return _batched(left, right)


def _batched(x: Tensor, weight: MixedPrecisionTensor) -> Tensor:
    """x (S, M, K) @ weight (S, K, N) through the grouped op, M rows per expert."""
    batch, tokens, in_features = x.shape
    offs = torch.arange(1, batch + 1, device=x.device, dtype=torch.int32) * tokens
    return _grouped_mm(x.reshape(-1, in_features), weight, offs).view(batch, tokens, -1)


def _swapped(weight: MixedPrecisionTensor) -> MixedPrecisionTensor:
    """The same weight with the last two dimensions swapped; shares all data."""
    shape = (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    return _rebuild(weight, shape=shape, transposed=not weight.transposed)


def _rebuild(weight: MixedPrecisionTensor, **changes: Any) -> MixedPrecisionTensor:
    """Copy of the wrapper with some inner tensors or attributes replaced."""
    names = MixedPrecisionTensor.tensor_data_names + MixedPrecisionTensor.tensor_attribute_names
    return MixedPrecisionTensor(**{name: changes.get(name, getattr(weight, name)) for name in names})


@implements([aten.t.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    return return_and_correct_aliasing(func, args, kwargs or {}, _swapped(args[0]))


@implements([aten.transpose.int])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    weight, *dims = args
    wanted = sorted(dim % weight.dim() for dim in dims)
    if wanted[0] == wanted[1]:
        return return_and_correct_aliasing(func, args, kwargs or {}, _rebuild(weight))
    if wanted != [weight.dim() - 2, weight.dim() - 1]:
        raise NotImplementedError(
            f"only the last two dimensions of a MixedPrecisionTensor can be swapped, got {dims}"
        )
    return return_and_correct_aliasing(func, args, kwargs or {}, _swapped(weight))


@implements([aten.permute.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    weight, dims = args
    order = [dim % weight.dim() for dim in dims]
    plain = list(range(weight.dim()))
    if order == [*plain[:-2], plain[-1], plain[-2]]:
        return return_and_correct_aliasing(func, args, kwargs or {}, _swapped(weight))
    if order == plain:
        return return_and_correct_aliasing(func, args, kwargs or {}, _rebuild(weight))
    raise NotImplementedError(
        f"only the last two dimensions of a MixedPrecisionTensor can be swapped, got the order {dims}"
    )


@implements([aten.view.default, aten._unsafe_view.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    weight, size = args
    if _resolved(size, weight.numel()) != tuple(weight.shape):
        raise NotImplementedError(
            f"a MixedPrecisionTensor of shape {tuple(weight.shape)} cannot be viewed as {tuple(size)}; "
            "dequantize() it first"
        )
    return return_and_correct_aliasing(func, args, kwargs or {}, _rebuild(weight))


def _resolved(size: Sequence[int], numel: int) -> tuple[int, ...]:
    """Sizes with a -1 filled in."""
    known = 1
    for length in size:
        known *= length if length != -1 else 1
    return tuple(numel // known if length == -1 else length for length in size)


@implements([aten._to_copy.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    weight = args[0]
    options = weight._get_to_kwargs(*args[1:], **(kwargs or {}))
    if options["dtype"] not in WEIGHT_DTYPES:
        raise TypeError(
            f"a MixedPrecisionTensor cannot become {options['dtype']}: layers compute in the dtype of their input, "
            f"one of {WEIGHT_DTYPES}; call dequantize() for a dense weight of another dtype"
        )
    move = {"device": options["device"], "non_blocking": options["non_blocking"] or False}
    inner = {name: getattr(weight, name).to(**move) for name in MixedPrecisionTensor.tensor_data_names}
    moved = _rebuild(weight, **inner, dtype=options["dtype"])
    return return_and_correct_aliasing(func, args, kwargs or {}, moved)


@implements([aten.slice.Tensor])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    weight, dim, start, end, step = _slice_arguments(*args)
    dim %= weight.dim()
    length = weight.shape[dim]
    start, end, step = slice(start, end, step).indices(length)
    if step != 1:
        raise NotImplementedError(f"slices of a MixedPrecisionTensor need step 1, got {step}")
    end = max(start, end)
    if (start, end) == (0, length):
        return return_and_correct_aliasing(func, args, kwargs or {}, _rebuild(weight))
    return return_and_correct_aliasing(func, args, kwargs or {}, _narrow(weight, dim, start, end))


def _slice_arguments(weight: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Args:
    """Arguments of aten.slice with its defaults."""
    return weight, dim, start, end, step


@implements([aten.split.Tensor, aten.split_with_sizes.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> list[Tensor]:
    weight, sizes, dim = (*args, 0)[:3]
    dim = (kwargs or {}).get("dim", dim) % weight.dim()
    length = weight.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)] or [0]
    pieces: list[Tensor] = []
    at = 0
    for size in sizes:
        pieces.append(_narrow(weight, dim, at, at + size))
        at += size
    return pieces


@implements([aten.select.int])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    weight, dim, index = args
    if dim % weight.dim() or weight.dim() != 3:
        raise NotImplementedError(
            f"select is defined for the experts of a 3-D MixedPrecisionTensor (dim 0), got dim={dim} of shape "
            f"{tuple(weight.shape)}; slice with [{index}:{index + 1}] or dequantize()"
        )
    index %= weight.shape[0]
    expert = _narrow(weight, 0, index, index + 1)
    expert = _rebuild(expert, scale=expert.scale[0], row_bits=expert.row_bits[0], shape=expert.shape[1:])
    return return_and_correct_aliasing(func, args, kwargs or {}, expert)


@implements([aten.index.Tensor])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    """Gather whole experts by their numbers: weight[ids] with ids 1-D, or one expert with ids 0-D."""
    weight, indices = args
    if weight.dim() != 3 or len(indices) != 1 or indices[0] is None or indices[0].dim() > 1:
        raise NotImplementedError(
            f"only the experts (dim 0) of a 3-D MixedPrecisionTensor can be indexed with one 1-D tensor, "
            f"but the shape is {tuple(weight.shape)}"
        )
    if indices[0].dim() == 0:
        return aten.select.int(weight, 0, int(indices[0]))
    pieces = [_narrow(weight, 0, int(i), int(i) + 1) for i in indices[0] % weight.shape[0]]
    return _concatenate(pieces) if pieces else _narrow(weight, 0, 0, 0)


@implements([aten.cat.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs | None) -> Tensor:
    """Concatenate rows (2-D) or experts (3-D): codes are joined as they are."""
    tensors, dim = (*args, 0)[:2]
    dim = (kwargs or {}).get("dim", dim)
    first = tensors[0]
    alike = all(
        isinstance(t, MixedPrecisionTensor)
        and t.shape[1:] == first.shape[1:]
        and (t.group_size, t.packing, t.per_token, t.transposed, t.dtype)
        == (first.group_size, first.packing, first.per_token, first.transposed, first.dtype)
        for t in tensors
    )
    if not alike or dim % first.dim() or (first.dim() == 2 and first.transposed):
        raise NotImplementedError(
            f"cat joins rows (dim 0) of MixedPrecisionTensors with equal inputs and settings, got dim={dim} and "
            f"{[str(t) for t in tensors]}"
        )
    return _concatenate(tensors)


def _concatenate(tensors: Sequence[MixedPrecisionTensor]) -> MixedPrecisionTensor:
    """Join along the first dimension."""
    inner = {
        name: torch.cat([getattr(t, name) for t in tensors])
        for name in MixedPrecisionTensor.tensor_data_names
    }
    length = sum(t.shape[0] for t in tensors)
    return _rebuild(tensors[0], **inner, shape=(length, *tensors[0].shape[1:]))


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
    return _rebuild(weight, **inner, shape=tuple(shape))


def _narrow_rows(weight: MixedPrecisionTensor, start: int, end: int) -> dict[str, Tensor]:
    """Consecutive rows, or consecutive experts: views of the stored bytes."""
    rows_each = weight.out_features if weight.dim() == 3 else 1
    bits = weight.row_bits.flatten()
    ends = torch.tensor([start * rows_each, end * rows_each], device=bits.device)
    codes_from, codes_to = row_offsets(bits, weight.in_features)[ends].tolist()
    zeros_from, zeros_to = zero_point_offsets(bits, weight.scale.shape[-1])[ends].tolist()
    return {
        "qdata": weight.qdata[codes_from:codes_to],
        "scale": weight.scale[start:end],
        "zero_point": weight.zero_point[zeros_from:zeros_to],
        "row_bits": weight.row_bits[start:end],
    }


def _narrow_expert_rows(weight: MixedPrecisionTensor, start: int, end: int) -> dict[str, Tensor]:
    """The same rows of every expert: their bytes are gathered."""
    return _repack(
        weight.codes()[:, start:end],
        weight.scale[:, start:end],
        weight.zero_points()[:, start:end],
        weight.row_bits[:, start:end],
    )


def _narrow_inputs(weight: MixedPrecisionTensor, start: int, end: int) -> dict[str, Tensor]:
    """Inputs start..end of every row; both ends must be group borders, because a scale cannot be cut."""
    size, in_features = weight.group_size, weight.in_features
    if start % size or (end % size and end != in_features):
        raise ValueError(
            f"inputs {start}..{end} of a MixedPrecisionTensor with {in_features} inputs cut through a group; "
            f"start and end must be multiples of group_size={size} (or the end of the row)"
        )
    groups = slice(start // size, -(-end // size))
    return _repack(
        weight.codes()[..., start:end],
        weight.scale[..., groups],
        weight.zero_points()[..., groups],
        weight.row_bits,
    )


def _repack(codes: Tensor, scale: Tensor, zero_point: Tensor, row_bits: Tensor) -> dict[str, Tensor]:
    """Inner tensors from unpacked parts."""
    bits = row_bits.flatten().contiguous()
    return {
        "qdata": pack_rows(codes.reshape(bits.numel(), -1), bits),
        "scale": scale.contiguous(),
        "zero_point": pack_zero_points(zero_point.reshape(bits.numel(), -1), bits),
        "row_bits": row_bits.contiguous(),
    }
