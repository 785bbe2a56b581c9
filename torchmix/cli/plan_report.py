"""A plan as text and as JSON: what ``plan``, ``quantize`` and ``inspect`` say about layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchmix.cli.formatting import format_bytes, name_pattern, row_counts, table

if TYPE_CHECKING:
    from torchmix.allocation import BitPlan

MAX_LISTED = 6  # excluded layers of one kind and reason that are named one by one


@dataclass(frozen=True)
class LayerLine:
    """One quantized layer as the reports show it."""

    name: str
    shape: tuple[int, ...]
    rows_per_bits: Mapping[int, int]
    bits_per_weight: float

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def to_dict(self) -> dict[str, Any]:
        """The contract's keys, and the layer's own bits."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "rows_per_bits": {str(bits): rows for bits, rows in self.rows_per_bits.items()},
            "bits_per_weight": self.bits_per_weight,
        }


def plan_lines(plan: BitPlan) -> list[LayerLine]:
    """The layers of a plan."""
    return [
        LayerLine(name, tuple(layer.shape), plan.rows_per_bits(name), plan.bits_per_weight_of(name))
        for name, layer in plan.layers.items()
    ]


def plan_report(plan: BitPlan) -> dict[str, Any]:
    """The JSON keys that describe a plan."""
    return {
        "bits_per_weight": plan.bits_per_weight,
        "predicted_kl": plan.predicted_kl,
        "coverage": plan.coverage,
        "salience": plan.salience,
        "group_size": plan.group_size,
        "row_multiple": plan.row_multiple,
        "tensor_parallel": plan.tensor_parallel,
        "layers": [line.to_dict() for line in plan_lines(plan)],
        "excluded": [{"name": entry.name, "reason": entry.reason} for entry in plan.excluded],
    }


def layer_table(lines: Sequence[LayerLine], each: bool = False) -> str:
    """Rows per width of all layers.

    Args:
        lines: the layers.
        each: a line per layer instead of one for all layers whose names differ in numbers only.
    """
    widths = sorted({bits for line in lines for bits in line.rows_per_bits})
    groups: dict[tuple[str, tuple[int, ...]], list[LayerLine]] = {}
    for line in lines:
        name = line.name if each else name_pattern(line.name)
        groups.setdefault((name, line.shape), []).append(line)
    rows = []
    for (name, shape), members in groups.items():
        size = sum(line.num_weights for line in members)
        bits = sum(line.bits_per_weight * line.num_weights for line in members) / size
        counts = _add_counts(line.rows_per_bits for line in members)
        shown = "x".join(map(str, shape))
        rows.append([name, shown, str(len(members)), f"{bits:.3f}", *row_counts(counts, widths)])
    headers = ["layers", "shape", "count", "bits/weight", *(f"rows at {bits}" for bits in widths)]
    return table(headers, rows)


def _add_counts(counts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for rows_per_bits in counts:
        for bits, rows in rows_per_bits.items():
            total[bits] = total.get(bits, 0) + rows
    return total


def coverage_line(lines: Sequence[LayerLine], coverage: float) -> str:
    """How much was reached, in one line."""
    weights = sum(line.num_weights for line in lines)
    return f"{len(lines)} layers, {weights:,} weights; coverage {coverage:.1%}"


def excluded_text(excluded: Sequence[tuple[str, str]]) -> str:
    """Every weight that is not quantized with its reason; layers that differ in numbers only on one line."""
    if not excluded:
        return "left as it is: nothing"
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in excluded:
        groups.setdefault((name_pattern(name), reason), []).append(name)
    lines = ["left as it is:"]
    for (pattern, reason), names in groups.items():
        if len(names) <= MAX_LISTED:
            lines += [f"  {name}: {reason}" for name in names]
        else:
            lines.append(f"  {pattern} ({len(names)} layers): {reason}")
    return "\n".join(lines)


def size_text(checkpoint_bytes: int, original_bytes: int) -> str:
    """Size on disk to the byte, and in proportion to the original."""
    share = checkpoint_bytes / original_bytes
    return (
        f"{checkpoint_bytes:,} bytes ({format_bytes(checkpoint_bytes)}), {share:.1%} of the original's "
        f"{format_bytes(original_bytes)}"
    )


def kl_text(predicted_kl: float | None) -> str:
    """The predicted divergence, or why there is none."""
    if predicted_kl is None:
        return "not known (needs --data and salience fisher_token)"
    return f"{predicted_kl:.3g} nats per token from the original"
