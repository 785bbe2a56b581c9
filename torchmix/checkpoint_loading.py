"""Loading a checkpoint into a module that the caller built (L9); transformers models load themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torchmix.checkpoint_files import open_shard, read_json, shard_digests
from torchmix.checkpoint_format import PARTS, CheckpointConfig, tensor_from_parts
from torchmix.tensor.mixed_precision_tensor import WEIGHT_DTYPES
from torchmix.tensor.module_repr import show_quantized_weights


def load_into(
    model: nn.Module,
    path: Path,
    config: CheckpointConfig,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load all tensors into a skeleton; every tensor of both sides must find its partner.

    Args:
        model: changed in place and returned; may be on the meta device.
        path: the checkpoint.
        config: its checked description.
        device: where the weights go.
        dtype: of unquantized floats, and of quantized weights as the model sees them; by default as saved.

    Raises:
        ValueError: the checkpoint holds other tensors than the model, or a damaged one; the module has state that
            is not in checkpoints and has no values. Nothing was loaded then.
    """
    expected = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    loaded = _read_tensors(path, config, expected, device, dtype)
    _check_fit(path, expected, loaded)
    _check_unsaved(path, model)
    by_id = {id(expected[name]): name for name in loaded}
    for name, tensor in expected.items():  # one Parameter object for tied names
        first = by_id[id(tensor)]
        if isinstance(tensor, nn.Parameter) and not isinstance(loaded[first], nn.Parameter):
            loaded[first] = nn.Parameter(loaded[first], requires_grad=tensor.requires_grad)
        loaded[name] = loaded[first]
    model.load_state_dict(loaded, strict=False, assign=True)
    for name in config.layers:
        model.get_parameter(name).requires_grad_(False)  # load_state_dict took this over from the skeleton
        show_quantized_weights(model.get_submodule(name.rpartition(".")[0]))
    return model.to(device)


def _read_tensors(
    path: Path,
    config: CheckpointConfig,
    expected: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """All tensors of the files by parameter name, the quantized ones assembled."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in config.layers}
    part_of = {name + suffix: (name, part) for name in config.layers for part, suffix in PARTS.items()}
    loaded: dict[str, Tensor] = {}
    for shard in shard_digests(path):
        with open_shard(path / shard) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key)
                if key in part_of:
                    name, part = part_of[key]
                    parts[name][part] = tensor.to(device)
                else:
                    loaded[key] = tensor.to(
                        device=device, dtype=dtype if tensor.is_floating_point() else None
                    )
    saved = _saved_dtype(path)
    for name in config.layers:
        as_seen = dtype or saved or (expected[name].dtype if name in expected else torch.float32)
        weight = tensor_from_parts(name, parts[name], config, as_seen)
        loaded[name] = nn.Parameter(weight, requires_grad=False)
    return loaded


def _saved_dtype(path: Path) -> torch.dtype | None:
    """The dtype in which the saved model saw its weights, from config.json; None where it is not recorded."""
    name = read_json(path / "config.json").get("dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if dtype in WEIGHT_DTYPES else None


def _check_fit(path: Path, expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raise unless the checkpoint holds exactly the model's tensors (tied ones at least once)."""
    loaded_ids = {id(expected[name]) for name in loaded if name in expected}
    missing = [
        name for name, tensor in expected.items() if name not in loaded and id(tensor) not in loaded_ids
    ]
    unexpected = [name for name in loaded if name not in expected]
    if missing or unexpected:
        raise ValueError(
            f"{path}: does not fit the model: missing {missing[:3]} ({len(missing)} in all), unknown {unexpected[:3]} "
            f"({len(unexpected)} in all); pass the module that was saved"
        )
    for name, tensor in loaded.items():
        if tuple(tensor.shape) != tuple(expected[name].shape):
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensor.shape)} in the checkpoint and "
                f"{tuple(expected[name].shape)} in the model; pass the module that was saved"
            )


def _check_unsaved(path: Path, model: nn.Module) -> None:
    """Raise when a buffer that no checkpoint holds has no values either."""
    stored = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and name not in stored:
            raise ValueError(
                f"{path}: the buffer {name} is not saved with the model and has no values on the meta device; build "
                "the skeleton on a real device"
            )
