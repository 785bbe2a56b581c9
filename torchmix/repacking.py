"""Quantized weights of a whole model in the order of GPU kernels, and back (L4).

Files and state dicts hold the plain order. :func:`repack` brings weights into tiles after loading, one by one, so that
at most one weight is in memory twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from torchmix._extension import kernel_status
from torchmix.tensor import MixedPrecisionTensor, PackedTensor, TiledTensor
from torchmix.tiles import GROUP_SIZE

KERNEL_WIDTHS = (3, 4, 5, 6, 8)
MIN_CAPABILITY = (8, 0)  # of the GPU
MEASURED_CAPABILITY = (9, 0)  # elsewhere an emulator has run the kernels so far
_SAVE_PLAIN: WeakSet[nn.Module] = WeakSet()  # modules whose state dict is taken care of


@dataclass(frozen=True)
class RepackReport:
    """What :func:`repack` has done.

    repacked: names of the weights that are tiled now. left: (name, reason) of the quantized weights that stay plain.
    """

    repacked: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


def repack(model: nn.Module, *, force: bool = False) -> RepackReport:
    """Bring quantized weights into the order that compiled kernels read, in place.

    Outputs stay the same up to the rounding of float32 sums. ``state_dict``, checkpoints and pickles of the model
    hold the plain bytes as before. Call it once the model is on the GPU, and compile the model afterwards. Loading a
    model to a GPU of compute capability 9.0 does it too; ``TORCHMIX_REPACK=1`` in the environment does it on the
    others that kernels support, on which they have not run yet, and ``TORCHMIX_REPACK=0`` on none.

    Args:
        model: any module with quantized weights; the unquantized ones are left alone.
        force: repack whatever tiles can hold, also where no kernel reads them (for tests: every call then unpacks).

    Returns:
        Which weights were repacked, and why others were not.
    """
    repacked: list[str] = []
    left: list[tuple[str, str]] = []

    def tiled(name: str, weight: nn.Parameter) -> nn.Parameter:
        assert isinstance(weight, MixedPrecisionTensor), "only plain weights are given to this function"
        reason = _cannot_tile(weight) or (None if force else _no_kernel(weight))
        if reason is not None:
            left.append((name, reason))
            return weight
        repacked.append(name)
        return nn.Parameter(TiledTensor.from_plain(weight), requires_grad=False)

    _replace(model, MixedPrecisionTensor, tiled)
    return RepackReport(tuple(repacked), tuple(left))


def repack_loaded(model: nn.Module) -> None:
    """What loading does with a model: :func:`repack`, on GPUs where the kernels have been measured.

    ``TORCHMIX_REPACK=1`` asks for it everywhere, ``TORCHMIX_REPACK=0`` nowhere.
    """
    choice = os.environ.get("TORCHMIX_REPACK")
    if choice == "1" or (choice != "0" and _on_measured_gpus(model)):
        repack(model)


def _on_measured_gpus(model: nn.Module) -> bool:
    """Whether every quantized weight is on a GPU of compute capability 9.0."""
    devices = {parameter.device for parameter in model.parameters() if isinstance(parameter, PackedTensor)}
    return all(
        device.type == "cuda" and torch.cuda.get_device_capability(device) == MEASURED_CAPABILITY
        for device in devices
    )


def to_plain(model: nn.Module) -> tuple[str, ...]:
    """Inverse of :func:`repack`, in place and bit for bit: for export, or for a device without kernels.

    Returns:
        Names of the weights that were tiled.
    """
    changed: list[str] = []

    def plain(name: str, weight: nn.Parameter) -> nn.Parameter:
        assert isinstance(weight, TiledTensor), "only tiled weights are given to this function"
        changed.append(name)
        return nn.Parameter(weight.to_plain(), requires_grad=False)

    _replace(model, TiledTensor, plain)
    return tuple(changed)


def _cannot_tile(weight: MixedPrecisionTensor) -> str | None:
    """Why the layout does not hold this weight, or None."""
    if weight.dim() != 2:
        return f"tiles hold matrices, this weight has {weight.dim()} dimensions"
    if weight.group_size != GROUP_SIZE:
        return f"tiles have group_size={GROUP_SIZE}, this weight has {weight.group_size}"
    if weight.device.type == "meta":
        return "it has no values on the meta device"
    return None


def _no_kernel(weight: MixedPrecisionTensor) -> str | None:
    """Why no kernel would read this weight, or None."""
    if weight.device.type != "cuda":
        return f"it is on {weight.device}; kernels that read tiles run on cuda"
    reason = kernel_status().reason("cuda")
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < MIN_CAPABILITY:
        return f"kernels need compute capability {MIN_CAPABILITY}, {weight.device} has {capability}"
    other = sorted(set(torch.unique(weight.row_bits).tolist()) - set(KERNEL_WIDTHS))
    return f"it has rows of {other} bits; kernels read {KERNEL_WIDTHS}" if other else None


def _replace(
    model: nn.Module,
    kind: type[PackedTensor],
    change: Callable[[str, nn.Parameter], nn.Parameter],
) -> None:
    """Put ``change(name, parameter)`` in the place of every parameter of a class; tied ones stay tied."""
    for name, places in _places(model, kind).items():
        changed = change(name, places[0][0].get_parameter(places[0][1]))
        for module, leaf in places:
            setattr(module, leaf, changed)
            save_plain(module)


def _places(model: nn.Module, kind: type[PackedTensor]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Modules and attributes of every parameter of a class, by its first name; no reference to the parameter itself."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, kind):
                names.setdefault(id(parameter), f"{path}.{leaf}" if path else leaf)
                places.setdefault(id(parameter), []).append((module, leaf))
    return {names[key]: places[key] for key in names}


def save_plain(module: nn.Module) -> None:
    """Let ``state_dict`` of a module hold plain weights from now on."""
    if module not in _SAVE_PLAIN:
        module.register_state_dict_post_hook(plain_state_dict)
        _SAVE_PLAIN.add(module)


def plain_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    """State dict hook: tiled weights are unpacked, unless the parameters themselves are asked for (``keep_vars``)."""
    for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
        weight = state_dict.get(prefix + name)
        if isinstance(weight, TiledTensor) and not isinstance(weight, nn.Parameter):
            state_dict[prefix + name] = weight.to_plain()
