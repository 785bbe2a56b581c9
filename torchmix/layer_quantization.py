"""One layer from its weight to the quantized tensor (L5): rounding, packing, and a record of what happened.

Shapes: N rows, K in_features, E experts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchmix.evaluation import sqnr_db
from torchmix.rounding import RoundedWeight, round_weight
from torchmix.selection import Target
from torchmix.tensor import MixedPrecisionTensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer.

    Attributes:
        name: parameter name, or the module's description where no name is known.
        bits_per_weight: stored bits per weight, all metadata counted.
        sqnr_db: signal to quantization noise ratio of the weight in dB.
        method: rounding that was used ("sequential", "gptq", "clip", "rtn").
        notes: what went differently than asked for, e.g. a fallback; empty when nothing did.
        seconds: time the rounding took; for sequential rounding without the passes over the model.
    """

    name: str
    bits_per_weight: float
    sqnr_db: float
    method: str
    notes: tuple[str, ...]
    seconds: float


def quantize_target(
    target: Target,
    row_bits: Tensor,
    group_size: int,
    method: str,
    hessians: Sequence[Tensor | None],
    per_token: bool,
    rounded: RoundedWeight | None = None,
    refine: int = 0,
) -> tuple[MixedPrecisionTensor, LayerRecord]:
    """Round one weight, all its experts, and pack it. Notes of the rounding are logged as warnings.

    Args:
        target: the weight; stays as it is.
        row_bits: uint8 (N,) or (E, N).
        group_size: inputs per scale.
        method: name in :data:`torchmix.rounding.ROUNDING_METHODS`.
        hessians: float32 (K, K) of each expert (or once); None where there is none: GPTQ then becomes clip search.
        per_token: granularity of the activation scales.
        rounded: the weight rounded already, in which case ``method`` and ``hessians`` are not used.
        refine: rounds of refinement after GPTQ.
    """
    started = time.perf_counter()
    rows, row_bits = target.rows.detach(), row_bits.to(target.weight.device)
    experts = target.num_experts is not None
    if rounded is not None:
        parts = [rounded]
    else:
        weights, widths = (list(rows), list(row_bits)) if experts else ([rows], [row_bits])
        parts = [
            _round(weight, bits, group_size, method, hessian, refine)
            for weight, bits, hessian in zip(weights, widths, hessians, strict=True)
        ]
    inner = [
        torch.stack([getattr(part, name) for part in parts]) for name in ("codes", "scale", "zero_point")
    ]
    codes, scale, zero_point = inner if experts else (part[0] for part in inner)
    quantized = MixedPrecisionTensor.from_codes(
        codes,
        scale,
        zero_point,
        row_bits,
        group_size,
        target.weight.dtype,
        per_token=per_token,
        transposed=target.transposed,
    )
    notes = merge_notes([part.note for part in parts], experts)
    for note in notes:
        logger.warning("%s: %s", target.name, note)
    quality = sqnr_db(target.weight.detach().float(), quantized.dequantize(torch.float32))
    used = "/".join(sorted({part.method for part in parts}))
    seconds = time.perf_counter() - started
    return quantized, LayerRecord(target.name, quantized.bits_per_weight, quality, used, notes, seconds)


def _round(
    weight: Tensor, row_bits: Tensor, group_size: int, method: str, hessian: Tensor | None, refine: int
) -> RoundedWeight:
    """Round one weight (N, K); GPTQ without a Hessian, where no token came by, becomes clip search."""
    if method == "gptq" and hessian is None:
        rounded = round_weight(weight, row_bits, group_size, "clip")
        note = "no calibration token reached it: rounded with clip search instead of GPTQ"
        return replace(rounded, note=note)
    return round_weight(weight, row_bits, group_size, method, hessian, refine=refine)


def merge_notes(notes: Sequence[str], experts: bool) -> tuple[str, ...]:
    """Distinct notes of a layer's experts, each with the experts that it is about."""
    about: dict[str, list[int]] = {}
    for expert, note in enumerate(notes):
        if note:
            about.setdefault(note, []).append(expert)
    if not experts:
        return tuple(about)
    return tuple(f"{len(which)} of {len(notes)} experts {which}: {note}" for note, which in about.items())
