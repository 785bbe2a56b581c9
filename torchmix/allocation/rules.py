"""Rules that a plan keeps and an allocation respects (L3): widths, and how many rows may have each.

Shapes: N out_features, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmix.accounting import MAX_BITS, check_bits


def check_widths(widths: Sequence[int]) -> None:
    """Raise ``ValueError`` unless ``widths`` is a non-empty rising sequence of numbers from 2 to 8."""
    for bits in widths:
        check_bits(bits)
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"widths={tuple(widths)} must be rising and not empty; for example (3, 4, 5, 6, 8)")


def check_counts_options(row_multiple: int, tensor_parallel: int) -> None:
    """Raise ``ValueError`` unless both are whole numbers from 1 up."""
    for name, value in (("row_multiple", row_multiple), ("tensor_parallel", tensor_parallel)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 up; 1 asks for nothing")


def check_equal_blocks(name: str, rows: int, tensor_parallel: int) -> None:
    """Raise ``ValueError`` unless ``rows`` rows of layer ``name`` can be cut into equal blocks."""
    if rows % tensor_parallel:
        raise ValueError(
            f"{name}: {rows} rows cannot be cut into tensor_parallel={tensor_parallel} equal blocks; exclude "
            f"this layer or choose a divisor of {rows}"
        )


def check_row_counts(name: str, row_bits: Tensor, row_multiple: int, tensor_parallel: int) -> None:
    """Check how many rows of a layer have each width.

    The rows of a weight (of each expert) are cut into ``tensor_parallel`` equal blocks of consecutive rows.
    All blocks hold the same number of rows of each width, and that number is a multiple of ``row_multiple``,
    except for one width that takes the remainder of a block.

    Args:
        name: layer, for the message.
        row_bits: uint8 (N,) or (E, N).
        row_multiple: 1 asks for nothing.
        tensor_parallel: 1 asks for nothing.

    Raises:
        ValueError: a rule is broken; names layer, rule and value.
    """
    rows = row_bits.shape[-1]
    check_equal_blocks(name, rows, tensor_parallel)
    if row_multiple == tensor_parallel == 1:
        return
    blocks = row_bits.reshape(-1, tensor_parallel, rows // tensor_parallel)
    counts = torch.stack([(blocks == bits).sum(-1) for bits in range(MAX_BITS + 1)], dim=-1)
    if not torch.equal(counts, counts[:, :1].expand_as(counts)):
        raise ValueError(
            f"{name}: the {tensor_parallel} blocks of {blocks.shape[-1]} rows hold different numbers of rows "
            f"per width; make the plan again with tensor_parallel={tensor_parallel}, or set tensor_parallel=1"
        )
    ragged = int((counts % row_multiple != 0).sum(-1).max())
    if ragged > 1:
        raise ValueError(
            f"{name}: {ragged} widths have a number of rows that is not a multiple of "
            f"row_multiple={row_multiple}, and only the one that takes the remainder may; make the plan "
            "again or set row_multiple=1"
        )


def format_row(row: Sequence[int]) -> str:
    """How messages write a row: ``7``, or ``7 of expert 2`` for the index (2, 7)."""
    return f"{row[-1]} of expert {row[0]}" if len(row) == 2 else f"{row[-1]}"
