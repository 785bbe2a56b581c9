"""Choice of the rounding algorithm by name (L3)."""

from __future__ import annotations

from torch import Tensor

from torchmix.rounding.clip_search import ClipSearch, clip_round
from torchmix.rounding.gptq import PERCDAMP, gptq_round
from torchmix.rounding.hqq import hqq_round
from torchmix.rounding.refine import refine_rounding
from torchmix.rounding.rounded_weight import RoundedWeight
from torchmix.rounding.rtn import rtn_round

ROUNDING_METHODS = ("rtn", "clip", "gptq", "hqq")


def round_weight(
    weight: Tensor,
    row_bits: Tensor,
    group_size: int,
    method: str,
    hessian: Tensor | None = None,
    *,
    percdamp: float = PERCDAMP,
    search: ClipSearch | None = None,
    refine: int = 0,
) -> RoundedWeight:
    """Round one weight with the named algorithm.

    Args:
        weight: float (N, K).
        row_bits: uint8 (N,).
        group_size: inputs per scale.
        method: "rtn", "clip" (round to nearest with clip search), "gptq" or "hqq" (half-quadratic splitting).
        hessian: float32 (K, K); needed by "gptq", used by "clip" when given.
        percdamp: damping of GPTQ.
        search: factors of the clip search.
        refine: rounds of refinement after "gptq" (:func:`torchmix.rounding.refine_rounding`).

    Raises:
        ValueError: for an unknown method, or "gptq" without a Hessian.
    """
    if method == "rtn":
        return rtn_round(weight, row_bits, group_size)
    if method == "hqq":
        return hqq_round(weight, row_bits, group_size)
    if method == "clip":
        return clip_round(weight, row_bits, group_size, hessian, search)
    if method != "gptq":
        raise ValueError(f"rounding={method!r} is not known; choose one of {ROUNDING_METHODS}")
    if hessian is None:
        raise ValueError(
            "rounding='gptq' needs Hessians; calibrate with hessians=True, or choose rounding='clip' or 'rtn'"
        )
    rounded = gptq_round(weight, row_bits, group_size, hessian, percdamp=percdamp, search=search)
    if rounded.method != "gptq":  # no usable Hessian
        return rounded
    return refine_rounding(weight, rounded, row_bits, hessian, refine, percdamp)
