"""Exact storage of quantized rows (L0): the one place that counts bytes and bits.

A quantized row of K inputs at ``bits`` bits, with G = ceil(K / group_size) input groups, stores

==============  ==========================  =============================================
codes           ceil(K / 8) * bits bytes    padded to a multiple of eight codes
zero points     ceil(G * bits / 8) bytes    one per group; none at 8 bits (symmetric)
scales          16 * G bits                 bfloat16, one per group
row width       8 bits                      the number ``bits`` itself, one byte per row
==============  ==========================  =============================================

"Bits per weight" means this sum over the weights of the quantized layers, so it is true on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8
CODES_PER_BLOCK = 8  # eight codes of b bits fill b whole bytes
SCALE_BITS = 16  # bfloat16
ROW_WIDTH_BITS = 8
# A float32 matmul over one group is exact while group_size * 255 * 127 < 2**24.
MAX_GROUP_SIZE = 512


def check_bits(bits: int) -> None:
    """Raise ``ValueError`` unless ``bits`` is a width that rows can have (2 to 8)."""
    if not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(
            f"bits={bits!r} is not a row width; choose a whole number from {MIN_BITS} to {MAX_BITS}"
        )


def check_group_size(group_size: int) -> None:
    """Raise ``ValueError`` unless ``group_size`` is a positive multiple of 8 and at most 512."""
    if (
        not isinstance(group_size, int)
        or not 0 < group_size <= MAX_GROUP_SIZE
        or group_size % CODES_PER_BLOCK
    ):
        raise ValueError(
            f"group_size={group_size!r} must be a positive multiple of {CODES_PER_BLOCK}, at most "
            f"{MAX_GROUP_SIZE}; 128 is the usual choice"
        )


def num_groups(in_features: int, group_size: int) -> int:
    """Input groups of a row, G = ceil(K / group_size); the last one may be shorter.

    Raises:
        ValueError: ``in_features`` below 1, or an invalid ``group_size``.
    """
    check_group_size(group_size)
    _check_in_features(in_features)
    return -(-in_features // group_size)


def row_bytes(in_features: int, bits: int) -> int:
    """Bytes of the packed codes of one row: ceil(K / 8) * bits.

    Raises:
        ValueError: ``in_features`` below 1, or ``bits`` outside 2 to 8.
    """
    check_bits(bits)
    _check_in_features(in_features)
    return -(-in_features // CODES_PER_BLOCK) * bits


def zero_point_bytes(in_features: int, bits: int, group_size: int) -> int:
    """Bytes of the packed zero points of one row: ceil(G * bits / 8), and 0 at 8 bits (symmetric).

    Raises:
        ValueError: an argument outside its range.
    """
    check_bits(bits)
    groups = num_groups(in_features, group_size)
    return 0 if bits == MAX_BITS else -(-groups * bits // 8)


def row_stored_bits(in_features: int, bits: int, group_size: int) -> int:
    """All stored bits of one row: codes, zero points, scales and the row width.

    Raises:
        ValueError: an argument outside its range.
    """
    packed_bytes = row_bytes(in_features, bits) + zero_point_bytes(in_features, bits, group_size)
    return 8 * packed_bytes + SCALE_BITS * num_groups(in_features, group_size) + ROW_WIDTH_BITS


def width_costs(in_features: int, widths: Sequence[int], group_size: int) -> tuple[int, ...]:
    """Stored bits of one row at each of ``widths``: what an allocation pays for its choices."""
    return tuple(row_stored_bits(in_features, bits, group_size) for bits in widths)


def stored_bits(row_bits: Tensor, in_features: int, group_size: int) -> int:
    """All stored bits of a weight.

    Args:
        row_bits: uint8, any shape: the width of each row (experts included).
        in_features: K of every row.
        group_size: inputs that share a scale.

    Raises:
        ValueError: a width outside 2 to 8, or another argument outside its range.
    """
    counts = torch.bincount(row_bits.flatten().long().cpu()).tolist()
    return sum(
        count * row_stored_bits(in_features, bits, group_size) for bits, count in enumerate(counts) if count
    )


def budget_in_bits(bits_per_weight: float, num_weights: int) -> int:
    """The whole number of bits that ``bits_per_weight * num_weights`` pays for (rounded down).

    The decimal number that the caller wrote counts, not its nearest float: 0.29 of 100 weights is 29 bits. A
    product within 1/1000 below a whole number counts as that number, so that ``budget_in_bits(total / n, n)``
    gives ``total`` back for a float quotient.

    Raises:
        ValueError: ``bits_per_weight`` is not a positive finite number.
    """
    if not 0 < bits_per_weight < float("inf"):
        raise ValueError(
            f"bits per weight must be a positive finite number, got {bits_per_weight!r}; try 4.5"
        )
    return int(Fraction(str(bits_per_weight)) * num_weights + Fraction(1, 1000))


def _check_in_features(in_features: int) -> None:
    if in_features < 1:
        raise ValueError(f"in_features={in_features} must be at least 1; leave empty layers out")
