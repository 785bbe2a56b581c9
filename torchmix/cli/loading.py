"""Loading the model of a command, and giving it back the dtypes it had."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class LoadedModel:
    """A model ready to be calibrated.

    name: as the user gave it. model: in the dtype of the arithmetic. dtypes: of its tensors when written.
    directory: where its files are, None where it has none.
    original_bytes: size of its weights as stored, in one safetensors file.
    """

    name: str
    model: nn.Module
    dtypes: dict[str, torch.dtype]
    directory: Path | None
    original_bytes: int


def check_model_name(name: str) -> None:
    """Refuse what looks like a directory and is none, before a hub is asked for it.

    Raises:
        FileNotFoundError: there is no such directory.
    """
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith("/")
    if looks_local and not Path(name).exists():
        raise FileNotFoundError(
            f"{name}: no such directory; give the directory of a model, or its id on the hub"
        )


def load_model_for(options: argparse.Namespace) -> LoadedModel:
    """Load the model that is to be quantized, on the device and in the dtype asked for."""
    import torch

    from torchmix.checkpoint_format import file_bytes, model_specs
    from torchmix.huggingface import load_model, model_directory

    check_model_name(options.model)
    model = load_model(options.model)
    dtypes, original_bytes = tensor_dtypes(model), file_bytes(model_specs(model))
    if options.dtype is not None:
        arithmetic = getattr(torch, options.dtype)
        dtypes = dict.fromkeys(dtypes, arithmetic)
        model = model.to(arithmetic)
    elif torch.device(options.device).type == "cpu":
        model = model.to(torch.float32)
    return LoadedModel(
        options.model, model.to(options.device), dtypes, model_directory(options.model), original_bytes
    )


def tensor_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Dtype of every floating parameter and buffer by name."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.dtype for name, tensor in named.items() if tensor.is_floating_point()}


def restore_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Give parameters and buffers the dtypes they had; tied parameters stay tied."""
    from torch import nn

    done: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            dtype = dtypes.get(prefix + name, parameter.dtype)
            if id(parameter) not in done:
                changed = parameter.detach().to(dtype)
                same = parameter.dtype == dtype
                done[id(parameter)] = (
                    parameter if same else nn.Parameter(changed, requires_grad=parameter.requires_grad)
                )
            setattr(module, name, done[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(dtypes.get(prefix + name, buffer.dtype)))
