"""What is in a checkpoint (L8): its description and row widths, checked, without reading the codes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchmix.accounting import stored_bits
from torchmix.checkpoint_files import open_shard, read_json, shard_digests, verify_shards
from torchmix.checkpoint_format import PARTS, CheckpointConfig, quantized_specs


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
        """Stored bits per quantized weight, all metadata counted."""
        return self.config.bits_per_weight

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
    """Read what is in a checkpoint, without its codes.

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
    found: dict[str, dict[str, Any]] = {name: {} for name in config.layers}
    for shard in digests:
        with open_shard(path / shard) as file:
            _read_layers(file, config, found)
    layers = tuple(_layer_info(path, name, config, parts) for name, parts in found.items())
    shards = {name: ((path / name).stat().st_size, digest) for name, digest in digests.items()}
    return CheckpointInfo(path, config, layers, shards)


def _read_layers(file: Any, config: CheckpointConfig, found: dict[str, dict[str, Any]]) -> None:
    """Collect row widths, and the shapes of the other parts, from one open file."""
    stored = set(file.keys())
    for name in config.layers:
        for part, suffix in PARTS.items():
            if name + suffix in stored:
                key = name + suffix
                is_widths = part == "row_bits"
                found[name][part] = (
                    file.get_tensor(key) if is_widths else tuple(file.get_slice(key).get_shape())
                )


def _layer_info(path: Path, name: str, config: CheckpointConfig, parts: Mapping[str, Any]) -> LayerInfo:
    """Check the parts of one layer against its description, and count its rows."""
    layer = config.layers[name]
    missing = [name + suffix for part, suffix in PARTS.items() if part not in parts]
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing in the files; get the checkpoint again")
    in_features, rows = layer.rows
    row_bits = parts["row_bits"]
    if (
        tuple(row_bits.shape) == rows
        and row_bits.dtype == torch.uint8
        and bool(((row_bits > 1) & (row_bits < 9)).all())
    ):
        specs = quantized_specs(name, row_bits, in_features, config.group_size)
        wanted = {part: spec.shape for part, spec in zip(PARTS, specs, strict=True)}
        wrong = [part for part in ("qdata", "scale", "zero_point") if tuple(parts[part]) != wanted[part]]
    else:
        wrong, wanted = ["row_bits"], {"row_bits": rows}
    if wrong:
        shape = tuple(getattr(parts[wrong[0]], "shape", parts[wrong[0]]))
        raise ValueError(
            f"{path}: {name + PARTS[wrong[0]]} has shape {shape} where {wanted[wrong[0]]} with widths of 2 to 8 is "
            "needed; the files are damaged, get the checkpoint again"
        )
    counts = torch.bincount(row_bits.flatten().long()).tolist()
    bits = stored_bits(row_bits, in_features, config.group_size) / torch.Size(layer.shape).numel()
    return LayerInfo(name, layer.shape, {b: count for b, count in enumerate(counts) if count}, bits)
