"""The plan of one weight (L3): the width of each row, and why a weight has no plan.

In JSON the row widths are one string of digits, ``"44484..."``, row 0 first (a list of strings for experts).

Shapes: N out_features, K in_features, E experts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchmix.accounting import MAX_BITS, MIN_BITS
from torchmix.allocation.json_values import Types, typed, typed_values
from torchmix.allocation.rules import format_row

_LAYER_KEYS: dict[str, Types] = {
    "shape": (list,),
    "transposed": (bool,),
    "fingerprint": (str,),
    "row_bits": (str, list),
}
_EXCLUSION_KEYS: dict[str, Types] = {
    "name": (str,),
    "reason": (str,),
    "weights": (int,),
    "counts_against_coverage": (bool,),
    "fingerprint": (str,),
}


@dataclass(frozen=True)
class Exclusion:
    """A linear weight that stays as it is.

    name: fully qualified name of the parameter.
    reason: why, in words for the user.
    weights: number of weights of the parameter.
    counts_against_coverage: False where a listed default or the user left it out, True where torchmix cannot
        quantize it; see :attr:`BitPlan.coverage`.
    fingerprint: identifies the weight; "" where it is not shown to ``quantize_`` (embeddings).
    """

    name: str
    reason: str
    weights: int
    counts_against_coverage: bool
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.weights < 0:
            raise ValueError(
                f"{self.name}: weights={self.weights} must not be negative; count the parameter's elements"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, where: str, data: object) -> Exclusion:
        """Inverse of :meth:`to_dict`; ``where`` is for messages.

        Raises:
            ValueError: a missing or unknown key, or a value of the wrong type.
        """
        return cls(**typed_values(where, data, _EXCLUSION_KEYS))


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """Row widths of one weight.

    name: fully qualified name of the parameter.
    shape: shape of the parameter: (N, K), or (E, N, K) for experts; (K, N) or (E, K, N) if ``transposed``.
    row_bits: uint8 (N,) or (E, N), width of each row, 2 to 8.
    transposed: the parameter stores its inputs first.
    fingerprint: identifies the weights that the plan was made for.

    Raises ``ValueError`` or ``TypeError`` with the layer's name where these do not fit together.
    """

    name: str
    shape: tuple[int, ...]
    row_bits: Tensor = field(repr=False)
    transposed: bool
    fingerprint: str

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise ValueError(
                f"{self.name}: shape {tuple(self.shape)} is not that of a weight; expected two sizes, or "
                "three for experts, each at least 1"
            )
        if self.row_bits.dtype != torch.uint8:
            raise TypeError(
                f"{self.name}: row_bits must be uint8, got {self.row_bits.dtype}; use .to(torch.uint8)"
            )
        expected = (*self.shape[:-2], self.out_features)
        if tuple(self.row_bits.shape) != expected:
            raise ValueError(
                f"{self.name}: row_bits of shape {tuple(self.row_bits.shape)} do not fit the weight of shape "
                f"{tuple(self.shape)} (transposed={self.transposed}); expected {expected}"
            )
        wrong = ((self.row_bits < MIN_BITS) | (self.row_bits > MAX_BITS)).nonzero()
        if len(wrong):
            row = tuple(wrong[0].tolist())
            raise ValueError(
                f"{self.name}: row {format_row(row)} has {int(self.row_bits[row])} bits; widths go from "
                f"{MIN_BITS} to {MAX_BITS}"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerPlan):
            return NotImplemented
        mine = (self.name, tuple(self.shape), self.transposed, self.fingerprint)
        theirs = (other.name, tuple(other.shape), other.transposed, other.fingerprint)
        return mine == theirs and torch.equal(self.row_bits.cpu(), other.row_bits.cpu())

    @property
    def out_features(self) -> int:
        """N, rows of the weight (of one expert)."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def in_features(self) -> int:
        """K, inputs of a row."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def num_experts(self) -> int | None:
        """E, or None for a plain weight."""
        return self.shape[0] if len(self.shape) == 3 else None

    @property
    def num_weights(self) -> int:
        """Number of weights of the parameter."""
        return math.prod(self.shape)

    def rows_per_bits(self) -> dict[int, int]:
        """Number of rows (over all experts) of each width that occurs, widths rising."""
        widths, counts = torch.unique(self.row_bits, return_counts=True)
        return dict(zip(widths.tolist(), counts.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """The fields but the name as JSON values."""
        rows = self.row_bits.cpu()
        digits = [_to_digits(expert) for expert in rows] if self.num_experts else _to_digits(rows)
        return {
            "shape": list(self.shape),
            "transposed": self.transposed,
            "fingerprint": self.fingerprint,
            "row_bits": digits,
        }

    @classmethod
    def from_dict(cls, name: str, data: object) -> LayerPlan:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a missing or unknown key, a value of the wrong type or outside its range.
        """
        values = typed_values(name, data, _LAYER_KEYS)
        for i, size in enumerate(values["shape"]):
            typed(name, f"shape[{i}]", size, (int,))
        values["shape"] = tuple(values["shape"])
        digits = values["row_bits"]
        if isinstance(digits, str):
            return cls(name, **{**values, "row_bits": _from_digits(name, digits)})
        experts = [
            _from_digits(name, typed(name, f"row_bits[{e}]", text, (str,)), (e,))
            for e, text in enumerate(digits)
        ]
        lengths = sorted({len(expert) for expert in experts})
        if len(lengths) != 1:
            raise ValueError(
                f"{name}: row_bits of experts have lengths {lengths}; every expert needs one digit per row"
            )
        return cls(name, **{**values, "row_bits": torch.stack(experts)})


def _to_digits(row_bits: Tensor) -> str:
    """uint8 (N,) -> one digit per row."""
    return (row_bits + ord("0")).numpy().tobytes().decode("ascii")


def _from_digits(name: str, digits: str, expert: tuple[int, ...] = ()) -> Tensor:
    """Inverse of :func:`_to_digits`; the digits may be any from 0 to 9."""
    for n, digit in enumerate(digits):
        if digit not in "0123456789":
            raise ValueError(
                f"{name}: row_bits has {digit!r} at row {format_row((*expert, n))}; expected one digit per "
                f"row, from {MIN_BITS} to {MAX_BITS}"
            )
    return torch.tensor([int(digit) for digit in digits], dtype=torch.uint8)
