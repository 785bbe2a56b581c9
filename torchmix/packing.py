"""Plain packing of integer codes into bytes (L0): the order on disk and in a state dict.

A weight of N rows and K inputs holds one code per input. Row n uses ``row_bits[n]`` bits per code, so rows
have different lengths; they follow one another in their original order without gaps.

Bytes of one row, here for 3 bits: the lowest bits of the first byte hold the first code, eight codes fill
three bytes, and the last block of eight codes is padded with zero bits::

    byte      0               1               2
    bit   7 6 5 4 3 2 1 0 7 6 5 4 3 2 1 0 7 6 5 4 3 2 1 0
    code  2 2 1 1 1 0 0 0 5 4 4 4 3 3 3 2 7 7 7 6 6 6 5 5

Codes of 2 to 7 bits are unsigned; codes of 8 bits are signed (two's complement), so every code fits int8.
Zero points use the same bit order, one code per input group, but a row of them ends at the next byte border
(not after eight codes), and 8-bit rows have none.

Shapes: R rows of one width, N rows of a weight (experts flattened), K in_features, G = ceil(K / group_size).
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchmix.accounting import CODES_PER_BLOCK, row_bytes, zero_point_bytes

SIGNED_BITS = 8
MIN_BITS, MAX_BITS = 2, 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack rows of equal width.

    Args:
        codes: uint8 (R, C), each code below ``2**bits``.
        bits: width of one code, 1 to 8.

    Returns:
        uint8 (R, ceil(C / 8) * bits); codes beyond C in the last block of eight are zero.
    """
    rows, count = codes.shape
    blocks = -(-count // CODES_PER_BLOCK)
    padded = torch.nn.functional.pad(codes, (0, blocks * CODES_PER_BLOCK - count))
    codes_RB8 = padded.view(rows, blocks, CODES_PER_BLOCK)
    packed_RBb = codes.new_zeros((rows, blocks, bits))
    for i in range(CODES_PER_BLOCK):
        byte, shift = divmod(i * bits, 8)
        packed_RBb[..., byte] |= codes_RB8[..., i] << shift
        if shift + bits > 8:  # the code continues in the next byte
            packed_RBb[..., byte + 1] |= codes_RB8[..., i] >> (8 - shift)
    return packed_RBb.view(rows, blocks * bits)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        packed: uint8 (R, ceil(count / 8) * bits).
        bits: width of one code, 1 to 8.
        count: codes per row.

    Returns:
        uint8 (R, count).
    """
    if bits == 8:
        return packed[:, :count]
    rows, blocks = packed.shape[0], packed.shape[1] // bits
    packed_RBb = packed.view(rows, blocks, bits)
    codes_RB8 = packed.new_empty((rows, blocks, CODES_PER_BLOCK))
    for i in range(CODES_PER_BLOCK):
        byte, shift = divmod(i * bits, 8)
        code = packed_RBb[..., byte] >> shift
        if shift + bits > 8:  # uint8 shifts drop what leaves the byte, which the mask would drop anyway
            code = code | (packed_RBb[..., byte + 1] << (8 - shift))
        codes_RB8[..., i] = code & (2**bits - 1)
    return codes_RB8.flatten(1)[:, :count]


def row_offsets(row_bits: Tensor, in_features: int) -> Tensor:
    """First byte of each row in the packed codes, and the total length last: int64 (N + 1,).

    Args:
        row_bits: uint8, any shape with N elements.
        in_features: K.
    """
    return _offsets(row_bits.flatten().long() * (-(-in_features // CODES_PER_BLOCK)))


def zero_point_offsets(row_bits: Tensor, num_groups: int) -> Tensor:
    """First byte of each row in the packed zero points, and the total length last: int64 (N + 1,)."""
    bits = row_bits.flatten().long()
    lengths = torch.where(bits == SIGNED_BITS, 0, (bits * num_groups + 7) // 8)
    return _offsets(lengths)


def pack_rows(codes: Tensor, row_bits: Tensor) -> Tensor:
    """Pack the codes of a whole weight, rows of mixed widths in their original order.

    Args:
        codes: int8 (N, K), unsigned values for rows below 8 bits.
        row_bits: uint8 (N,).

    Returns:
        uint8 (sum of ``row_bytes(K, row_bits[n])``,).
    """
    offsets = row_offsets(row_bits, codes.shape[1])
    packed = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=codes.device)
    for bits in _widths(row_bits):
        rows = (row_bits == bits).nonzero().squeeze(1)
        row_packed = pack_codes(codes[rows].view(torch.uint8), bits)
        packed[_byte_index(offsets[rows], row_packed.shape[1])] = row_packed
    return packed


def unpack_rows(qdata: Tensor, row_bits: Tensor, in_features: int) -> Tensor:
    """Inverse of :func:`pack_rows`.

    Args:
        qdata: uint8 1-D, packed codes.
        row_bits: uint8 (N,).
        in_features: K.

    Returns:
        int8 (N, K): unsigned values below 8 bits, signed values at 8 bits.

    Raises:
        ValueError: ``qdata`` does not have the bytes that rows of this length take.
    """
    offsets = row_offsets(row_bits, in_features)
    if qdata.numel() != int(offsets[-1]):
        raise ValueError(
            f"in_features={in_features} and these {row_bits.numel()} row widths need {int(offsets[-1])} bytes of "
            f"codes, but qdata holds {qdata.numel()} bytes; the weight was built for another number of inputs"
        )
    codes = torch.empty((row_bits.numel(), in_features), dtype=torch.uint8, device=qdata.device)
    for bits in _widths(row_bits):
        rows = (row_bits == bits).nonzero().squeeze(1)
        packed = qdata[_byte_index(offsets[rows], row_bytes(in_features, bits))]
        codes[rows] = unpack_codes(packed, bits, in_features)
    return codes.view(torch.int8)


def pack_zero_points(zero_point: Tensor, row_bits: Tensor) -> Tensor:
    """Pack the zero points of a whole weight; rows of 8 bits are left out.

    Args:
        zero_point: uint8 (N, G); the values of 8-bit rows are ignored.
        row_bits: uint8 (N,).

    Returns:
        uint8 1-D, ceil(G * bits / 8) bytes for each row below 8 bits.
    """
    num_groups = zero_point.shape[1]
    offsets = zero_point_offsets(row_bits, num_groups)
    packed = torch.empty(int(offsets[-1]), dtype=torch.uint8, device=zero_point.device)
    for bits in _widths(row_bits):
        if bits == SIGNED_BITS:
            continue
        rows = (row_bits == bits).nonzero().squeeze(1)
        length = (num_groups * bits + 7) // 8
        packed[_byte_index(offsets[rows], length)] = pack_codes(zero_point[rows], bits)[:, :length]
    return packed


def unpack_zero_points(packed: Tensor, row_bits: Tensor, num_groups: int) -> Tensor:
    """Inverse of :func:`pack_zero_points`: uint8 (N, G), 0 for 8-bit rows."""
    offsets = zero_point_offsets(row_bits, num_groups)
    zero_point = torch.zeros((row_bits.numel(), num_groups), dtype=torch.uint8, device=packed.device)
    for bits in _widths(row_bits):
        if bits == SIGNED_BITS:
            continue
        rows = (row_bits == bits).nonzero().squeeze(1)
        length = (num_groups * bits + 7) // 8
        blocks = row_bytes(num_groups, bits)
        rows_packed = packed[_byte_index(offsets[rows], length)]
        rows_packed = torch.nn.functional.pad(rows_packed, (0, blocks - length))
        zero_point[rows] = unpack_codes(rows_packed, bits, num_groups)
    return zero_point


def packed_sizes(row_bits: Tensor, in_features: int, group_size: int) -> tuple[int, int]:
    """Bytes of the packed codes and of the packed zero points of a weight with these row widths."""
    counts = torch.bincount(row_bits.flatten().long().cpu(), minlength=MAX_BITS + 1).tolist()
    qdata = sum(count * row_bytes(in_features, bits) for bits, count in enumerate(counts) if count)
    zero_point = sum(
        count * zero_point_bytes(in_features, bits, group_size) for bits, count in enumerate(counts) if count
    )
    return qdata, zero_point


def _offsets(lengths: Tensor) -> Tensor:
    """Cumulative sum with a leading zero."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _byte_index(starts: Tensor, length: int) -> Tensor:
    """Positions ``starts[r] + 0 .. length - 1``: int64 (R, length)."""
    return starts[:, None] + torch.arange(length, device=starts.device)


def _widths(row_bits: Tensor) -> list[int]:
    """Distinct widths in rising order."""
    return torch.unique(row_bits).tolist()
