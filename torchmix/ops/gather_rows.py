"""``torchmix::gather_rows`` (L1): the packed bytes of chosen rows, in the chosen order.

Rows have different lengths, so the size of the result depends on the data; as an op it can be traced all the same.

Shapes: N rows of the weight (experts flattened), R chosen rows, K in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmix.packing import row_offsets, zero_point_offsets

torch.library.define(
    "torchmix::gather_rows",
    "(Tensor qdata, Tensor zero_point, Tensor row_bits, Tensor rows, int in_features, int num_groups) "
    "-> (Tensor, Tensor)",
)


def gather_rows(
    qdata: Tensor, zero_point: Tensor, row_bits: Tensor, rows: Tensor, in_features: int, num_groups: int
) -> tuple[Tensor, Tensor]:
    """Packed codes and packed zero points of the rows ``rows``; nothing is unpacked.

    Args:
        qdata: uint8 1-D, packed codes (:mod:`torchmix.packing`).
        zero_point: uint8 1-D, packed.
        row_bits: uint8, N elements of any shape.
        rows: int64 (R,), row numbers from 0 to N - 1 in any order, repeats allowed.
        in_features: K.
        num_groups: G.

    Returns:
        uint8 1-D codes and uint8 1-D zero points; both are copies.

    Raises:
        IndexError: for a row number outside 0 .. N - 1.
    """
    return torch.ops.torchmix.gather_rows(qdata, zero_point, row_bits, rows, in_features, num_groups)


@torch.library.impl("torchmix::gather_rows", "CompositeExplicitAutograd")
def _reference(
    qdata: Tensor, zero_point: Tensor, row_bits: Tensor, rows: Tensor, in_features: int, num_groups: int
) -> tuple[Tensor, Tensor]:
    count = row_bits.numel()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise IndexError(
            f"row numbers must lie in 0..{count - 1}, but they reach from {int(rows.min())} to {int(rows.max())}"
        )
    codes = _gather(qdata, row_offsets(row_bits, in_features), rows)
    return codes, _gather(zero_point, zero_point_offsets(row_bits, num_groups), rows)


def _gather(packed: Tensor, offsets: Tensor, rows: Tensor) -> Tensor:
    """Bytes ``offsets[r] .. offsets[r + 1]`` of every row; each run of consecutive rows is one piece."""
    if not rows.numel():
        return packed.new_empty(0)
    jump = torch.ones(rows.numel() + 1, dtype=torch.bool, device=rows.device)
    jump[1:-1] = rows[1:] != rows[:-1] + 1
    starts = offsets[rows[jump[:-1]]].tolist()
    ends = offsets[rows[jump[1:]] + 1].tolist()
    return torch.cat([packed[start:end] for start, end in zip(starts, ends, strict=True)])


@torch.library.register_fake("torchmix::gather_rows")
def _fake(
    qdata: Tensor, zero_point: Tensor, row_bits: Tensor, rows: Tensor, in_features: int, num_groups: int
) -> tuple[Tensor, Tensor]:
    context = torch.library.get_ctx()
    return qdata.new_empty(context.new_dynamic_size()), zero_point.new_empty(context.new_dynamic_size())
