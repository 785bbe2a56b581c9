"""Rounding algorithms (L3): pure functions from a weight, row widths and a Hessian to codes."""

from __future__ import annotations

from torchmix.rounding.clip_search import ClipSearch, clip_round
from torchmix.rounding.gptq import PERCDAMP, gptq_round
from torchmix.rounding.hqq import HalfQuadratic, hqq_round
from torchmix.rounding.refine import DEFAULT_REFINE, refine_rounding
from torchmix.rounding.refit import DEFAULT_REFIT, refit_target
from torchmix.rounding.round_weight import ROUNDING_METHODS, round_weight
from torchmix.rounding.rounded_weight import RoundedWeight
from torchmix.rounding.rtn import rtn_round

__all__ = [
    "DEFAULT_REFINE",
    "DEFAULT_REFIT",
    "PERCDAMP",
    "ROUNDING_METHODS",
    "ClipSearch",
    "HalfQuadratic",
    "RoundedWeight",
    "clip_round",
    "gptq_round",
    "hqq_round",
    "refine_rounding",
    "refit_target",
    "round_weight",
    "rtn_round",
]
