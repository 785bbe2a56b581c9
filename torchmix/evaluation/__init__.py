"""How good is a quantized model: perplexity, KL divergence from the original, SQNR (L2, torch only)."""

from __future__ import annotations

from torchmix.evaluation.divergence import kl_divergence, kl_from_log_probs, quantile
from torchmix.evaluation.output_error import sqnr_db
from torchmix.evaluation.perplexity import (
    Evaluation,
    evaluate,
    evaluate_many,
    evaluation_mode,
    model_logits,
    window_tokens,
)

__all__ = [
    "Evaluation",
    "evaluate",
    "evaluate_many",
    "evaluation_mode",
    "kl_divergence",
    "kl_from_log_probs",
    "model_logits",
    "quantile",
    "sqnr_db",
    "window_tokens",
]
