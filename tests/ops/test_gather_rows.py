"""``gather_rows``: bytes of chosen rows against packing these rows alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tests.generators import PackedWeight, packed_weight
from torchmix.ops import gather_rows
from torchmix.packing import pack_rows, pack_zero_points


def gathered(weight: PackedWeight, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    qdata, scale, zero_point, row_bits = weight.inner
    return gather_rows(qdata, zero_point, row_bits, rows, weight.codes.shape[1], scale.shape[1])


@given(rows=st.lists(st.integers(0, 13), max_size=20))
def test_chosen_rows_are_packed_as_if_they_were_all(rows: list[int]) -> None:
    weight, chosen = packed_weight(14, 100, 64), torch.tensor(rows, dtype=torch.int64)
    bits = weight.row_bits[chosen]
    qdata, zero_point = gathered(weight, chosen)
    assert torch.equal(qdata, pack_rows(weight.codes[chosen], bits))
    assert torch.equal(zero_point, pack_zero_points(weight.zero_points[chosen], bits))


def test_results_are_copies() -> None:
    weight = packed_weight(4, 64, 64)
    inner = weight.inner
    qdata, zero_point = gather_rows(inner[0], inner[2], inner[3], torch.arange(4), 64, 1)
    assert torch.equal(qdata, inner[0])
    qdata.fill_(0)
    zero_point.fill_(0)
    assert inner[0].any()
    assert inner[2].any()


@pytest.mark.parametrize("row", [-1, 4])
def test_row_numbers_outside_are_an_error(row: int) -> None:
    with pytest.raises(IndexError, match=r"row numbers must lie in 0\.\.3"):
        gathered(packed_weight(4, 64, 64), torch.tensor([0, row]))


def test_sizes_are_unknown_while_tracing() -> None:
    real = packed_weight(4, 64, 64).inner
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        inner = [mode.from_tensor(tensor) for tensor in real]
        rows = mode.from_tensor(torch.arange(2))
        qdata, zero_point = gather_rows(inner[0], inner[2], inner[3], rows, 64, 1)
    for result in (qdata, zero_point):
        assert result.dtype == torch.uint8
        assert isinstance(result.shape[0], torch.SymInt)


def test_opcheck() -> None:
    qdata, scale, zero_point, row_bits = packed_weight(6, 64, 64).inner
    arguments = (qdata, zero_point, row_bits, torch.tensor([4, 0, 1]), 64, scale.shape[1])
    torch.library.opcheck(torch.ops.torchmix.gather_rows.default, arguments)
