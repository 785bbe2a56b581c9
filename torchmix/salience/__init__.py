"""Salience (L3): what quantizing a row costs the model; larger means it costs more."""

from __future__ import annotations

from torchmix.salience.layerwise import lim_score, lim_scores, zd_score
from torchmix.salience.metrics import DATA_FREE, METRICS, Metric, RowSignals, weight_error
from torchmix.salience.token_weights import gradient_weights, rsq_weights

__all__ = [
    "DATA_FREE",
    "METRICS",
    "Metric",
    "RowSignals",
    "gradient_weights",
    "lim_score",
    "lim_scores",
    "rsq_weights",
    "weight_error",
    "zd_score",
]
