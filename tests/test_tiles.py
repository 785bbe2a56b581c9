"""Tiles: every code where the formulas of the layout put it, and exact round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.generators import ORDINARY_IN_FEATURES, WIDTHS, PackedWeight, packed_weight
from torchmix import tiles as tiles_module
from torchmix.packing import unpack_rows, unpack_zero_points
from torchmix.tiles import Tiles, block_bytes, pack_tiles, unpack_tiles

# (bits of the plane, lowest bit of the code in it), as the layout's table has them
PLANES = {
    8: [(8, 0)],
    7: [(4, 0), (2, 4), (1, 6)],
    6: [(4, 0), (2, 4)],
    5: [(4, 0), (1, 4)],
    4: [(4, 0)],
    3: [(2, 0), (1, 2)],
    2: [(2, 0)],
}


def packed(weight: PackedWeight) -> Tiles:
    return pack_tiles(*weight.inner, weight.codes.shape[1])


def place(plane: int, row: int, k: int) -> tuple[int, int]:
    """Byte in a plane and lowest bit in that byte of the code at (row, k) of a block, by the formulas."""
    w, i, r = row // 16, row % 8, row % 16 // 8
    s, h, q, m = k // 32, k % 32 // 16, k % 16 // 4, k % 4
    lane, j = 4 * i + q, 4 * s + 2 * h + r
    if plane == 8:
        return ((w * 4 + s) * 32 + lane) * 16 + 4 * (j - 4 * s) + m, 0
    if plane == 4:
        pair = j // 2
        half, v = pair // 4, pair % 4
        return ((w * 2 + half) * 32 + lane) * 16 + 4 * v + m, 4 * (j % 2)
    if plane == 2:
        return (w * 32 + lane) * 16 + 4 * (j // 4) + m, 2 * (j % 4)
    return (w * 32 + lane) * 8 + 4 * (j // 8) + m, j % 8


def code_in_block(block: list[int], bits: int, row: int, k: int) -> int:
    """The unsigned code at (row, k), put together from the planes of one block."""
    code = start = 0
    for plane, low in PLANES[bits]:
        byte, shift = place(plane, row, k)
        code |= (block[start + byte] >> shift & (2**plane - 1)) << low
        start += 1024 * plane
    return code


def parameters_in_block(block: list[int], bits: int, row: int) -> tuple[int, int]:
    """The scale's 16 bits, and those of zero point and sum, of a row."""
    pair, second = row // 16 * 8 + row % 8, row % 16 // 8
    scale = 1024 * bits + 4 * pair + 2 * second
    other = scale + 128
    return block[scale] | block[scale + 1] << 8, block[other] | block[other + 1] << 8


def zero_point_and_sum(bits: int, zero_point: int, codes: list[int]) -> int:
    """What stands beside a scale, for the 128 bytes of a row in a group."""
    if bits == 8:
        return sum((code + 128) % 256 for code in codes)  # of the signed code, + 128
    return zero_point | sum(codes) << bits if bits <= 4 else zero_point


def expected_rows(weight: PackedWeight) -> list[tuple[int, list[int]]]:
    """(width, its original rows or -1 for each of 64 places) of every tile, in order."""
    found = []
    for bits in sorted(WIDTHS, reverse=True):
        rows = [n for n, width in enumerate(weight.row_bits.tolist()) if width == bits]
        rows += [-1] * (-len(rows) % 64)
        found += [(bits, rows[start : start + 64]) for start in range(0, len(rows), 64)]
    return found


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("in_features", [128, 140])
def test_every_element_lies_where_the_formulas_put_it(bits: int, in_features: int) -> None:
    """Element by element; the second weight ends inside a group and inside a tile, and has other widths too."""
    other = 3 if bits != 3 else 8
    weight = packed_weight(64 if in_features == 128 else 70, in_features, widths=(bits, bits, bits, other))
    tiles, row_index, tile_table = packed(weight)
    groups = -(-in_features // 128)
    codes, zeros = weight.codes.view(torch.uint8).tolist(), weight.zero_points.tolist()
    scales = (weight.scale.view(torch.int16).int() & 0xFFFF).tolist()
    expected, data, start = expected_rows(weight), tiles.tolist(), 0
    assert row_index.tolist() == [row for _, rows in expected for row in rows]
    wide_tiles = sum(width > 4 for width, _ in expected)
    for (width, rows), (offset, table_width, wide, ordinary) in zip(
        expected, tile_table.tolist(), strict=True
    ):
        assert (16 * offset, table_width, wide, ordinary) == (start, width, wide_tiles, 1)
        for g in range(groups):
            block = data[start : start + 1024 * width + 256]
            start += len(block)
            for place_in_tile, row in enumerate(rows):
                inside = codes[row][128 * g : 128 * g + 128] if row >= 0 else []
                inside += [0] * (128 - len(inside))
                scale, zero_point = (scales[row][g], zeros[row][g]) if row >= 0 else (0, 0)
                wanted = scale, zero_point_and_sum(width, zero_point, inside)
                assert parameters_in_block(block, width, place_in_tile) == wanted
                assert [code_in_block(block, width, place_in_tile, k) for k in range(128)] == inside
    assert start == len(data)


@pytest.mark.parametrize("plane", [8, 4, 2, 1])
def test_planes_have_no_gaps(plane: int) -> None:
    """The formulas of the test itself: every bit of a plane belongs to one code."""
    places = {place(plane, row, k) for row in range(64) for k in range(128)}
    assert places == {(byte, bit) for byte in range(1024 * plane) for bit in range(0, 8, plane)}


@given(
    st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=3),
    st.integers(1, 200),
    st.integers(1, 300),
    st.integers(0, 100),
)
@settings(max_examples=40)
def test_round_trip_is_exact(widths: list[int], rows: int, in_features: int, seed: int) -> None:
    weight = packed_weight(rows, in_features, widths=tuple(widths), seed=seed)
    tiles, row_index, tile_table = packed(weight)
    found = unpack_tiles(tiles, row_index, tile_table, rows, in_features)
    for part, expected in zip(found, weight.inner, strict=True):
        assert part.dtype == expected.dtype
        assert torch.equal(part, expected)
    groups = -(-in_features // 128)
    assert tiles.numel() == sum(groups * block_bytes(bits) for bits in tile_table[:, 1].tolist())
    assert row_index.numel() == 64 * len(tile_table)
    assert sorted(row for row in row_index.tolist() if row >= 0) == list(range(rows))


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
def test_round_trip_on_every_device(in_features: int, device: torch.device) -> None:
    weight = packed_weight(450, in_features)
    here = pack_tiles(*weight.inner_on(device), in_features)
    for found, expected in zip(here, packed(weight), strict=True):
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), expected)
    for part, expected in zip(unpack_tiles(*here, 450, in_features), weight.inner, strict=True):
        assert torch.equal(part.cpu(), expected)


@pytest.mark.parametrize("most", [1, 64 * 172 * 2])
def test_size_of_the_chunks_changes_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed_weight(700, 172, widths=(4, 4, 4, 8))
    expected = packed(weight)
    monkeypatch.setattr(tiles_module, "CHUNK_CODES", most)
    found = packed(weight)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    plain = unpack_tiles(*found, 700, 172)
    assert all(torch.equal(one, other) for one, other in zip(plain, weight.inner, strict=True))


def test_signed_codes_and_any_scale_bits_survive() -> None:
    """Codes -128 and scales that are NaN or infinite occur in damaged files only; nothing may hide them."""
    weight = packed_weight(64, 128, widths=(8,))
    weight.codes[3] = -128
    weight.scale[5], weight.scale[6], weight.scale[7] = float("nan"), float("-inf"), -0.0
    qdata, scale, zero_point, bits = unpack_tiles(*packed(weight), 64, 128)
    assert torch.equal(unpack_rows(qdata, bits, 128), weight.codes)
    assert torch.equal(scale.view(torch.int16), weight.scale.view(torch.int16))
    assert torch.equal(unpack_zero_points(zero_point, bits, 1), weight.zero_points)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("largest", [False, True])
def test_smallest_and_largest_sums(bits: int, largest: bool) -> None:
    """All codes and zero points as they may be at most, or at least (-128 in damaged files only)."""
    weight = packed_weight(64, 128, widths=(bits,))
    most = 2**bits - 1
    weight.codes.fill_((127 if largest else -128) if bits == 8 else (most if largest else 0))
    weight.zero_points.fill_(most if largest and bits < 8 else 0)
    found = parameters_in_block(packed(weight).tiles.tolist(), bits, 17)[1]
    if bits == 8:
        assert found == (255 * 128 if largest else 0)
    else:
        assert found == (most | (128 * most << bits if bits <= 4 else 0) if largest else 0)
        assert found < 2**15
    assert all(
        torch.equal(one, other)
        for one, other in zip(unpack_tiles(*packed(weight), 64, 128), weight.inner, strict=True)
    )


@pytest.mark.parametrize(
    ("scale", "ordinary"),
    [
        *((scale, 1) for scale in (0.0, -0.0, 2.0**-90, 1.0, 4.0)),
        *((scale, 0) for scale in (2.0**-91, 2.0**-126, 4.03125, 2.0**127, -1.0)),
        *((float(scale), 0) for scale in ("nan", "inf", "-inf")),
    ],
)
@pytest.mark.parametrize("most", [1, 1 << 24])
def test_tiles_with_unusual_scales_are_marked(
    scale: float, ordinary: int, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale of the last of 4 tiles, whose other rows are padding."""
    monkeypatch.setattr(tiles_module, "CHUNK_CODES", most)
    weight = packed_weight(2 * 64 + 65 + 1, 140, widths=(3,))
    weight.row_bits[:128] = 8
    weight.codes.clamp_(0, 7)
    weight.zero_points[:128] = 0
    weight.scale[-1, 1] = scale
    table = pack_tiles(*weight.inner_on(device), 140).tile_table
    assert table.dtype == torch.int32
    assert table[:, 3].tolist() == [1, 1, 1, ordinary]
    assert table[:, 1].tolist() == [8, 8, 3, 3]


def test_block_bytes_are_whole_units() -> None:
    for bits in WIDTHS:
        assert block_bytes(bits) == 1024 * bits + 256
        assert block_bytes(bits) % 128 == 0


def test_other_group_sizes_are_refused() -> None:
    weight = packed_weight(7, 64, 32)
    with pytest.raises(ValueError, match=r"group_size=32: .*keep this weight in the plain order"):
        pack_tiles(*weight.inner, 64, 32)


@pytest.mark.parametrize(("rows", "in_features"), [(70, 129), (70, 257), (69, 128), (71, 128)])
def test_tiles_of_another_layer_are_refused(rows: int, in_features: int) -> None:
    with pytest.raises(ValueError, match=rf"\({rows}, {in_features}\) need .*belong to another layer"):
        unpack_tiles(*packed(packed_weight(70, 128)), rows, in_features)
