"""Salience (L3): what quantizing a row costs the model; larger means it costs more."""

from __future__ import annotations

from torchmix.salience.layerwise import lim_score, lim_scores, zd_score
from torchmix.salience.metrics import (
    DATA_FREE,
    DATA_FREE_METRICS,
    METRICS,
    Metric,
    RowSignals,
    WeightSignals,
    random_score,
    weight_error,
)
from torchmix.salience.token_weights import gradient_weights, rsq_weights

__all__ = [
    "DATA_FREE",
    "DATA_FREE_METRICS",
    "METRICS",
    "Metric",
    "RowSignals",
    "WeightSignals",
    "gradient_weights",
    "lim_score",
    "lim_scores",
    "random_score",
    "rsq_weights",
    "weight_error",
    "zd_score",
]
