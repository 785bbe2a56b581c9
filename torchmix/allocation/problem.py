"""What an allocation is asked and what it answers (L3): plain, checked data.

Shapes: N rows of a layer, E experts, W widths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from torchmix.allocation.rules import (
    check_counts_options,
    check_equal_blocks,
    check_row_counts,
    check_widths,
    format_row,
)


@dataclass(frozen=True, eq=False)
class LayerChoices:
    """What each row of one layer costs and loses at each width.

    name: unique; ties between layers are broken by it.
    in_features: K, weights of a row (for bits per weight in messages).
    costs: W stored bits of one row, one per width, positive and never falling
        (:func:`torchmix.accounting.width_costs`).
    scores: floating (N, W) or (E, N, W), what the row loses at each width; at least 0. Rows of experts may
        also come flattened, (E * N, W): row counts then hold for the layer and not for each expert.
    min_bits, max_bits: no row gets fewer or more.
    row_bits: uint8 (N,) or (E, N), widths that are given; the layer is then not searched.

    Raises ``ValueError`` naming layer, row and value where something does not fit.
    """

    name: str
    in_features: int
    costs: tuple[int, ...]
    scores: Tensor = field(repr=False)
    min_bits: int | None = None
    max_bits: int | None = None
    row_bits: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(self.scores.shape)
        if len(shape) not in (2, 3) or shape[-1] != len(self.costs) or math.prod(shape) == 0:
            raise ValueError(
                f"{self.name}: scores of shape {shape} must be (rows, {len(self.costs)}) or "
                f"(experts, rows, {len(self.costs)}), one column per cost and no empty dimension"
            )
        whole = all(isinstance(cost, int) for cost in self.costs)
        if not whole or min(self.costs) < 1 or list(self.costs) != sorted(self.costs):
            raise ValueError(
                f"{self.name}: costs={self.costs} must be whole numbers of bits, positive, and not fall with "
                "the width; use width_costs"
            )
        check_scores(self.name, self.scores)
        if self.row_bits is not None and self.row_bits.shape != self.scores.shape[:-1]:
            raise ValueError(
                f"{self.name}: fixed row_bits of shape {tuple(self.row_bits.shape)} do not fit scores of "
                f"shape {shape}; give one width per row"
            )

    @property
    def num_rows(self) -> int:
        """All rows, experts included."""
        return math.prod(self.scores.shape[:-1])

    @cached_property
    def scores_ENW(self) -> np.ndarray:
        """Scores as float64 (E, N, W); E = 1 for a plain weight."""
        scores = self.scores.detach().to("cpu", torch.float64)
        return scores.reshape(-1, *scores.shape[-2:]).numpy()


@dataclass(frozen=True, eq=False)
class AllocationProblem:
    """Choose a width for every row: least sum of scores with at most ``budget_bits`` stored bits.

    layers: in any order.
    widths: W widths, rising; the columns of scores and costs.
    budget_bits: stored bits of all rows together (:func:`torchmix.accounting.budget_in_bits`), given layers
        included; None for no limit.
    row_multiple, tensor_parallel: row counts to keep, :func:`torchmix.allocation.rules.check_row_counts`.

    Raises ``ValueError`` naming layer, rule, value and way out where something does not fit.
    """

    layers: tuple[LayerChoices, ...]
    widths: tuple[int, ...]
    budget_bits: int | None
    row_multiple: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_widths(self.widths)
        check_counts_options(self.row_multiple, self.tensor_parallel)
        if not isinstance(self.budget_bits, int | None):
            raise TypeError(
                f"budget_bits={self.budget_bits!r} must be a whole number of bits; use budget_in_bits"
            )
        names = [layer.name for layer in self.layers]
        if not names:
            raise ValueError(f"an allocation needs at least one layer, got {names}; widen include")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(
                f"{twice}: two layers have this name; ties are broken by name, so give each its own"
            )
        for layer in self.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: LayerChoices) -> None:
        if len(layer.costs) != len(self.widths):
            raise ValueError(
                f"{layer.name}: {len(layer.costs)} costs for widths={self.widths}; give one per width"
            )
        check_equal_blocks(layer.name, layer.scores.shape[-2], self.tensor_parallel)
        self.columns(layer)
        if layer.row_bits is None:
            return
        other = sorted(set(torch.unique(layer.row_bits).tolist()) - set(self.widths))
        if other:
            raise ValueError(
                f"{layer.name}: fixed rows have {other[0]} bits, which is not one of widths={self.widths}; "
                "score that width too, and hold the other layers back with max_bits or min_bits"
            )
        check_row_counts(layer.name, layer.row_bits, self.row_multiple, self.tensor_parallel)

    def columns(self, layer: LayerChoices) -> slice:
        """Columns of the widths that rows of ``layer`` may choose.

        Raises:
            ValueError: no width lies within its minimum and maximum.
        """
        low = self.widths[0] if layer.min_bits is None else layer.min_bits
        high = self.widths[-1] if layer.max_bits is None else layer.max_bits
        inside = [column for column, bits in enumerate(self.widths) if low <= bits <= high]
        if not inside:
            raise ValueError(
                f"{layer.name}: no width of {self.widths} lies from min_bits={low} to max_bits={high}; "
                "widen them"
            )
        return slice(inside[0], inside[-1] + 1)

    @cached_property
    def num_weights(self) -> int:
        """Weights of all layers, given ones included."""
        return sum(layer.num_rows * layer.in_features for layer in self.layers)

    @cached_property
    def feasible_bits(self) -> tuple[int, int]:
        """Stored bits with every row at its narrowest width, and at its widest."""
        least = most = 0
        for layer in self.layers:
            if layer.row_bits is not None:
                given = given_bits(layer, self.widths)
                least, most = least + given, most + given
            else:
                costs = layer.costs[self.columns(layer)]
                least, most = least + layer.num_rows * costs[0], most + layer.num_rows * costs[-1]
        return least, most

    def check_budget(self) -> None:
        """Raise ``ValueError`` with the feasible range in bits per weight unless the budget lies in it."""
        least, most = self.feasible_bits
        if self.budget_bits is None or least <= self.budget_bits <= most:
            return
        low, high = (_bits_text(bits, self.num_weights, up) for bits, up in ((least, True), (most, False)))
        if self.budget_bits < least:
            way_out = "ask for more bits, allow narrower widths, or exclude layers"
        else:
            way_out = "ask for fewer bits, allow wider widths, or leave these layers in their original dtype"
        raise ValueError(
            f"a budget of {self.budget_bits / self.num_weights:.4f} bits per weight is outside the feasible "
            f"range {low} to {high} of widths={self.widths} (scales and all metadata included); {way_out}"
        )


@dataclass(frozen=True, eq=False)
class Allocation:
    """The answer to an :class:`AllocationProblem`.

    row_bits: uint8 by layer name, in the order of the problem's layers, shaped as its scores without widths.
    total_bits: stored bits of all rows.
    predicted_loss: sum of the scores at the chosen widths.
    lower_bound: no choice within the budget loses less than this (the Lagrangian dual at ``multiplier``).
    multiplier: score that one more bit of budget would save (lambda); 0 if nothing is left to gain.
    """

    row_bits: dict[str, Tensor] = field(repr=False)
    total_bits: int
    predicted_loss: float
    lower_bound: float
    multiplier: float


def check_scores(name: str, scores: Tensor) -> None:
    """Check that scores are finite and at least 0.

    Args:
        name: layer, for the message.
        scores: (N, W) or (E, N, W).

    Raises:
        ValueError: names layer, row and value of the first that is not.
    """
    wrong = ~((scores >= 0) & (scores < math.inf))
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: the score of row {format_row(index[:-1])} is {float(scores[index])}; scores must be "
            "finite and at least 0: look for NaN or Inf in weights and activations, or scale the loss"
        )


def given_bits(layer: LayerChoices, widths: tuple[int, ...]) -> int:
    """Stored bits of a layer whose row widths are given."""
    columns = given_columns(layer, widths)
    return int(np.asarray(layer.costs, np.int64)[columns].sum())


def given_columns(layer: LayerChoices, widths: tuple[int, ...]) -> np.ndarray:
    """Given row widths as columns: intp (E, N)."""
    if layer.row_bits is None:
        raise ValueError(f"{layer.name}: no row_bits are given; ask only for layers that have them")
    columns = np.searchsorted(widths, layer.row_bits.cpu().numpy())
    return columns.reshape(layer.scores_ENW.shape[:2])


def _bits_text(bits: int, num_weights: int, up: bool) -> str:
    """Bits per weight to four decimals, rounded into the range, so that the user can ask for it."""
    scaled = -(-bits * 10_000 // num_weights) if up else bits * 10_000 // num_weights
    return f"{scaled / 10_000:.4f}"
