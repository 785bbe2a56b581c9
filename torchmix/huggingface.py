"""transformers (L7): loading models and tokenizers, and the checkpoint format as one of its quantization methods.

``register`` makes ``AutoModelForCausalLM.from_pretrained`` read torchmix checkpoints; ``import torchmix`` calls it
where transformers is installed. Only this module and :mod:`torchmix.huggingface_quantizer` import transformers.
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
from torch import nn

from torchmix.checkpoint_format import QUANT_METHOD
from torchmix.hub import why_unreachable
from torchmix.repacking import repack_loaded

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
        FileNotFoundError: no such directory, and no such id within reach. Where the hub does not answer a first short
            request, only what was downloaded before is looked through.
        ValueError: a directory that holds no model, or a damaged checkpoint.
    """
    transformers = _transformers()
    register()
    path = Path(name_or_directory)
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{path} is not the directory of a model: it has no config.json")
    unreachable = why_unreachable(name_or_directory)
    local = {"local_files_only": True} if unreachable else {}
    try:
        config = transformers.AutoConfig.from_pretrained(str(name_or_directory), **local)
        names = config.architectures or []
        fallback = transformers.AutoModelForCausalLM
        factory = getattr(transformers, names[0], fallback) if names else fallback
        model, info = factory.from_pretrained(
            str(name_or_directory), dtype=dtype or "auto", output_loading_info=True, **local
        )
    except (OSError, RuntimeError) as error:
        if unreachable:
            raise _not_found(name_or_directory, "the model cannot be loaded", unreachable) from error
        kind = FileNotFoundError if not path.exists() else ValueError
        raise kind(f"{name_or_directory}: the model cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name_or_directory}: {missing[:3]} ({len(missing)} in all) are not in the files, and "
            f"{type(model).__name__} would run with random values for them; get the checkpoint again"
        )
    model = model.eval().to(device)
    repack_loaded(model)
    return model


def load_tokenizer(name_or_directory: str | os.PathLike[str]) -> Any:
    """Load a tokenizer.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: the hub does not answer, and nothing was downloaded before.
        ValueError: no tokenizer there.
    """
    transformers = _transformers()
    unreachable = why_unreachable(name_or_directory)
    local = {"local_files_only": True} if unreachable else {}
    try:
        return transformers.AutoTokenizer.from_pretrained(str(name_or_directory), **local)
    except (OSError, ValueError, KeyError) as error:
        if unreachable:
            raise _not_found(name_or_directory, "no tokenizer can be loaded", unreachable) from error
        raise ValueError(f"{name_or_directory}: no tokenizer can be loaded: {error}") from error


def model_directory(
    name_or_directory: str | os.PathLike[str], *, local_files_only: bool = False
) -> Path | None:
    """Local directory of a model's files: the directory itself, or the hub's snapshot; None when there is none.

    Args:
        name_or_directory: local directory, or id on the hub.
        local_files_only: do not ask the hub.
    """
    path = Path(name_or_directory)
    if path.is_dir():
        return path
    transformers = _transformers()
    local_files_only = local_files_only or bool(why_unreachable(name_or_directory))
    found = transformers.utils.cached_file(
        str(name_or_directory),
        "config.json",
        local_files_only=local_files_only,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=not local_files_only,
    )
    return Path(found).parent if found else None


def _not_found(name: str | os.PathLike[str], what: str, unreachable: str) -> FileNotFoundError:
    """The error where only downloaded files could be looked through."""
    return FileNotFoundError(
        f"{name}: {what}: there is no such directory, it is not among the models downloaded to this machine, and the "
        f"hub does not answer ({unreachable}); check the spelling, give the directory of a model, or connect to the "
        "network"
    )


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
    installed = version("transformers")
    if _numbers(installed) < _numbers(MIN_TRANSFORMERS):
        message = (
            "transformers %s cannot load torchmix checkpoints, which need %s or newer; everything else works"
        )
        logger.warning(message, installed, MIN_TRANSFORMERS)
        return False
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from torchmix.huggingface_quantizer import TorchmixHfQuantizer, TorchmixQuantizationConfig

    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(TorchmixQuantizationConfig)
        register_quantizer(QUANT_METHOD)(TorchmixHfQuantizer)
    return True


def _numbers(text: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(int(part) for part in text.split(".")[:2])
