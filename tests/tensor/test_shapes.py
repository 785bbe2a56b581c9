"""The same bytes in another shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor


@pytest.fixture
def weight() -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(24, 192), row_bits(24), 64)


@pytest.fixture
def experts() -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(4, 24, 192), row_bits(96).view(4, 24), 64)


def assert_same_bytes(found: Tensor, expected: Tensor, source: MixedPrecisionTensor) -> None:
    assert isinstance(found, MixedPrecisionTensor)
    assert torch.equal(found.dequantize(), expected)
    assert found.shape == expected.shape
    assert found.qdata.data_ptr() == source.qdata.data_ptr()
    found.check()


SWAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda w: w.transpose(-2, -1),
    "mT": lambda w: w.mT,
    "swapaxes": lambda w: w.swapaxes(-1, -2),
    "movedim": lambda w: w.movedim(-1, -2),
    "adjoint": lambda w: w.adjoint(),
    "permute": lambda w: w.permute(*range(w.dim() - 2), -1, -2),
    "twice": lambda w: w.mT.mT,
    "nothing": lambda w: w.transpose(0, 0),
}


@pytest.mark.parametrize("name", SWAPS)
def test_swapping_the_last_two_dimensions(
    weight: MixedPrecisionTensor, experts: MixedPrecisionTensor, name: str
) -> None:
    for tensor in (weight, experts):
        assert_same_bytes(SWAPS[name](tensor), SWAPS[name](tensor.dequantize()), tensor)


def test_t(weight: MixedPrecisionTensor, experts: MixedPrecisionTensor) -> None:
    assert_same_bytes(weight.t(), weight.dequantize().t(), weight)
    assert_same_bytes(weight.T, weight.dequantize().T, weight)
    with pytest.raises(RuntimeError, match="2"):
        experts.t()


def test_other_permutations_are_refused(experts: MixedPrecisionTensor) -> None:
    for operation in (lambda w: w.transpose(0, 1), lambda w: w.permute(2, 0, 1)):
        with pytest.raises(NotImplementedError, match="only the last two dimensions"):
            operation(experts)


RESHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda e: e.view(4, 24, 192),
    "inferred": lambda e: e.reshape(-1, 24, 192),
    "rows": lambda e: e.view(96, 192),
    "flatten": lambda e: e.flatten(0, 1),
    "there_and_back": lambda e: e.reshape(96, 192).unflatten(0, (4, -1)),
    "other_experts": lambda e: e.reshape(8, 12, 192),
    "expand": lambda e: e.expand(4, -1, -1),
    "slice": lambda e: e[1:3].reshape(48, 192)[:24].unsqueeze(0).squeeze(0),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_experts_are_rows(experts: MixedPrecisionTensor, name: str) -> None:
    found, expected = RESHAPES[name](experts), RESHAPES[name](experts.dequantize())
    source = experts if name != "slice" else experts[1]
    assert_same_bytes(found, expected, source)


def test_one_expert(weight: MixedPrecisionTensor) -> None:
    for tensor in (weight, weight.t()):
        dense = tensor.dequantize()
        assert_same_bytes(tensor[None], dense[None], weight)
        assert_same_bytes(tensor.unsqueeze(0).squeeze(0), dense, weight)
        assert_same_bytes(tensor.unsqueeze(-3).squeeze(), dense, weight)
        assert_same_bytes(tensor.squeeze(0), dense, weight)


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: w.view(12, 384),
        lambda w: w.flatten(),
        lambda w: w.view(2, 2, 6, 192),
        lambda w: w.t().view(2, 96, 24),
        lambda w: w.unsqueeze(1),
        lambda w: w[None].expand(3, -1, -1),
        lambda w: w[:1][None].squeeze(1),
    ],
)
def test_shapes_that_are_refused(weight: MixedPrecisionTensor, operation: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="dequantize"):
        operation(weight)
