"""Tile layout of packed weights (L0): the order in which GPU kernels read them; on disk it never occurs.

Rows are sorted by width, widest first, and stay in their original order within a width. The rows of each width
are filled up to a multiple of 64 with padding rows, and cut into tiles of 64 rows. A tile is a row of G blocks, one
per group of 128 inputs; a block is complete in itself::

    tiles   | tile 0: 64 rows, 8 bits      | tile 1: 8 bits |  ...  | tile t: 4 bits |  ...
            | block 0 | block 1 | .. | G-1 |
    block   | code planes, 1024 * b bytes | 32 scale pairs, 128 bytes | 32 pairs of zero point and sum, 128 bytes |

Every block is a multiple of 128 bytes, the unit in which memory is read.

A code of b bits lies in planes of 8, 4, 2 or 1 bits, from wide to narrow, the low bits of the code first::

    b        8     7           6       5       4     3       2
    planes   8     4, 2, 1     4, 2    4, 1    4     2, 1    2

The 64 x 128 codes of a block belong to 4 warps w, 32 lanes and 16 registers j of 4 codes m, as the left operand of
``mma.m16n8k32`` wants them. With lane = 4 * i + q (i < 8, q < 4) and j = 4 * s + 2 * h + r (s < 4, h < 2, r < 2)::

    row = 16 * w + i + 8 * r        input = 32 * s + 16 * h + 4 * q + m

A byte of a p-bit plane holds the codes m of 8 / p registers that follow one another, the first one in its lowest
bits. Four such bytes, m = 0..3, are a word; a word stands for 8 / p registers. Words lie in this order::

    8-bit plane   8192 bytes   [w][s = 0..3]     [lane][4 words]   word v: register j = 4 * s + v
    4-bit plane   4096 bytes   [w][half = 0, 1]  [lane][4 words]   word v: registers j = 8 * half + 2 * v + (0, 1)
    2-bit plane   2048 bytes   [w]               [lane][4 words]   word v: registers j = 4 * v + (0..3)
    1-bit plane   1024 bytes   [w]               [lane][2 words]   word v: registers j = 8 * v + (0..7)

Pair p = 0..31 holds the parameters of row a = 16 * (p // 8) + p % 8, then of row a + 8: two bfloat16 scales, or two
little-endian uint16 "zero point and sum". The sum is that of a row's 128 unsigned codes in the group, with which
kernels take back an offset of the activations' codes::

    b <= 4     zero_point | sum << b
    b = 5..7   zero_point alone: the sum would not fit, kernels add these codes up themselves
    b = 8      the sum of (code + 128); there is no zero point

Inputs beyond K have codes 0, padding rows have codes, scales and zero points 0; the sums follow by the same formulas
(an 8-bit code of 0 counts 128).

``row_index`` int32 (T * 64,) is the original row of each place, -1 for padding. ``tile_table`` int32 (T, 4) holds

    0   the offset of the tile in units of 16 bytes
    1   its width
    2   how many tiles have more than 4 bits, the same for all (they come first; a kernel deals tiles out by it)
    3   1 if every scale of the tile is 0 or within [2**-90, 4], else 0; kernels take a slower loop for the others

Shapes: N out_features, K in_features, G = ceil(K / 128), T tiles, R = 64 rows per tile of some tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchmix.accounting import row_bytes
from torchmix.packing import (
    MAX_BITS,
    MIN_BITS,
    SIGNED_BITS,
    pack_codes,
    packed_sizes,
    row_offsets,
    unpack_codes,
    zero_point_offsets,
)

GROUP_SIZE = 128
TILE_ROWS = 64
OFFSET_UNIT = 16  # bytes
NARROW_BITS = 4  # tiles of more than these bits are wide
PLANES = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
WARPS, LANES, REGISTERS, WORD = 4, 32, 16, 4  # per block; codes per register = bytes per word
PAIR_BYTES = 2 * TILE_ROWS  # of a block's scales, and of its zero points and sums
SIGN = 0x80  # a signed byte with this bit the other way round is the code + 128
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-90, 4.0  # what the fast loop of kernels takes, besides 0
# Codes that are unpacked at a time: temporary memory is some ten bytes for each of them, whatever the weight's size.
CHUNK_CODES = 1 << 24


class Tiles(NamedTuple):
    """A weight in the tile layout: tiles uint8 1-D, row_index int32 (T * 64,), tile_table int32 (T, 4)."""

    tiles: Tensor
    row_index: Tensor
    tile_table: Tensor


class _Chunk(NamedTuple):
    """Some tiles of one width: their places in the row index and their bytes, as half-open ranges."""

    bits: int
    places: slice
    span: slice


def block_bytes(bits: int) -> int:
    """Bytes of one block, 64 rows of 128 inputs, with its scales, zero points and sums."""
    return TILE_ROWS * GROUP_SIZE * bits // 8 + 2 * PAIR_BYTES


def pack_tiles(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    row_bits: Tensor,
    in_features: int,
    group_size: int = GROUP_SIZE,
) -> Tiles:
    """Bring a weight from the plain order into tiles, on the device where it is.

    Beyond the result this takes a few hundred megabytes at most: rows are repacked some at a time.

    Args:
        qdata: uint8 1-D, packed codes (:mod:`torchmix.packing`).
        scale: bfloat16 (N, G).
        zero_point: uint8 1-D, packed.
        row_bits: uint8 (N,), any widths from 2 to 8.
        in_features: K.
        group_size: inputs per scale; must be 128.

    Raises:
        ValueError: for another group size.
    """
    if group_size != GROUP_SIZE:
        raise ValueError(
            f"group_size={group_size}: tiles hold weights with group_size={GROUP_SIZE} only; keep this weight in the "
            f"plain order, or quantize it with group_size={GROUP_SIZE}"
        )
    row_index, widths = _tile_rows(row_bits)
    starts = _tile_starts(widths, in_features)
    tiles, ordinary = qdata.new_empty(starts[-1]), [row_bits.new_empty(0, dtype=torch.int32)]
    code_offsets = row_offsets(row_bits, in_features)
    zero_offsets = zero_point_offsets(row_bits, scale.shape[1])
    for chunk in _chunks(widths, in_features):
        rows = row_index[chunk.places]
        real = rows >= 0
        rows = torch.where(real, rows, rows.clamp(min=0).amax())  # a row that exists; padding is masked below
        codes = _read(qdata, code_offsets[rows], chunk.bits, in_features, row_bytes(in_features, chunk.bits))
        zeros = _read_zero_points(zero_point, zero_offsets[rows], chunk.bits, scale.shape[1])
        codes, scales, zeros = (part.masked_fill_(~real[:, None], 0) for part in (codes, scale[rows], zeros))
        ordinary.append(_ordinary_scales(scales))
        tiles[chunk.span] = _pack_blocks(codes, scales, zeros, chunk.bits)
    wide = sum(bits > NARROW_BITS for bits in widths)
    table = [[start // OFFSET_UNIT, bits, wide] for start, bits in zip(starts, widths, strict=False)]
    tile_table = torch.tensor(table, dtype=torch.int32).view(-1, 3).to(qdata.device)
    return Tiles(tiles, row_index.int(), torch.cat([tile_table, torch.cat(ordinary)[:, None]], 1))


def unpack_tiles(
    tiles: Tensor, row_index: Tensor, tile_table: Tensor, out_features: int, in_features: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse of :func:`pack_tiles`, bit for bit.

    Args:
        tiles, row_index, tile_table: as in :class:`Tiles`.
        out_features: N.
        in_features: K.

    Returns:
        qdata uint8 1-D, scale bfloat16 (N, G), zero_point uint8 1-D, row_bits uint8 (N,).

    Raises:
        ValueError: the tiles are not those of a weight of this shape.
    """
    widths = tile_table[:, 1].tolist()
    _check_tiles(tiles, row_index, widths, out_features, in_features)
    row_bits = tile_row_bits(row_index, tile_table, out_features)
    groups = -(-in_features // GROUP_SIZE)
    codes_length, zeros_length = packed_sizes(row_bits, in_features, GROUP_SIZE)
    qdata, zero_point = tiles.new_empty(codes_length), tiles.new_empty(zeros_length)
    scale = tiles.new_empty((out_features, groups), dtype=torch.bfloat16)
    code_offsets, zero_offsets = row_offsets(row_bits, in_features), zero_point_offsets(row_bits, groups)
    for chunk in _chunks(widths, in_features):
        rows = row_index[chunk.places].long()
        real = rows >= 0
        rows = rows[real]
        codes, scales, zeros = (part[real] for part in _unpack_blocks(tiles[chunk.span], groups, chunk.bits))
        scale[rows] = scales
        _write(qdata, code_offsets[rows], pack_codes(codes[:, :in_features], chunk.bits))
        if chunk.bits != SIGNED_BITS:
            length = (groups * chunk.bits + 7) // 8
            _write(zero_point, zero_offsets[rows], pack_codes(zeros, chunk.bits)[:, :length])
    return qdata, scale, zero_point, row_bits


def tile_row_bits(row_index: Tensor, tile_table: Tensor, out_features: int) -> Tensor:
    """Width of each original row: uint8 (N,); the tiles themselves are not read."""
    real = row_index >= 0
    widths = tile_table[:, 1].to(torch.uint8).repeat_interleave(TILE_ROWS)
    row_bits = widths.new_zeros(out_features)
    row_bits[row_index[real].long()] = widths[real]
    return row_bits


def _tile_rows(row_bits: Tensor) -> tuple[Tensor, list[int]]:
    """Original row of each place, int64 (T * 64,), and the width of each tile."""
    places, widths = [row_bits.new_empty(0, dtype=torch.int64)], []
    for bits in range(MAX_BITS, MIN_BITS - 1, -1):
        rows = (row_bits == bits).nonzero().squeeze(1)
        tiles = -(-len(rows) // TILE_ROWS)
        places.append(pad(rows, (0, tiles * TILE_ROWS - len(rows)), value=-1))
        widths += [bits] * tiles
    return torch.cat(places), widths


def _tile_starts(widths: list[int], in_features: int) -> list[int]:
    """First byte of each tile, and the length of all of them last."""
    groups = -(-in_features // GROUP_SIZE)
    return list(accumulate((groups * block_bytes(bits) for bits in widths), initial=0))


def _chunks(widths: list[int], in_features: int) -> Iterator[_Chunk]:
    """Runs of tiles of one width, each of at most ``CHUNK_CODES`` codes (or one tile)."""
    starts = _tile_starts(widths, in_features)
    most = max(CHUNK_CODES // (TILE_ROWS * in_features), 1)
    first = 0
    for bits, run in groupby(widths):
        end = first + len(list(run))
        for tile in range(first, end, most):
            last = min(tile + most, end)
            places = slice(tile * TILE_ROWS, last * TILE_ROWS)
            yield _Chunk(bits, places, slice(starts[tile], starts[last]))
        first = end


def _read(data: Tensor, starts: Tensor, bits: int, count: int, length: int) -> Tensor:
    """Codes of rows which begin at ``starts`` and take ``length`` bytes: uint8 (R, count)."""
    packed = data[_byte_index(starts, length)]
    packed = pad(packed, (0, row_bytes(count, bits) - length))
    return unpack_codes(packed, bits, count)


def _read_zero_points(zero_point: Tensor, starts: Tensor, bits: int, groups: int) -> Tensor:
    """Zero points of rows: uint8 (R, G), 0 for 8-bit rows."""
    if bits == SIGNED_BITS:
        return zero_point.new_zeros((len(starts), groups))
    return _read(zero_point, starts, bits, groups, (groups * bits + 7) // 8)


def _write(data: Tensor, starts: Tensor, packed: Tensor) -> None:
    """Put rows of bytes at ``starts``."""
    data[_byte_index(starts, packed.shape[1])] = packed


def _byte_index(starts: Tensor, length: int) -> Tensor:
    """Positions ``starts[r] + 0 .. length - 1``: int64 (R, length)."""
    return starts[:, None] + torch.arange(length, device=starts.device)


def _pack_blocks(codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Bytes of tiles: uint8 1-D from codes uint8 (R, K), scale bfloat16 (R, G) and zero_point uint8 (R, G)."""
    rows, groups = scale.shape
    shape = (rows // TILE_ROWS, WARPS, 2, 8, groups, 4, 2, 4, WORD)  # tile, w, r, i, group, s, h, q, m
    codes = pad(codes, (0, groups * GROUP_SIZE - codes.shape[1]))
    registers = (
        codes.view(shape).permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(-1, WARPS, LANES, REGISTERS, WORD)
    )
    parts, low = [], 0
    for plane in PLANES[bits]:
        parts.append(_pack_plane(registers >> low & (2**plane - 1), plane))
        low += plane
    parts += [_pack_pairs(part).view(torch.uint8) for part in (scale, _with_sums(codes, zero_point, bits))]
    return torch.cat(parts, 1).flatten()


def _unpack_blocks(data: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of :func:`_pack_blocks`, with codes (R, G * 128)."""
    planes = [TILE_ROWS * GROUP_SIZE * plane // 8 for plane in PLANES[bits]]
    blocks = data.view(-1, block_bytes(bits))
    *parts, scale, zero_point = blocks.split([*planes, PAIR_BYTES, PAIR_BYTES], 1)
    registers, low = data.new_zeros((len(blocks), WARPS, LANES, REGISTERS, WORD)), 0
    for plane, part in zip(PLANES[bits], parts, strict=True):
        registers |= _unpack_plane(part, plane) << low
        low += plane
    registers = registers.view(-1, groups, WARPS, 8, 4, 4, 2, 2, WORD)  # tile, group, w, i, q, s, h, r, m
    codes = registers.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(-1, groups * GROUP_SIZE)
    scales = _unpack_pairs(scale.contiguous().view(torch.bfloat16), groups)
    zeros = _unpack_pairs(zero_point.contiguous().view(torch.int16), groups)
    return codes, scales, _without_sums(zeros, bits)


def _with_sums(codes: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Zero points and sums as a block has them, below 2**15: int16 (R, G) from codes uint8 (R, G * 128)."""
    if NARROW_BITS < bits < SIGNED_BITS:
        return zero_point.short()
    codes = codes ^ SIGN if bits == SIGNED_BITS else codes
    sums = codes.view(*zero_point.shape, GROUP_SIZE).sum(2, dtype=torch.int32).short()
    return sums if bits == SIGNED_BITS else sums << bits | zero_point


def _without_sums(values: Tensor, bits: int) -> Tensor:
    """Zero points uint8 from what :func:`_with_sums` gives; 0 for 8-bit rows."""
    return (
        torch.zeros_like(values, dtype=torch.uint8)
        if bits == SIGNED_BITS
        else (values & (2**bits - 1)).byte()
    )


def _ordinary_scales(scale: Tensor) -> Tensor:
    """1 for tiles whose scales are all 0 or of a size that the fast loop takes: int32 (tiles,) from (R, G)."""
    ordinary = (scale == 0) | (scale >= SMALLEST_SCALE) & (scale <= LARGEST_SCALE)
    return ordinary.view(-1, TILE_ROWS * scale.shape[1]).all(1).int()


def _pack_plane(values: Tensor, bits: int) -> Tensor:
    """Bytes of one plane per block: uint8 (B, bytes) from values below 2**bits (B, warp, lane, register, m)."""
    per_byte = 8 // bits
    parts = values.view(-1, WARPS, LANES, REGISTERS // per_byte, per_byte, WORD)
    words = parts[..., 0, :].clone()
    for i in range(1, per_byte):
        words |= parts[..., i, :] << (i * bits)
    return words.view(-1, WARPS, LANES, *_word_shape(bits)).transpose(2, 3).flatten(1)


def _unpack_plane(data: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`_pack_plane`: uint8 (B, warp, lane, register, m)."""
    per_byte = 8 // bits
    pieces, *word = _word_shape(bits)
    words = data.reshape(-1, WARPS, pieces, LANES, *word).transpose(2, 3)
    words = words.reshape(-1, WARPS, LANES, REGISTERS // per_byte, WORD)
    values = [words >> (i * bits) & (2**bits - 1) for i in range(per_byte)]
    return torch.stack(values, 4).view(-1, WARPS, LANES, REGISTERS, WORD)


def _word_shape(bits: int) -> tuple[int, int, int]:
    """Words of a lane as (pieces, words per piece, bytes): a lane loads 16 bytes at a time, or the 8 it has."""
    words = REGISTERS * bits // 8
    return -(-words // 4), min(words, 4), WORD


def _pack_pairs(values: Tensor) -> Tensor:
    """(R, G) -> (blocks, 64): rows a and a + 8 beside each other."""
    groups = values.shape[1]
    parts = values.view(-1, WARPS, 2, 8, groups)  # tile, w, r, i, group
    return parts.permute(0, 4, 1, 3, 2).reshape(-1, TILE_ROWS)


def _unpack_pairs(values: Tensor, groups: int) -> Tensor:
    """Inverse of :func:`_pack_pairs`."""
    parts = values.reshape(-1, groups, WARPS, 8, 2)  # tile, group, w, i, r
    return parts.permute(0, 2, 4, 3, 1).reshape(-1, groups)


def _check_tiles(
    tiles: Tensor, row_index: Tensor, widths: list[int], out_features: int, in_features: int
) -> None:
    """Raise ``ValueError`` unless the tiles have the sizes that a weight (out_features, in_features) needs."""
    rows = int((row_index >= 0).sum())
    found = (tiles.numel(), row_index.numel(), rows)
    wanted = (_tile_starts(widths, in_features)[-1], TILE_ROWS * len(widths), out_features)
    if found != wanted:
        raise ValueError(
            f"bytes of tiles, places of rows and rows are {found}, but {len(widths)} tiles of a weight of shape "
            f"({out_features}, {in_features}) need {wanted}; the tiles belong to another layer"
        )
