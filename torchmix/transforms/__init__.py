"""Exact rewrites of a model before it is quantized (L3): the outputs stay, what has to be rounded changes.

``norm_readers`` finds out which linears read a normalization, ``smoothquant`` moves outliers into them;
``model_map`` names the parts of a Llama-shaped model, ``rotation`` rotates its residual stream.
"""

from __future__ import annotations

from torchmix.transforms.model_map import Branch, ModelMap, map_model
from torchmix.transforms.rotation import hadamard_matrix, rotate_residual_stream
from torchmix.transforms.smoothquant import Smoothing, fold_smoothquant

__all__ = [
    "Branch",
    "ModelMap",
    "Smoothing",
    "fold_smoothquant",
    "hadamard_matrix",
    "map_model",
    "rotate_residual_stream",
]
