"""Operations that copy or compare whole weights (L2): ``to``, ``copy_``, ``empty_like``, ``pin_memory``, ``equal``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchmix.tensor.mixed_precision_tensor import WEIGHT_DTYPES, MixedPrecisionTensor
from torchmix.tensor.packed_tensor import PackedTensor
from torchmix.tensor.tiled_tensor import TiledTensor, implements, implements_torch_function

aten = torch.ops.aten
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _inner(weight: PackedTensor) -> dict[str, Tensor]:
    """Inner tensors by name."""
    return {name: getattr(weight, name) for name in weight.tensor_data_names}


def _check_dtype(weight: PackedTensor, dtype: torch.dtype) -> None:
    """Raise for a dtype that the weight cannot be seen in."""
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"a {type(weight).__name__} cannot become {dtype}: layers compute in the dtype of their input, "
            f"one of {WEIGHT_DTYPES}; call dequantize() for a dense weight of another dtype"
        )


@implements([aten._to_copy.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight = args[0]
    options = weight._get_to_kwargs(*args[1:], **kwargs)
    _check_dtype(weight, options["dtype"])
    move = {"device": options["device"], "non_blocking": options["non_blocking"] or False, "copy": True}
    inner = {name: tensor.to(**move) for name, tensor in _inner(weight).items()}
    moved = weight.with_parts(**inner, dtype=options["dtype"])
    return return_and_correct_aliasing(func, args, kwargs, moved)


@implements([aten.to.dtype_layout])
def _(func: Any, types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """In inference mode ``.to`` arrives whole; its parts end in ``_to_copy``, or in the weight itself."""
    return func.decompose(*args, **kwargs)


@implements([aten.empty_like.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    weight = args[0]
    dtype, device = kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
    _check_dtype(weight, dtype)
    inner = {name: torch.empty_like(tensor, device=device) for name, tensor in _inner(weight).items()}
    return weight.with_parts(**inner, dtype=dtype)


@implements([aten.copy_.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """Copy the stored bytes into a weight of the same sizes, for example a slice of a larger one."""
    target, source = args[:2]
    if not isinstance(target, PackedTensor) or not isinstance(source, PackedTensor):
        raise TypeError(
            f"copy_ between {type(target).__name__} and {type(source).__name__} of shape {tuple(target.shape)}: "
            "a quantized weight can only be copied into an equally quantized one; "
            "use load_state_dict(..., assign=True), or dequantize() it first"
        )
    source = _in_order_of(target, source)
    differing = _differences(target, source)
    if differing:
        raise ValueError(
            f"copy_ needs weights of equal sizes and settings, but these differ in {', '.join(differing)}; "
            "rows of other widths take other bytes: use load_state_dict(..., assign=True)"
        )
    for name, tensor in _inner(target).items():
        tensor.copy_(getattr(source, name))
    return target


def _in_order_of(target: PackedTensor, source: PackedTensor) -> PackedTensor:
    """``source`` with its bytes in the order of ``target``'s, where it can have that."""
    if isinstance(source, TiledTensor) and isinstance(target, MixedPrecisionTensor):
        return source.to_plain()
    tileable = source.dim() == 2 and source.group_size == target.group_size
    if isinstance(source, MixedPrecisionTensor) and isinstance(target, TiledTensor) and tileable:
        return TiledTensor.from_plain(source)
    return source


def _differences(target: PackedTensor, source: PackedTensor) -> list[str]:
    """Class, attributes and sizes of inner tensors in which two weights differ, in words.

    The dtype is how the model sees the weight, not what is stored; a copy may differ in it.
    """
    if type(target) is not type(source):
        return [f"order of the bytes ({type(target).__name__} and {type(source).__name__})"]
    names = [name for name in target.tensor_attribute_names if name != "dtype"]
    attributes = [(name, getattr(target, name), getattr(source, name)) for name in names]
    sizes = [
        (f"size of {n}", tuple(t.shape), tuple(getattr(source, n).shape)) for n, t in _inner(target).items()
    ]
    return [f"{name} ({mine} and {other})" for name, mine, other in attributes + sizes if mine != other]


@implements([aten.equal.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> bool:
    """Whether two quantized weights store the same; a dense tensor is never equal to one."""
    first, second = args
    if not isinstance(first, PackedTensor) or not isinstance(second, PackedTensor):
        return False
    second = _in_order_of(first, second)
    if first.dtype != second.dtype or _differences(first, second):
        return False
    return all(torch.equal(tensor, getattr(second, name)) for name, tensor in _inner(first).items())


@implements([aten.is_pinned.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> bool:
    return all(tensor.is_pinned() for tensor in _inner(args[0]).values())


@implements([aten._pin_memory.default])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    return args[0].with_parts(**{name: tensor.pin_memory() for name, tensor in _inner(args[0]).items()})


@implements_torch_function([torch.Tensor.share_memory_])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> Tensor:
    """Move the stored bytes to shared memory; without this PyTorch reads a storage that a wrapper does not have."""
    for tensor in _inner(args[0]).values():
        tensor.share_memory_()
    return args[0]


@implements_torch_function([torch.Tensor.is_shared])
def _(func: Callable[..., Any], types: Args, args: Args, kwargs: Kwargs) -> bool:
    return all(tensor.is_shared() for tensor in _inner(args[0]).values())
