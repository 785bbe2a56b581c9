"""What is in a checkpoint (L8): its description and row widths, checked, without reading the codes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmix.accounting import MAX_BITS, MIN_BITS, stored_bits
from torchmix.checkpoint_files import open_shard, read_json, shard_digests, verify_shards
from torchmix.checkpoint_format import PARTS, SAFETENSORS_DTYPES, CheckpointConfig, quantized_specs


@dataclass(frozen=True)
class LayerInfo:
    """A quantized layer of a checkpoint: name, shape, and the number of rows at each width."""

    name: str
    shape: tuple[int, ...]
    rows_per_bits: dict[int, int]
    bits_per_weight: float


@dataclass(frozen=True)
class CheckpointInfo:
    """What is in a checkpoint.

    Attributes:
        directory: where it is.
        config: its ``quantization_config``.
        layers: quantized layers in file order.
        shards: file name -> (bytes, sha256 as recorded when it was written).
    """

    directory: Path
    config: CheckpointConfig
    layers: tuple[LayerInfo, ...]
    shards: dict[str, tuple[int, str]]

    @property
    def checkpoint_bytes(self) -> int:
        """Size of all safetensors files, headers included."""
        return sum(size for size, _ in self.shards.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, all metadata counted: what is in the files, not what config.json says."""
        sizes = [torch.Size(layer.shape).numel() for layer in self.layers]
        stored = (layer.bits_per_weight * size for layer, size in zip(self.layers, sizes, strict=True))
        return sum(stored) / sum(sizes)

    @property
    def coverage(self) -> float:
        """Share of the linear weights that are quantized, listed exclusions aside."""
        return self.config.coverage

    def to_dict(self) -> dict[str, Any]:
        """JSON values with the keys of the command line's contract."""
        return {
            "bits_per_weight": self.bits_per_weight,
            "checkpoint_bytes": self.checkpoint_bytes,
            "coverage": self.coverage,
            "format_version": self.config.format_version,
            "producer": self.config.producer,
            "group_size": self.config.group_size,
            "row_multiple": self.config.row_multiple,
            "tensor_parallel": self.config.tensor_parallel,
            "activation_group": "token" if self.config.per_token else "group",
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "rows_per_bits": {str(bits): rows for bits, rows in layer.rows_per_bits.items()},
                    "bits_per_weight": layer.bits_per_weight,
                }
                for layer in self.layers
            ],
            "excluded": [{"name": name, "reason": reason} for name, reason in self.config.excluded],
            "shards": [
                {"name": name, "bytes": size, "sha256": digest}
                for name, (size, digest) in self.shards.items()
            ],
        }


def read_config(directory: Path) -> CheckpointConfig:
    """The checked ``quantization_config`` of a checkpoint.

    Raises:
        FileNotFoundError: no directory, or no config.json in it.
        ValueError: the configuration is damaged, of another method or of an unknown version.
    """
    path = directory / "config.json"
    if not path.is_file():
        what = "has no config.json" if directory.is_dir() else "is not a directory"
        raise FileNotFoundError(f"{directory} {what}; give the directory of a saved model")
    quantization = read_json(path).get("quantization_config")
    if not isinstance(quantization, dict):
        raise ValueError(
            f"{path}: has no quantization_config, so this model is not quantized; load it as usual"
        )
    return CheckpointConfig.from_dict(quantization, str(path))


def inspect_checkpoint(directory: str | os.PathLike[str], *, verify: bool = False) -> CheckpointInfo:
    """Read what is in a checkpoint and check it, without its codes.

    Args:
        directory: the checkpoint.
        verify: compare the sha256 of every file.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_pretrained`.
    """
    path = Path(directory)
    config = read_config(path)
    digests = shard_digests(path)
    if verify:
        verify_shards(path)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    row_bits: dict[str, Tensor] = {}
    names = {name + suffix for name in config.layers for suffix in PARTS.values()}
    for shard in digests:
        with open_shard(path / shard) as file:
            for key in names.intersection(file.keys()):
                if key.endswith(PARTS["row_bits"]) and key.removesuffix(PARTS["row_bits"]) in config.layers:
                    row_bits[key] = file.get_tensor(key)
                part = file.get_slice(key)
                found[key] = (part.get_dtype(), tuple(part.get_shape()))
    layers = tuple(_layer_info(path, name, config, found, row_bits) for name in config.layers)
    shards = {name: ((path / name).stat().st_size, digest) for name, digest in digests.items()}
    return CheckpointInfo(path, config, layers, shards)


def _layer_info(
    path: Path,
    name: str,
    config: CheckpointConfig,
    found: Mapping[str, tuple[str, tuple[int, ...]]],
    row_bits: Mapping[str, Tensor],
) -> LayerInfo:
    """Check the parts of one layer against its description, and count its rows."""
    layer = config.layers[name]
    in_features, rows = layer.rows
    widths = row_bits.get(name + PARTS["row_bits"], torch.empty(0))
    if widths.dtype != torch.uint8 or tuple(widths.shape) != rows:
        widths = torch.full(
            rows, MAX_BITS, dtype=torch.uint8
        )  # the message below is about them, not their values
    if bool(((widths < MIN_BITS) | (widths > MAX_BITS)).any()):
        raise ValueError(
            f"{path}: {name + PARTS['row_bits']} holds widths {torch.unique(widths).tolist()} where {MIN_BITS} to "
            f"{MAX_BITS} are possible; the files are damaged, get the checkpoint again"
        )
    specs = quantized_specs(name, widths, in_features, config.group_size)
    for spec in reversed(specs):  # row widths first: the other shapes follow from them
        if spec.name not in found:
            raise ValueError(f"{path}: {spec.name} is missing in the files; get the checkpoint again")
        if found[spec.name] != (SAFETENSORS_DTYPES[spec.dtype], spec.shape):
            dtype, shape = found[spec.name]
            raise ValueError(
                f"{path}: {spec.name} is {dtype} of shape {shape}, but its layer of shape {layer.shape} needs "
                f"{SAFETENSORS_DTYPES[spec.dtype]} of shape {spec.shape}; it is damaged, get the checkpoint again"
            )
    counts = torch.bincount(widths.flatten().long()).tolist()
    bits = stored_bits(widths, in_features, config.group_size) / torch.Size(layer.shape).numel()
    return LayerInfo(name, layer.shape, {b: count for b, count in enumerate(counts) if count}, bits)
