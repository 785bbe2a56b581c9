"""The file format (L6): names, sizes and description of the tensors in a checkpoint, version 1.

A quantized parameter ``P`` of shape (N, K), or (E, N, K) for experts, is stored as four plain tensors:

===============  ======================  ==================================================================
``P``            uint8, 1-D              packed codes, rows in original order (:mod:`torchmix.packing`)
``P_scale``      bfloat16, (..., N, G)   G = ceil(K / group_size)
``P_zero_point`` uint8, 1-D              packed zero points of the rows below 8 bits
``P_row_bits``   uint8, (..., N)         width of each row
===============  ======================  ==================================================================

All other tensors are stored as they are. ``config.json`` describes them under ``quantization_config``. The codes
stand under the parameter's own name in one dimension, so that a program which does not know the format stops
with a shape error instead of loading something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.accounting import check_group_size
from torchmix.allocation import BitPlan
from torchmix.packing import packed_sizes
from torchmix.tensor import MixedPrecisionTensor

FORMAT_VERSION = 1
QUANT_METHOD = "torchmix"
SCALE_FORMAT = "group"
PARTS = {"qdata": "", "scale": "_scale", "zero_point": "_zero_point", "row_bits": "_row_bits"}
METADATA = {"format": "pt"}

# safetensors orders tensors by dtype, the last of this list first, then by name
_SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_DTYPE_ORDER = {dtype: rank for rank, dtype in enumerate(_SAFETENSORS_DTYPES)}


@dataclass(frozen=True)
class LayerFormat:
    """One quantized parameter: the shape that the model sees, and whether its rows are the last dimension."""

    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def rows(self) -> tuple[int, tuple[int, ...]]:
        """in_features K, and the shape (N,) or (E, N) of what is stored per row."""
        *experts, rows, columns = self.shape
        return (rows, (*experts, columns)) if self.transposed else (columns, (*experts, rows))


@dataclass(frozen=True)
class CheckpointConfig:
    """The ``quantization_config`` of a checkpoint.

    Attributes:
        group_size: inputs per scale.
        per_token: activations get one scale per token instead of one per token and group.
        layers: parameter name -> its format.
        excluded: (name, reason) of the linear weights that are stored as they are.
        bits_per_weight: stored bits per quantized weight, all metadata counted.
        coverage: share of the linear weights that are quantized, listed exclusions aside.
        row_multiple, tensor_parallel: what the row counts keep to.
        producer: the program that wrote the checkpoint.
        format_version: of this description.
    """

    group_size: int
    per_token: bool
    layers: dict[str, LayerFormat] = field(repr=False)
    excluded: tuple[tuple[str, str], ...] = ()
    bits_per_weight: float = 0.0
    coverage: float = 1.0
    row_multiple: int = 1
    tensor_parallel: int = 1
    producer: str = ""
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`from_dict` reads them back."""
        layers = {}
        for name, layer in self.layers.items():
            layers[name] = {"shape": list(layer.shape), **({"transposed": True} if layer.transposed else {})}
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "producer": self.producer,
            "group_size": self.group_size,
            "scale_format": SCALE_FORMAT,
            "activation": {
                "bits": 8,
                "symmetric": True,
                "group": "token" if self.per_token else self.group_size,
            },
            "bits_per_weight": self.bits_per_weight,
            "coverage": self.coverage,
            "row_multiple": self.row_multiple,
            "tensor_parallel": self.tensor_parallel,
            "layers": layers,
            "excluded": [{"name": name, "reason": reason} for name, reason in self.excluded],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "quantization_config") -> CheckpointConfig:
        """Check and read a ``quantization_config``.

        Raises:
            ValueError: another method, an unknown version or value, or a missing entry; names it and the way out.
        """
        try:
            _check_known(data, where)
            group = data["activation"]["group"]
            return cls(
                group_size=data["group_size"],
                per_token=group == "token",
                layers={
                    name: LayerFormat(tuple(map(int, layer["shape"])), bool(layer.get("transposed", False)))
                    for name, layer in data["layers"].items()
                },
                excluded=tuple((entry["name"], entry["reason"]) for entry in data["excluded"]),
                bits_per_weight=float(data["bits_per_weight"]),
                coverage=float(data["coverage"]),
                row_multiple=int(data["row_multiple"]),
                tensor_parallel=int(data["tensor_parallel"]),
                producer=str(data["producer"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where}: the description of the quantized tensors is damaged ({type(error).__name__}: {error}); "
                "download or write the checkpoint again"
            ) from error


def _check_known(data: Mapping[str, Any], where: str) -> None:
    """Refuse what this version of torchmix does not know, by name."""
    producer = data.get("producer", "an unknown program")
    activation = data.get("activation") or {}
    allowed: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("quant_method", data.get("quant_method"), (QUANT_METHOD,)),
        ("format_version", data.get("format_version"), (FORMAT_VERSION,)),
        ("scale_format", data.get("scale_format"), (SCALE_FORMAT,)),
        ("activation.bits", activation.get("bits"), (8,)),
        ("activation.symmetric", activation.get("symmetric"), (True,)),
        ("activation.group", activation.get("group"), ("token", data.get("group_size"))),
    ]
    for key, value, known in allowed:
        if value not in known or isinstance(value, bool) != isinstance(known[0], bool):
            raise ValueError(
                f"{where}: {key}={value!r} is not known to this torchmix, which reads {known}; the checkpoint was "
                f"written by {producer}: use that or a newer torchmix"
            )
    check_group_size(data["group_size"])


def producer_name() -> str:
    """This program and its version, for ``producer``."""
    try:
        return f"torchmix {version('torchmix')}"
    except PackageNotFoundError:
        return "torchmix (not installed)"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def quantized_specs(name: str, row_bits: Tensor, in_features: int, group_size: int) -> list[TensorSpec]:
    """The four stored tensors of a parameter with these row widths, uint8 (N,) or (E, N)."""
    qdata, zero_point = packed_sizes(row_bits, in_features, group_size)
    rows = tuple(row_bits.shape)
    return [
        TensorSpec(name, torch.uint8, (qdata,)),
        TensorSpec(name + PARTS["scale"], torch.bfloat16, (*rows, -(-in_features // group_size))),
        TensorSpec(name + PARTS["zero_point"], torch.uint8, (zero_point,)),
        TensorSpec(name + PARTS["row_bits"], torch.uint8, rows),
    ]


def quantized_tensors(name: str, weight: MixedPrecisionTensor) -> dict[str, Tensor]:
    """The four stored tensors of a quantized parameter, by name."""
    return {name + suffix: getattr(weight, part) for part, suffix in PARTS.items()}


def tensor_from_parts(
    name: str, parts: Mapping[str, Tensor], config: CheckpointConfig, dtype: torch.dtype
) -> MixedPrecisionTensor:
    """Inverse of :func:`quantized_tensors`.

    Args:
        name: parameter name, for messages.
        parts: ``qdata``, ``scale``, ``zero_point`` and ``row_bits``.
        config: of the checkpoint.
        dtype: dtype that the model sees.

    Raises:
        ValueError: a part is missing, or has another dtype or shape than the others need.
    """
    missing = [part for part in PARTS if part not in parts]
    if missing or name not in config.layers:
        raise ValueError(
            f"{name}: the checkpoint lacks {missing or 'its description'}; it is incomplete, get it again"
        )
    for part, tensor in parts.items():
        wanted = torch.bfloat16 if part == "scale" else torch.uint8
        if tensor.dtype != wanted:
            raise ValueError(
                f"{name}{PARTS[part]}: dtype {tensor.dtype} instead of {wanted}; the file is damaged"
            )
    layer = config.layers[name]
    weight = MixedPrecisionTensor(
        parts["qdata"],
        parts["scale"],
        parts["zero_point"],
        parts["row_bits"],
        layer.shape,
        config.group_size,
        dtype,
        per_token=config.per_token,
        transposed=layer.transposed,
    )
    weight.check(name)
    return weight


def model_specs(model: nn.Module, plan: BitPlan | None = None) -> list[TensorSpec]:
    """What a checkpoint of this model stores, in the order of its state dict; tied tensors once.

    Args:
        model: quantized, or still to be quantized by ``plan``; may be on the meta device.
        plan: row widths of the parameters that are not quantized yet.
    """
    specs: list[TensorSpec] = []
    for name, tensor in stored_tensors(model):
        if isinstance(tensor, MixedPrecisionTensor):
            specs += quantized_specs(name, tensor.row_bits, tensor.in_features, tensor.group_size)
        elif plan is not None and name in plan.layers:
            layer = plan.layers[name]
            specs += quantized_specs(name, layer.row_bits, layer.in_features, plan.group_size)
        else:
            specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
    return specs


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the state dict; a tensor that is tied to an earlier one is left out."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def split_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    """Distribute tensors over files, in order; all tensors of one module stay in one file.

    Returns:
        file name -> tensors, named as transformers names them.
    """
    modules: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        modules.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for tensors in modules.values():
        num_bytes = sum(spec.num_bytes for spec in tensors)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += num_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def file_bytes(specs: Iterable[TensorSpec]) -> int:
    """Exact size of the safetensors file that holds these tensors.

    The header is compact JSON, ordered by dtype and name, padded with spaces to a multiple of 8, behind 8 bytes that
    give its length (safetensors format, version 0.x of the library).
    """
    header: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for spec in sorted(specs, key=lambda spec: (-_DTYPE_ORDER[spec.dtype], spec.name)):
        end = offset + spec.num_bytes
        header[spec.name] = {
            "dtype": _SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset


def parse_size(size: int | str) -> int:
    """Bytes from a number or a text such as "5GB" (decimal units) or "512MiB" (binary units).

    Raises:
        ValueError: not a positive size.
    """
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    digits = text.rstrip("KMGIB")
    try:
        value = int(float(digits) * units[text[len(digits) :].strip() or "B"])
    except (KeyError, ValueError):
        value = 0
    if value < 1:
        raise ValueError(f"{size!r} is not a size; write for example 5GB or 512MiB")
    return value
