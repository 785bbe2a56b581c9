"""The checkpoint format as one of transformers' quantization methods (L7); importing it needs transformers."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torchmix.checkpoint_format import (
    PARTS,
    QUANT_METHOD,
    CheckpointConfig,
    quantized_tensors,
    stored_tensors,
    tensor_from_parts,
)
from torchmix.repacking import repack_loaded
from torchmix.tensor import MixedPrecisionTensor, PackedTensor
from torchmix.tensor.mixed_precision_tensor import WEIGHT_DTYPES
from torchmix.tensor.module_repr import show_quantized_weights


class TorchmixQuantizationConfig(QuantizationConfigMixin):
    """``quantization_config`` of config.json; see :class:`torchmix.checkpoint_format.CheckpointConfig`."""

    def __init__(self, **values: Any) -> None:
        values.setdefault("quant_method", QUANT_METHOD)
        self.quant_method = QUANT_METHOD
        self.checkpoint = CheckpointConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values for config.json."""
        return self.checkpoint.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: nothing of it may be left out."""
        return self.checkpoint.to_dict()


class Assemble(ConversionOps):
    """Builds one parameter from its stored tensors."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # its presence keeps transformers from casting the stored tensors

    def __deepcopy__(self, memo: Any) -> Any:
        return self  # transformers copies it for every tensor of the file

    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> dict[str, Any]:
        """Stored tensors by the pattern that matched them -> the parameter by its name."""
        sources = zip(PARTS, kwargs["source_patterns"], strict=True)
        parts = {part: input_dict[source][0] for part, source in sources if source in input_dict}
        checkpoint: CheckpointConfig = self.hf_quantizer.quantization_config.checkpoint
        dtype = kwargs["model"].get_parameter(full_layer_name).dtype
        weight = tensor_from_parts(full_layer_name, parts, checkpoint, dtype)
        return {full_layer_name: nn.Parameter(weight, requires_grad=False)}


class TorchmixHfQuantizer(HfQuantizer):
    """Loads torchmix checkpoints; quantizing while loading is not offered, because it needs a calibration."""

    requires_calibration = True

    def is_serializable(self) -> bool:
        """``model.save_pretrained`` writes the same format (without hashes and model card)."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Quantized weights are frozen, and transformers' Trainer shall say so."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``generate`` may compile the model."""
        return True

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """Refuse a dtype that quantized weights cannot have, before anything is loaded."""
        if dtype is not None and dtype not in WEIGHT_DTYPES:
            raise TypeError(
                f"dtype={dtype} is not one that quantized weights can have, choose one of {WEIGHT_DTYPES}"
            )
        return dtype

    def update_device_map(self, device_map: Any) -> Any:
        """Refuse what cannot work, before anything is loaded."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map puts weights on disk, which torchmix does not support; use devices and 'cpu' only"
            )
        return device_map

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight, for ``device_map="auto"``: a quantized weight takes what is stored of it."""
        checkpoint: CheckpointConfig = self.quantization_config.checkpoint
        return checkpoint.bits_per_weight / 8 if param_name in checkpoint.layers else param.element_size()

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> list[Any]:
        """Checkpoints hold the model's own names, so the renamings for original checkpoints are left out."""
        return self.get_weight_conversions()

    def get_weight_conversions(self) -> list[Any]:
        """One converter per parameter name, which matches the stored names of the quantized layers only."""
        owners: dict[str, list[str]] = {}
        for name in self.quantization_config.checkpoint.layers:
            owner, dot, leaf = name.rpartition(".")
            owners.setdefault(leaf, []).append(re.escape(owner + dot))
        return [
            WeightConverter(
                [f"^({'|'.join(found)}){re.escape(leaf + suffix)}$" for suffix in PARTS.values()],
                rf"\1{leaf}",
                [Assemble(self)],
            )
            for leaf, found in owners.items()
        ]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, layer in self.quantization_config.checkpoint.layers.items():
            if name not in parameters or tuple(parameters[name].shape) != layer.shape:
                found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ValueError(
                    f"{name}: the checkpoint has shape {layer.shape}, {type(model).__name__} has {found}; load the "
                    "class that config.json names under architectures, with the transformers version it was "
                    "saved with"
                )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name in self.quantization_config.checkpoint.layers:
            if not isinstance(model.get_parameter(name), MixedPrecisionTensor):
                raise ValueError(
                    f"{name}: the files do not hold this quantized weight, it would run with random values; get the "
                    "checkpoint again"
                )
            show_quantized_weights(model.get_submodule(name.rpartition(".")[0]))
        model._weight_conversions = []  # saving keeps the names, too
        repack_loaded(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The stored tensors for ``model.save_pretrained``, and no further metadata.

        Raises:
            ValueError: the model's quantized weights are not those that its configuration describes.
        """
        state: dict[str, Tensor] = {}
        quantized = set()
        for name, tensor in stored_tensors(model):
            if isinstance(tensor, PackedTensor):
                quantized.add(name)
                parts = quantized_tensors(name, tensor)
                plain = isinstance(
                    tensor, MixedPrecisionTensor
                )  # others are unpacked: not all of them on a GPU
                state |= parts if plain else {part: value.cpu() for part, value in parts.items()}
            else:
                state[name] = tensor.detach()
        changed = quantized.symmetric_difference(self.quantization_config.checkpoint.layers)
        if changed:
            raise ValueError(
                f"{sorted(changed)[:3]} ({len(changed)} in all): quantized or replaced since the model was loaded, "
                "so its configuration is outdated; use torchmix.save_pretrained(model, directory)"
            )
        return state, {}
