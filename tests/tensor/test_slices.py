"""Rows, experts and groups of inputs: every piece is what the dense weight has there, without rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.generators import packed_weight, row_bits
from torchmix.tensor import MixedPrecisionTensor

F = torch.nn.functional


def mixed(in_features: int = 172) -> MixedPrecisionTensor:
    stored = packed_weight(24, in_features, 64)
    parts = (stored.codes, stored.scale, stored.zero_points, stored.row_bits)
    return MixedPrecisionTensor.from_codes(*parts, 64, torch.float32)


@pytest.fixture
def weight() -> MixedPrecisionTensor:
    return mixed()


@pytest.fixture
def experts() -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(4, 24, 192), row_bits(96).view(4, 24), 64)


def assert_piece(found: Tensor, expected: Tensor) -> None:
    assert isinstance(found, MixedPrecisionTensor)
    assert found.shape == expected.shape
    assert torch.equal(found.dequantize(), expected)
    found.check()


def inside(piece: MixedPrecisionTensor, whole: MixedPrecisionTensor) -> bool:
    """Whether all inner tensors are views of those of the whole weight."""
    names = MixedPrecisionTensor.tensor_data_names
    return all(
        getattr(piece, n).untyped_storage().data_ptr() == getattr(whole, n).untyped_storage().data_ptr()
        for n in names
    )


@settings(max_examples=40)
@given(start=st.integers(-30, 30), stop=st.integers(-30, 30))
def test_slices_of_rows_are_views(start: int, stop: int) -> None:
    weight = mixed()
    piece = weight[start:stop]
    assert_piece(piece, weight.dequantize()[start:stop])
    assert inside(piece, weight)


def test_pointers_of_a_row_slice(weight: MixedPrecisionTensor) -> None:
    """The bytes of the rows before it are skipped, nothing else."""
    piece = weight[5:9]
    before = int(((weight.row_bits[:5].long()) * (-(-172 // 8))).sum())
    assert piece.qdata.data_ptr() == weight.qdata.data_ptr() + before
    assert piece.scale.data_ptr() == weight.scale[5].data_ptr()


def test_copying_into_a_slice_writes_through(weight: MixedPrecisionTensor) -> None:
    """As loaders of tensor-parallel shards do: param.narrow(...).copy_(loaded.narrow(...))."""
    stored = packed_weight(24, 172, 64, seed=5)
    parts = (stored.codes, stored.scale, stored.zero_points, weight.row_bits)
    other = MixedPrecisionTensor.from_codes(*parts, 64, torch.float32)
    before = weight.dequantize()
    weight.narrow(0, 4, 6).copy_(other.narrow(0, 4, 6))
    expected = torch.cat([before[:4], other.dequantize()[4:10], before[10:]])
    assert torch.equal(weight.dequantize(), expected)


def test_inputs_are_cut_at_group_borders(weight: MixedPrecisionTensor) -> None:
    dense = weight.dequantize()
    for start, end in ((0, 64), (64, 128), (64, 172), (128, 172), (0, 172)):
        assert_piece(weight[:, start:end], dense[:, start:end])
        assert_piece(weight.t()[start:end], dense.t()[start:end])


@pytest.mark.parametrize(("start", "end"), [(0, 100), (10, 64), (64, 171)])
def test_cuts_through_a_group_are_errors(weight: MixedPrecisionTensor, start: int, end: int) -> None:
    message = rf"inputs {start}\.\.{end} .* cut through a group.*multiples of group_size=64"
    with pytest.raises(ValueError, match=message):
        weight[:, start:end]


SPLITS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "chunk": lambda w: w.chunk(5),
    "split": lambda w: w.split(7),
    "split_sizes": lambda w: w.split([4, 0, 12, 8]),
    "tensor_split": lambda w: w.tensor_split(3),
    "inputs": lambda w: w.split([64, 108], dim=1),
    "last_dim": lambda w: w.split(128, -1),
    "transposed": lambda w: w.t().split(64),
}


@pytest.mark.parametrize("name", SPLITS)
def test_splits(weight: MixedPrecisionTensor, name: str) -> None:
    found, expected = SPLITS[name](weight), SPLITS[name](weight.dequantize())
    assert len(found) == len(expected)
    for piece, dense in zip(found, expected, strict=True):
        assert_piece(piece, dense)


EXPERT_PIECES: dict[str, Callable[[Tensor], Tensor]] = {
    "select": lambda e: e[1],
    "select_last": lambda e: e[-1],
    "slice": lambda e: e[1:3],
    "rows": lambda e: e[:, 4:9],
    "inputs": lambda e: e[..., 64:128],
    "chunk_rows": lambda e: e.chunk(2, dim=1)[1],
    "chunk_of_transposed": lambda e: e.mT.chunk(2, dim=-1)[1],
    "select_of_transposed": lambda e: e.mT[2],
    "index": lambda e: e[torch.tensor([2, 0, 2])],
    "index_negative": lambda e: e[torch.tensor([-1, 1])],
    "index_none": lambda e: e[torch.tensor([], dtype=torch.int64)],
    "index_one": lambda e: e[torch.tensor(3)],
    "index_list": lambda e: e[[2, 0]],
    "index_mask": lambda e: e[torch.tensor([True, False, True, True])],
    "index_select": lambda e: e.index_select(0, torch.tensor([3, 3])),
    "index_of_transposed": lambda e: e.mT[torch.tensor([2, 1])],
    "unbind": lambda e: e.unbind()[3],
    "iterate": lambda e: list(e)[2],
}


@pytest.mark.parametrize("name", EXPERT_PIECES)
def test_experts(experts: MixedPrecisionTensor, name: str) -> None:
    assert_piece(EXPERT_PIECES[name](experts), EXPERT_PIECES[name](experts.dequantize()))


def test_selected_experts_are_views(experts: MixedPrecisionTensor) -> None:
    assert inside(experts[2], experts)
    assert inside(experts[1:3], experts)


@settings(max_examples=40)
@given(rows=st.lists(st.integers(-24, 23), max_size=30))
def test_rows_by_number(rows: list[int]) -> None:
    weight, chosen = mixed(), torch.tensor(rows, dtype=torch.int64)
    assert_piece(weight[chosen], weight.dequantize()[chosen])


def test_numbers_out_of_range_are_errors(weight: MixedPrecisionTensor, experts: MixedPrecisionTensor) -> None:
    for operation in (
        lambda: experts[4],
        lambda: experts[torch.tensor([0, 4])],
        lambda: experts[torch.tensor([-5])],
        lambda: weight[torch.tensor([24])],
    ):
        with pytest.raises(IndexError):
            operation()


def test_joining_pieces(weight: MixedPrecisionTensor, experts: MixedPrecisionTensor) -> None:
    assert torch.equal(torch.cat([weight[:8], weight[8:11], weight[11:]]), weight)
    assert torch.equal(torch.vstack([weight[:8], weight[8:]]), weight)
    assert torch.equal(torch.cat([experts[:1], experts[1:]]), experts)
    assert torch.equal(torch.stack(list(experts)), experts)
    x = torch.randn(3, 172)
    together = F.linear(x, torch.cat([weight, weight]))  # as fused projections have it
    assert torch.equal(together, torch.cat([F.linear(x, weight)] * 2, dim=1))


REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "one row": lambda w, e: w[3],
    "step": lambda w, e: w[::2],
    "row of experts": lambda w, e: e[:, 3],
    "index of inputs": lambda w, e: w[:, torch.tensor([1, 2])],
    "index of transposed": lambda w, e: w.t()[torch.tensor([1, 2])],
    "index_select of inputs": lambda w, e: w.index_select(1, torch.tensor([1])),
    "two dimensions of numbers": lambda w, e: e[torch.tensor([[0, 1]])],
    "cat of inputs": lambda w, e: torch.cat([w, w], dim=1),
    "cat with another group size": lambda w, e: torch.cat(
        [w, MixedPrecisionTensor.from_hp(torch.randn(24, 172), 4)]
    ),
    "cat with a dense weight": lambda w, e: torch.cat([w, torch.randn(24, 172)]),
    "stack of other sizes": lambda w, e: torch.stack([w, w[:4]]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pieces_that_are_refused(
    weight: MixedPrecisionTensor, experts: MixedPrecisionTensor, name: str
) -> None:
    with pytest.raises(NotImplementedError, match="MixedPrecisionTensor"):
        REFUSED[name](weight, experts)


def test_rows_on_the_meta_device_are_unknown(weight: MixedPrecisionTensor) -> None:
    with pytest.raises(ValueError, match=r"meta device.*load the weight first"):
        weight.to("meta")[2:4]


def test_split_sizes_must_add_up(weight: MixedPrecisionTensor) -> None:
    with pytest.raises(RuntimeError, match="24"):
        weight.split([4, 4])
