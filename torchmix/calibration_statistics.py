"""What was measured for one layer, and the header of a calibration file (L5).

Shapes: N rows, K in_features, E experts, W widths.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

FORMAT_VERSION = 1
KIND = "torchmix.Calibration"


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What was measured for one weight.

    Attributes:
        name: fully qualified name of the parameter.
        shape: its shape as the model stores it.
        transposed: stored as (K, N) or (E, K, N).
        fingerprint: :func:`torchmix.selection.weight_fingerprint` of the weight.
        scores: metric -> float64 (N, W) or (E, N, W), summed over the calibration tokens.
        hessian_keys: for each expert (or once) the key of its Hessian, "" where no token came by.
        tokens: for each expert (or once) the tokens it saw.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    fingerprint: str
    scores: dict[str, Tensor] = field(repr=False)
    hessian_keys: tuple[str, ...] = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """(N,) or (E, N)."""
        return (*self.shape[:-2], self.shape[-1] if self.transposed else self.shape[-2])

    def to_header(self) -> dict[str, Any]:
        """All but the scores, as JSON values."""
        return {
            "name": self.name,
            "shape": self.shape,
            "transposed": self.transposed,
            "fingerprint": self.fingerprint,
            "hessian_keys": self.hessian_keys,
            "tokens": self.tokens,
        }

    @classmethod
    def from_header(
        cls, entry: Mapping[str, Any], scores: dict[str, Tensor], num_widths: int
    ) -> LayerStatistics:
        """Inverse of :meth:`to_header`.

        Raises:
            KeyError, TypeError: a missing value, or scores whose shape does not fit the layer.
        """
        layer = cls(
            entry["name"],
            tuple(entry["shape"]),
            entry["transposed"],
            entry["fingerprint"],
            scores,
            tuple(entry["hessian_keys"]),
            tuple(entry["tokens"]),
        )
        expected = (*layer.rows_shape, num_widths)
        for metric, score in scores.items():
            if tuple(score.shape) != expected:
                raise TypeError(
                    f"{layer.name}: the {metric} scores have shape {tuple(score.shape)} instead of {expected}"
                )
        return layer


def check_header(path: str | os.PathLike[str], text: str | None) -> dict[str, Any]:
    """Parse the JSON header; refuse other kinds and versions."""
    try:
        header = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the header is not JSON ({error}); calibrate again") from error
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise ValueError(f"{path}: not a torchmix calibration; make one with calibrate(...).save(path)")
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: calibration format version {header.get('format_version')!r} is unknown, this torchmix reads "
            f"version {FORMAT_VERSION}; use a matching torchmix or calibrate again"
        )
    return header
