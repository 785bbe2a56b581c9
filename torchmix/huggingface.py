"""transformers (L7): loading models and tokenizers, and the checkpoint format as one of its quantization methods.

``register`` makes ``AutoModelForCausalLM.from_pretrained`` read torchmix checkpoints; ``import torchmix`` calls it
where transformers is installed. This is the only module that imports transformers.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.checkpoint_format import (
    PARTS,
    QUANT_METHOD,
    CheckpointConfig,
    quantized_tensors,
    stored_tensors,
    tensor_from_parts,
)
from torchmix.tensor import MixedPrecisionTensor

logger = logging.getLogger(__name__)
MIN_TRANSFORMERS = "5.23"
_HINT = "install it with: pip install 'torchmix[transformers]'"


def is_available() -> bool:
    """Whether transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def is_transformers_config(data: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a transformers model."""
    return "model_type" in data and bool(data.get("architectures"))


def load_model(
    name_or_directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a causal language model, original or quantized by torchmix, in evaluation mode.

    Args:
        name_or_directory: local directory, or id on the hub.
        dtype: of the weights; by default as stored.
        device: where they go.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no such directory, and no such id within reach.
        ValueError: a directory that holds no model, or a damaged checkpoint.
    """
    transformers = _transformers()
    register()
    path = Path(name_or_directory)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} is not the directory of a model: it has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(str(name_or_directory))
        names = config.architectures or []
        fallback = transformers.AutoModelForCausalLM
        factory = getattr(transformers, names[0], fallback) if names else fallback
        model = factory.from_pretrained(str(name_or_directory), dtype=dtype or "auto")
    except (OSError, RuntimeError) as error:
        kind = FileNotFoundError if not path.exists() else ValueError
        raise kind(f"{name_or_directory}: the model cannot be loaded: {error}") from error
    return model.eval().to(device)


def load_tokenizer(name_or_directory: str | os.PathLike[str]) -> Any:
    """Load a tokenizer.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no tokenizer there.
    """
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(name_or_directory))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name_or_directory}: no tokenizer can be loaded: {error}") from error


def model_directory(name_or_directory: str | os.PathLike[str]) -> Path | None:
    """Local directory of a model's files: the directory itself, or the hub's snapshot; None when there is none."""
    path = Path(name_or_directory)
    if path.is_dir():
        return path
    found = _transformers().utils.cached_file(
        str(name_or_directory), "config.json", _raise_exceptions_for_missing_entries=False
    )
    return Path(found).parent if found else None


def _transformers() -> Any:
    if not is_available():
        raise ImportError(f"transformers is needed to load language models; {_HINT}")
    import transformers

    return transformers


def register() -> bool:
    """Enter the format as quantization method "torchmix" of transformers; calling it again changes nothing.

    Returns:
        Whether it is entered. A transformers too old for it is no reason to fail on import: torchmix then works on
        modules, and a logged warning says that checkpoints cannot be loaded through transformers.
    """
    try:
        from transformers.quantizers import register_quantization_config, register_quantizer
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

        if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
            return True
        config_class, quantizer_class = _define_classes()
        _register_grouped_mm_fallback()
    except (ImportError, AttributeError) as error:
        installed = version("transformers")
        logger.warning(
            "transformers %s cannot load torchmix checkpoints (%s); it needs %s or newer",
            installed,
            error,
            MIN_TRANSFORMERS,
        )
        return False
    register_quantization_config(QUANT_METHOD)(config_class)
    register_quantizer(QUANT_METHOD)(quantizer_class)
    return True


def _register_grouped_mm_fallback() -> None:
    """Route transformers' own grouped product, which it uses for other dtypes under torch.compile, to our op."""
    operators = getattr(torch.ops, "transformers", None)
    fallback = getattr(getattr(operators, "grouped_mm_fallback", None), "default", None)
    if fallback is None:
        import transformers.integrations.moe

        logger.debug("grouped_mm_fallback comes from %s", transformers.integrations.moe.__name__)
        fallback = torch.ops.transformers.grouped_mm_fallback.default

    @MixedPrecisionTensor.implements([fallback])
    def _(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Tensor:
        x, weight, offs = (*args, *(kwargs or {}).values())
        return torch._grouped_mm(x, weight, offs=offs)


def _define_classes() -> tuple[type, type]:
    """The two classes that transformers asks for; made here because their bases come from transformers."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class TorchmixQuantizationConfig(QuantizationConfigMixin):
        """``quantization_config`` of config.json; see :class:`torchmix.checkpoint_format.CheckpointConfig`."""

        def __init__(self, **values: Any) -> None:
            values.setdefault("quant_method", QUANT_METHOD)
            self.quant_method = QUANT_METHOD
            self.checkpoint = CheckpointConfig.from_dict(values)

        def to_dict(self) -> dict[str, Any]:
            return self.checkpoint.to_dict()

        def to_diff_dict(self) -> dict[str, Any]:
            return self.checkpoint.to_dict()

    class KeepStored(ConversionOps):
        """Saving: the state dict holds the stored tensors already."""

        def convert(
            self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
        ) -> dict[str, Any]:
            (value,) = input_dict.values()
            return {full_layer_name: value[0] if isinstance(value, list) else value}

        @property
        def reverse_op(self) -> Any:
            return self

    class Assemble(ConversionOps):
        """Builds one parameter from its stored tensors."""

        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(
            self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
        ) -> dict[str, Any]:
            model = kwargs["model"]
            found = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
            checkpoint: CheckpointConfig = self.hf_quantizer.quantization_config.checkpoint
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype
            if full_layer_name not in checkpoint.layers:
                (value,) = found.values()
                return {full_layer_name: value.to(dtype) if value.is_floating_point() else value}
            leaf = full_layer_name.rpartition(".")[2]
            parts = {part: found[leaf + suffix] for part, suffix in PARTS.items() if leaf + suffix in found}
            weight = tensor_from_parts(full_layer_name, parts, checkpoint, dtype)
            return {full_layer_name: nn.Parameter(weight, requires_grad=False)}

        @property
        def reverse_op(self) -> Any:
            return KeepStored()

    class TorchmixHfQuantizer(HfQuantizer):
        """Loads torchmix checkpoints; quantizing while loading is not offered, because it needs a calibration."""

        requires_calibration = True

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

        @property
        def is_compileable(self) -> bool:
            return True

        @property
        def serialized_names(self) -> dict[str, list[str]]:
            leaves = {name.rpartition(".")[2] for name in self.quantization_config.checkpoint.layers}
            return {leaf: [leaf + suffix for suffix in PARTS.values()] for leaf in sorted(leaves)}

        def get_load_operations(self) -> dict[str, type]:
            return {"deserialize": Assemble}

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            parameters = dict(model.named_parameters())
            for name, layer in self.quantization_config.checkpoint.layers.items():
                if name not in parameters or tuple(parameters[name].shape) != layer.shape:
                    found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                    raise ValueError(
                        f"{name}: the checkpoint has shape {layer.shape}, the model {found}; config.json and weights "
                        "do not belong together, or this transformers version builds the model differently"
                    )

        def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
            state: dict[str, Tensor] = {}
            for name, tensor in stored_tensors(model):
                if isinstance(tensor, MixedPrecisionTensor):
                    state |= quantized_tensors(name, tensor)
                else:
                    state[name] = tensor.detach()
            return state, {}

    return TorchmixQuantizationConfig, TorchmixHfQuantizer
