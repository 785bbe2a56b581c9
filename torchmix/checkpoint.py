"""Saving, loading and inspecting checkpoints (L9); :mod:`torchmix.checkpoint_format` defines the format.

A checkpoint appears under its name only when it is complete: everything is written into a hidden directory
beside it, which is then renamed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.accounting import stored_bits
from torchmix.allocation import BitPlan
from torchmix.checkpoint_files import (
    completed_directory,
    copy_other_files,
    parse_size,
    read_json,
    write_index,
    write_json,
    write_shards,
)
from torchmix.checkpoint_format import (
    PARTS,
    CheckpointConfig,
    LayerFormat,
    TensorSpec,
    file_bytes,
    model_specs,
    producer_name,
    quantized_tensors,
    split_shards,
    stored_tensors,
)
from torchmix.checkpoint_inspection import CheckpointInfo, inspect_checkpoint
from torchmix.checkpoint_loading import load_into
from torchmix.huggingface import is_available, is_transformers_config, load_model, model_directory
from torchmix.model_card import model_card
from torchmix.repacking import repack_loaded
from torchmix.selection import linear_weights
from torchmix.tensor import PackedTensor
from torchmix.tensor.mixed_precision_tensor import WEIGHT_DTYPES

PLAN_NAME = "torchmix_plan.json"
NOT_SHOWN = "quantize_ without a plan quantizes nn.Linear only"


def planned_checkpoint_bytes(model: nn.Module, plan: BitPlan, max_shard_size: int | str = "5GB") -> int:
    """Exact size of all safetensors files that a plan leads to, in bytes, without quantizing anything.

    Args:
        model: the original model, with or without values (meta device).
        plan: row widths of its layers.
        max_shard_size: bytes, or a text such as "5GB".

    Raises:
        ValueError: the plan is of another model, or the model has state that cannot be stored.
    """
    shards = split_shards(model_specs(model, plan), parse_size(max_shard_size))
    return sum(file_bytes(specs) for specs in shards.values())


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    plan: BitPlan | None = None,
    source: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    card: str | None = None,
) -> CheckpointInfo:
    """Write a quantized model as safetensors shards with index, hashes, configuration and model card.

    Args:
        model: any module that holds quantized weights. transformers models are written so that
            ``from_pretrained`` loads them once ``import torchmix`` was done.
        directory: appears when complete; must not exist, or be empty, unless ``overwrite``.
        plan: the plan behind it, for the list of excluded layers and their reasons.
        source: directory of the original model, whose other files (tokenizer, chat template, generation
            configuration, code) are copied; by default the directory that the model was loaded from, or the
            hub's files on this machine.
        max_shard_size: bytes per file, or a text such as "5GB"; tensors of one module are never separated.
        overwrite: replace what is there, after the new checkpoint is complete.
        card: text of README.md; by default a model card made from the checkpoint's own numbers.

    Raises:
        ValueError: nothing is quantized, the target exists, or the model holds something that cannot be stored.
        FileNotFoundError: ``source`` is not a directory.
        OSError: no space or no permission; nothing is left under the final name.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    config = _describe(model, plan)
    specs = model_specs(model)
    _check_names(specs)
    _check_values(model)
    shards = split_shards(specs, parse_size(max_shard_size))
    target = Path(directory).absolute()
    num_bytes = sum(file_bytes(tensors) for tensors in shards.values())
    with completed_directory(target, overwrite, num_bytes) as temporary:
        copy_other_files(_source_directory(model, source), temporary)
        digests = write_shards(_StoredTensors(model), shards, temporary)
        write_index(shards, digests, temporary)
        _write_config(model, config, temporary)
        if plan is not None:
            plan.save(temporary / PLAN_NAME)
        info = inspect_checkpoint(temporary)
        through_transformers = is_transformers_config(read_json(temporary / "config.json"))
        text = card or model_card(info.to_dict(), target.name, transformers=through_transformers)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return CheckpointInfo(target, info.config, info.layers, info.shards)


def load_pretrained(
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = False,
) -> nn.Module:
    """Load a checkpoint that :func:`save_pretrained` wrote.

    Weights are as on disk; :func:`torchmix.repack` brings them into the order of GPU kernels.

    Args:
        directory: the checkpoint.
        model: skeleton to load into, for modules that are not transformers models; may be on the meta device.
            It is changed in place and returned.
        device: where the weights go.
        dtype: dtype of the unquantized weights and of the quantized weights as the model sees them; by default as
            saved.
        verify: compare the sha256 of every file first.

    Raises:
        FileNotFoundError: no checkpoint there, or a file of it is missing.
        TypeError: ``dtype`` is none that quantized weights can have.
        ValueError: not a torchmix checkpoint, an unknown version, a damaged file, or another model.
    """
    path = Path(directory)
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise TypeError(
            f"dtype={dtype} is not one that quantized weights can have, choose one of {WEIGHT_DTYPES}"
        )
    config = inspect_checkpoint(path, verify=verify).config
    if model is not None:
        model = load_into(model, path, config, torch.device(device), dtype)
        repack_loaded(model)
        return model
    if not is_transformers_config(read_json(path / "config.json")):
        raise ValueError(
            f"{path}: this checkpoint is not of a transformers model, so the module cannot be rebuilt from its "
            "config.json; pass load_pretrained(..., model=skeleton)"
        )
    return load_model(path, dtype=dtype, device=device)


def _describe(model: nn.Module, plan: BitPlan | None) -> CheckpointConfig:
    """The ``quantization_config`` of a model that holds quantized weights."""
    quantized = {name: t for name, t in stored_tensors(model) if isinstance(t, PackedTensor)}
    if not quantized:
        raise ValueError(
            f"{type(model).__name__} holds no quantized weight; call quantize_(model, mixllm_config(...)) first"
        )
    skipped = [name for name in plan.layers if name not in quantized] if plan is not None else []
    if skipped:
        raise ValueError(
            f"{skipped[0]}: planned but not quantized, as {len(skipped)} of {len(quantized) + len(skipped)} layers, so "
            "the checkpoint would not be what the plan says; quantize them (did a filter_fn leave them out?), or save "
            "without plan"
        )
    first_name, first = next(iter(quantized.items()))
    for name, weight in quantized.items():
        if (weight.group_size, weight.per_token) != (first.group_size, first.per_token):
            raise ValueError(
                f"{name}: group_size={weight.group_size}, per_token={weight.per_token} differ from {first_name} "
                f"({first.group_size}, {first.per_token}); a checkpoint has one of each, quantize all layers alike"
            )
    bits = sum(stored_bits(w.row_bits, w.in_features, w.group_size) for w in quantized.values())
    layers = {name: LayerFormat(tuple(w.shape), w.transposed) for name, w in quantized.items()}
    known = _known_config(model)
    missed = _missed_weights(model, layers)
    reasons = dict(known.excluded) if known is not None else {}
    if plan is not None:
        reasons |= {exclusion.name: exclusion.reason for exclusion in plan.excluded}
    for name in linear_weights(model):
        reasons.setdefault(name, NOT_SHOWN if name in missed else "left as it is")
    num_weights = sum(weight.numel() for weight in quantized.values())
    made_with = plan if plan is not None else known
    return CheckpointConfig(
        group_size=first.group_size,
        per_token=first.per_token,
        layers=layers,
        excluded=tuple((name, reason) for name, reason in reasons.items() if name not in layers),
        bits_per_weight=bits / num_weights,
        coverage=made_with.coverage if made_with else num_weights / (num_weights + sum(missed.values())),
        row_multiple=made_with.row_multiple if made_with else 1,
        tensor_parallel=made_with.tensor_parallel if made_with else 1,
        producer=producer_name(),
    )


def _missed_weights(model: nn.Module, layers: Container[str]) -> dict[str, int]:
    """Unquantized experts and ``Conv1D`` weights: name -> size. Other linear weights were left out on purpose."""
    missed = {}
    for name in linear_weights(model):
        module, _, leaf = name.rpartition(".")
        if name not in layers and not isinstance(model.get_submodule(module), nn.Linear):
            missed[name] = getattr(model.get_submodule(module), leaf).numel()
    return missed


def _known_config(model: nn.Module) -> CheckpointConfig | None:
    """The description that a model loaded through transformers carries, or None."""
    quantization: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    data = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    if isinstance(data, dict) and data.get("quant_method") == "torchmix":
        return CheckpointConfig.from_dict(data)
    return None


def _check_names(specs: list[TensorSpec]) -> None:
    """Refuse a model in which another tensor has the name of a part, such as ``weight_scale``."""
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise ValueError(
                f"{spec.name}: the model has a tensor of its own with the name that the format uses for a part of a "
                "quantized weight; exclude that layer"
            )
        seen.add(spec.name)


def _check_values(model: nn.Module) -> None:
    """Refuse tensors without values, as on the meta device or offloaded to disk."""
    for name, tensor in stored_tensors(model):
        if tensor.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device and has no values to store; load the weights first"
            )


class _StoredTensors(Mapping[str, Tensor]):
    """All stored tensors by name, quantized ones as their parts.

    Tiled weights are unpacked when a part is asked for, and one at a time: on a GPU there may be no room for all.
    """

    def __init__(self, model: nn.Module) -> None:
        self._owners: dict[str, tuple[str, Tensor]] = {}
        self._latest: tuple[str, dict[str, Tensor]] = ("", {})
        for name, tensor in stored_tensors(model):
            packed = isinstance(tensor, PackedTensor)
            names = [name + suffix for suffix in PARTS.values()] if packed else [name]
            self._owners |= dict.fromkeys(names, (name, tensor))

    def __getitem__(self, name: str) -> Tensor:
        owner, tensor = self._owners[name]
        if not isinstance(tensor, PackedTensor):
            return tensor
        if self._latest[0] != owner:
            self._latest = (owner, quantized_tensors(owner, tensor))
        return self._latest[1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def _source_directory(model: nn.Module, source: str | os.PathLike[str] | None) -> Path | None:
    """Where the files beside the weights are copied from."""
    if source is not None:
        if not Path(source).is_dir():
            raise FileNotFoundError(
                f"{source} is not a directory; source must be the original model's directory"
            )
        return Path(source)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return model_directory(name, local_files_only=True) if name and is_available() else None


def _write_config(model: nn.Module, config: CheckpointConfig, directory: Path) -> None:
    """config.json: the model's own configuration, if it has one, and the quantization."""
    own: Any = getattr(model, "config", None)
    first = next(tensor for _, tensor in stored_tensors(model) if isinstance(tensor, PackedTensor))
    data: dict[str, Any] = {"dtype": str(first.dtype).removeprefix("torch.")}
    if hasattr(own, "to_json_string"):
        data = {**json.loads(own.to_json_string()), **data, "architectures": [type(model).__name__]}
        if data.get("tie_word_embeddings") and not _is_tied(model):
            data["tie_word_embeddings"] = False  # the head was quantized, the embedding was not
    write_json(directory / "config.json", {**data, "quantization_config": config.to_dict()})
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_file"):
        generation.to_json_file(directory / "generation_config.json")


def _is_tied(model: Any) -> bool:
    """Whether a transformers model's output head, if it has one, still is its embedding."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is None or head.weight is model.get_input_embeddings().weight
