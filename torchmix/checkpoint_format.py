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
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.accounting import check_group_size
from torchmix.allocation import BitPlan
from torchmix.packing import packed_sizes
from torchmix.tensor import MixedPrecisionTensor, PackedTensor
from torchmix.tensor.mixed_precision_tensor import WEIGHT_DTYPES

FORMAT_VERSION = 1
QUANT_METHOD = "torchmix"
SCALE_FORMAT = "group"
PARTS = {"qdata": "", "scale": "_scale", "zero_point": "_zero_point", "row_bits": "_row_bits"}
METADATA = {"format": "pt"}

# safetensors orders tensors by dtype, the last of this list first, then by name
SAFETENSORS_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_DTYPE_ORDER = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_DTYPES)}


@dataclass(frozen=True)
class LayerFormat:
    """One quantized parameter: the shape that the model sees, and whether its rows are the last dimension."""

    shape: tuple[int, ...]
    transposed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"shape": list(self.shape), **({"transposed": True} if self.transposed else {})}

    @classmethod
    def from_dict(cls, where: str, data: Mapping[str, Any]) -> LayerFormat:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a value that describes no weight; names it.
        """
        shape, transposed = data["shape"], data.get("transposed", False)
        sizes = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
        if not sizes or len(shape) not in (2, 3) or not isinstance(transposed, bool):
            raise ValueError(
                f"{where}: shape={shape!r}, transposed={transposed!r} describe no weight, which has two or three "
                "positive sizes and transposed=true or false; get the checkpoint again"
            )
        return cls(tuple(shape), transposed)

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
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
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
                    name: LayerFormat.from_dict(f"{where}: {name}", layer)
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


def quantized_tensors(name: str, weight: PackedTensor) -> dict[str, Tensor]:
    """The four stored tensors of a quantized parameter, by name; a tiled one is unpacked into new memory."""
    plain = weight.to_plain()
    return {name + suffix: getattr(plain, part) for part, suffix in PARTS.items()}


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
        TypeError: the model's dtype is none that quantized weights can have.
        ValueError: a part is missing, or has another dtype or shape than the others need.
    """
    missing = [part for part in PARTS if part not in parts]
    if missing or name not in config.layers:
        raise ValueError(
            f"{name}: the checkpoint lacks {missing or 'its description'}; it is incomplete, get it again"
        )
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{name}: dtype {dtype} is not one that quantized weights can have, {WEIGHT_DTYPES}")
    layer = config.layers[name]
    dims = {"qdata": 1, "scale": len(layer.shape), "zero_point": 1, "row_bits": len(layer.shape) - 1}
    for part, tensor in parts.items():
        wanted = torch.bfloat16 if part == "scale" else torch.uint8
        if tensor.dtype != wanted or tensor.dim() != dims[part]:
            raise ValueError(
                f"{name}{PARTS[part]}: {tensor.dtype} with {tensor.dim()} dimensions instead of {wanted} with "
                f"{dims[part]}; the file is damaged, get the checkpoint again"
            )
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

    A weight that the plan quantizes is no longer tied to an embedding.

    Args:
        model: quantized, or still to be quantized by ``plan``; may be on the meta device.
        plan: row widths of the parameters that are not quantized yet.

    Raises:
        ValueError: the plan has a layer that the model has not, or state that cannot be stored.
    """
    planned = plan.layers if plan is not None else {}
    tensors = dict(stored_tensors(model, planned))
    for name, layer in planned.items():
        if name not in tensors or tuple(tensors[name].shape) != tuple(layer.shape):
            raise ValueError(
                f"{name} of shape {tuple(layer.shape)} is in the plan but not in {type(model).__name__}; the plan was "
                "made for another model"
            )
    specs: list[TensorSpec] = []
    for name, tensor in tensors.items():
        if isinstance(tensor, PackedTensor):
            specs += quantized_specs(name, tensor.row_bits, tensor.in_features, tensor.group_size)
        elif plan is not None and name in planned:
            specs += quantized_specs(name, planned[name].row_bits, planned[name].in_features, plan.group_size)
        else:
            specs.append(TensorSpec(name, tensor.dtype, tuple(tensor.shape)))
    return specs


def stored_tensors(model: nn.Module, untied: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the state dict; a tensor that is tied to an earlier one is left out.

    Args:
        model: any module.
        untied: names that are not left out.

    Raises:
        ValueError: a module keeps state that is not a tensor.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name}: a {type(tensor).__name__} cannot be stored, only tensors can; let the module's "
                "get_extra_state return a tensor"
            )
        if id(tensor) not in seen or name in untied:
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

    Raises:
        ValueError: a dtype that the format does not have.
    """
    specs = list(specs)
    for spec in specs:
        if spec.dtype not in _DTYPE_ORDER:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPE_ORDER)
            raise ValueError(
                f"{spec.name}: safetensors files cannot hold {spec.dtype}, only {known}; convert it first"
            )
    header: dict[str, Any] = {"__metadata__": METADATA}
    offset = 0
    for spec in sorted(specs, key=lambda spec: (-_DTYPE_ORDER[spec.dtype], spec.name)):
        end = offset + spec.num_bytes
        header[spec.name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
