"""SmoothQuant (L3): move outliers of activations into the weights that read them, before anything is rounded.

SmoothQuant, arXiv 2211.10438, section 4: y = (x diag(s)⁻¹) (diag(s) Wᵀ) for any s > 0. Where x is the output of a
normalization, 1/s is folded into its weight and bias, so the model computes the same and costs the same.

Shapes: S samples of L tokens, N out_features, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchmix.transforms.norm_readers import NormUse, WeightUse, find_readers


@dataclass(frozen=True)
class Smoothing:
    """What :func:`fold_smoothquant` did.

    Attributes:
        folded: name of a normalization -> names of the weights that took over its factors.
        factors: name of a normalization -> s, float32 (K,).
        kept: name of a normalization -> why it was left alone.
    """

    folded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)


def smoothing_factors(largest_x: Tensor, largest_w: Tensor, alpha: float) -> Tensor:
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (arXiv 2211.10438, Eq. 4).

    Args:
        largest_x: float (K,), largest magnitude of each input feature over the tokens.
        largest_w: float (K,), largest magnitude of each input column over all rows of all readers.
        alpha: 1 moves all difficulty into the weights, 0 all of the weights' into the activations.

    Returns:
        float32 (K,); 1 where either magnitude is zero or the quotient is no positive float32 number.
    """
    s_K = largest_x.double().pow(alpha) / largest_w.double().pow(1.0 - alpha)
    s_K = s_K.float()
    usable = (largest_x > 0) & (largest_w > 0) & torch.isfinite(s_K) & (s_K > 0)
    return torch.where(usable, s_K, 1.0)


def fold_smoothquant(model: nn.Module, samples: Tensor, alpha: float = 0.5) -> Smoothing:
    """Fold SmoothQuant's factors into every normalization that feeds nothing but linear layers; changes ``model``.

    Which layers read a normalization is found by running the model (:func:`find_readers`). A normalization is left
    alone, and the result says why, when something else reads its output (a router, a residual sum), when a weight
    behind it also serves elsewhere (a head tied to the embedding), or when its output is not proportional to its
    weight (Gemma's norms use 1 + weight).

    The rewrite is exact but for two roundings: one per weight of the linears and one per weight of the norm, each
    half a unit of the weights' dtype (relative 2⁻²⁴ in float32, 2⁻⁸ in bfloat16). Outputs of the model move by
    about that times the square root of the number of roundings they depend on.

    Args:
        model: a language model, called with int64 (1, L); pass a copy to keep the original.
        samples: int64 (S, L) calibration tokens.
        alpha: migration strength in [0, 1], 0.5 in most of the paper.

    Raises:
        ValueError: alpha or ``samples`` are not valid, or no normalization can be folded.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1; the paper uses 0.5 for most models")
    norms, weights = find_readers(model, samples)
    counts = _parameter_counts(model)
    result = Smoothing()
    for name, use in norms.items():
        reason = _reason_to_keep(name, use, weights, counts)
        if reason:
            result.kept[name] = reason
            continue
        readers = {reader: weights[reader] for reader in sorted(use.readers)}
        result.factors[name] = _fold(use, list(readers.values()), alpha)
        result.folded[name] = tuple(readers)
    if not result.folded:
        reasons = (
            "; ".join(f"{name}: {why}" for name, why in result.kept.items()) or "it has none with a weight"
        )
        raise ValueError(
            f"no normalization of {type(model).__name__} can take SmoothQuant's factors ({reasons}); quantize this "
            "model without it"
        )
    return result


def _reason_to_keep(name: str, use: NormUse, weights: dict[str, WeightUse], counts: dict[int, int]) -> str:
    """Why a normalization cannot be folded, or ""."""
    if use.largest is None and not use.others:
        return "it did not run"
    if use.others:
        return f"its output is read by {', '.join(sorted(use.others))}"
    if not use.readers:
        return "no linear layer reads its output"
    for reader in sorted(use.readers):
        elsewhere = (weights[reader].sources - {name}) | weights[reader].others
        if elsewhere:
            return f"{reader} is also used by or for {', '.join(sorted(elsewhere))}"
    if any(counts[id(parameter)] > 1 for parameter in use.module.parameters()):
        return "its parameters belong to another module too"
    if not _is_proportional(use):
        return "its output is not proportional to its weight and bias"
    return ""


def _parameter_counts(model: nn.Module) -> dict[int, int]:
    """Names of each parameter, by its id."""
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _is_proportional(use: NormUse) -> bool:
    """Whether weight / t and bias / t give output / t, tried with powers of two, which round nothing."""
    if use.example is None:
        return False
    x, output = use.example
    t_K = torch.ones_like(use.module.get_parameter("weight").detach())
    t_K[::2], t_K[1::2] = 2.0, 0.5
    parameters = {key: value.detach() / t_K for key, value in use.module.named_parameters()}
    with torch.no_grad():
        divided = functional_call(use.module, parameters, (x,))
    limits = torch.finfo(output.dtype)
    return torch.allclose(divided * t_K, output, rtol=2 * limits.eps, atol=4 * limits.tiny)


@torch.no_grad()
def _fold(use: NormUse, readers: list[WeightUse], alpha: float) -> Tensor:
    """Divide the norm by s and multiply the readers' columns; s as float32 (K,)."""
    assert use.largest is not None, "a normalization with readers has run"
    magnitudes = [reader.rows.abs().amax(0).to(use.largest) for reader in readers]
    s_K = smoothing_factors(use.largest, torch.stack(magnitudes).amax(0), alpha)
    for parameter in use.module.parameters():
        parameter.copy_(parameter.double() / s_K.double().to(parameter.device))
    for reader in readers:
        reader.rows.copy_(reader.rows.double() * s_K.double().to(reader.weight.device))
    return s_K.cpu()
