"""Salience (L3): what quantizing a row costs the model; larger means it costs more."""

from __future__ import annotations

from torchmix.salience.metrics import DATA_FREE, METRICS, Metric, RowSignals, weight_error

__all__ = ["DATA_FREE", "METRICS", "Metric", "RowSignals", "weight_error"]
