"""Products with quantized weights: the op's numbers through every door, and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.generators import row_bits
from torchmix.ops import mixed_linear
from torchmix.tensor import MixedPrecisionTensor

F = torch.nn.functional
OFFSETS = torch.tensor([3, 3, 7, 10], dtype=torch.int32)


@pytest.fixture
def weight() -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(24, 192), row_bits(24), 64)


@pytest.fixture
def experts() -> MixedPrecisionTensor:
    return MixedPrecisionTensor.from_hp(torch.randn(4, 24, 192), row_bits(96).view(4, 24), 64)


def by_expert(x: Tensor, experts: MixedPrecisionTensor) -> Tensor:
    starts = [0, *OFFSETS.tolist()[:-1]]
    spans = enumerate(zip(starts, OFFSETS.tolist(), strict=True))
    return torch.cat([F.linear(x[start:end], experts[e]) for e, (start, end) in spans])


def test_linear_is_the_op(weight: MixedPrecisionTensor) -> None:
    x, bias = torch.randn(5, 192), torch.randn(24)
    inner = (weight.qdata, weight.scale, weight.zero_point, weight.row_bits)
    assert torch.equal(F.linear(x, weight, bias), mixed_linear(x, *inner, bias, 64))
    assert torch.equal(F.linear(x, weight), mixed_linear(x, *inner, None, 64))
    assert torch.equal(F.linear(input=x, weight=weight, bias=bias), mixed_linear(x, *inner, bias, 64))


def test_per_token_activations(weight: MixedPrecisionTensor) -> None:
    x = torch.randn(5, 192) * torch.logspace(0, 1, 192)
    token = weight.with_parts(per_token=True)
    inner = (weight.qdata, weight.scale, weight.zero_point, weight.row_bits)
    assert torch.equal(F.linear(x, token), mixed_linear(x, *inner, None, 64, per_token=True))
    assert not torch.equal(F.linear(x, token), F.linear(x, weight))


@pytest.mark.parametrize("shape", [(192,), (0, 192), (1, 192), (2, 3, 192), (2, 1, 3, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_batch_shape(weight: MixedPrecisionTensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    y = F.linear(x, weight)
    assert y.shape == (*shape[:-1], 24)
    assert y.dtype == dtype
    assert torch.equal(y.view(-1, 24), F.linear(x.view(-1, 192), weight))


DOORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mm": lambda x, w: torch.mm(x, w.t()),
    "matmul": lambda x, w: x @ w.T,
    "batch": lambda x, w: (x[None] @ w.mT)[0],
    "left": lambda x, w: (w @ x.t()).t(),
    "vector": lambda x, w: torch.stack([row @ w.t() for row in x]),
}


@pytest.mark.parametrize("name", DOORS)
def test_products_are_the_linear_layer(weight: MixedPrecisionTensor, name: str) -> None:
    x = torch.randn(5, 192)
    expected = F.linear(x, weight) if name != "vector" else torch.cat([F.linear(r[None], weight) for r in x])
    assert torch.equal(DOORS[name](x, weight), expected)


def test_addmm_as_in_gpt2(weight: MixedPrecisionTensor) -> None:
    """Conv1D holds (in_features, out_features) and calls addmm."""
    x, bias = torch.randn(5, 192), torch.randn(24)
    stored = MixedPrecisionTensor.from_hp(weight.dequantize().t(), weight.row_bits, 64, transposed=True)
    again = MixedPrecisionTensor.from_hp(weight.dequantize(), weight.row_bits, 64)
    assert torch.equal(torch.addmm(bias, x, stored), F.linear(x, again, bias))
    assert torch.equal(torch.addmm(bias, x, weight.t()), F.linear(x, weight, bias))
    both = torch.addmm(bias, x, weight.t(), alpha=2.0, beta=0.5)
    assert torch.equal(both, F.linear(x, weight) * 2.0 + bias * 0.5)
    matrix = torch.randn(5, 24)
    assert torch.equal(torch.addmm(matrix, x, weight.t()), F.linear(x, weight) + matrix)


def test_product_over_output_features_uses_the_dense_weight(weight: MixedPrecisionTensor) -> None:
    """Nothing shares a scale along the output features, so nothing is quantized on the fly."""
    grad = torch.randn(5, 24)
    assert torch.equal(grad @ weight, grad @ weight.dequantize())
    assert torch.equal(F.linear(grad, weight.t()), F.linear(grad, weight.dequantize().t()))


@pytest.mark.parametrize("function", [torch._grouped_mm, F.grouped_mm])
def test_grouped_mm(experts: MixedPrecisionTensor, function: Callable[..., Tensor]) -> None:
    x = torch.randn(10, 192)
    expected = by_expert(x, experts)
    assert torch.equal(function(x, experts.transpose(-2, -1), offs=OFFSETS), expected)
    stored = experts.mT  # what experts stored as (experts, in_features, out_features) are
    assert stored.transposed
    assert torch.equal(function(x, stored, offs=OFFSETS), expected)


def test_bmm_on_either_side(experts: MixedPrecisionTensor) -> None:
    x, bias = torch.randn(4, 6, 192), torch.randn(4, 1, 24)
    expected = torch.stack([F.linear(x[e], experts[e]) for e in range(4)])
    assert torch.equal(torch.bmm(x, experts.mT), expected)
    assert torch.equal(x @ experts.mT, expected)
    assert torch.equal(torch.bmm(experts, x.mT), expected.mT)
    assert torch.equal(torch.baddbmm(bias, x, experts.mT), expected + bias)


def test_experts_through_transformers(experts: MixedPrecisionTensor) -> None:
    pytest.importorskip("transformers.integrations.moe")
    x = torch.randn(10, 192, requires_grad=True)
    y = torch.ops.transformers.grouped_mm_fallback(x, experts.mT, OFFSETS)
    expected = by_expert(x, experts)
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    (reference,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(gradient, reference)


@pytest.mark.parametrize("name", DOORS)
def test_gradients_of_the_input(weight: MixedPrecisionTensor, name: str) -> None:
    """Straight-through: the gradient is that of a dense layer with the dequantized weight."""
    x = torch.randn(5, 192, requires_grad=True)
    direction = torch.randn(5, 24)
    (gradient,) = torch.autograd.grad(DOORS[name](x, weight), x, direction)
    torch.testing.assert_close(gradient, direction @ weight.dequantize(), rtol=1e-5, atol=1e-5)


def test_gradients_of_experts(experts: MixedPrecisionTensor) -> None:
    x = torch.randn(4, 6, 192, requires_grad=True)
    direction = torch.randn(4, 6, 24)
    (gradient,) = torch.autograd.grad(torch.bmm(x, experts.mT), x, direction)
    torch.testing.assert_close(gradient, direction @ experts.dequantize(), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(F.grouped_mm(x[0], experts.mT, offs=OFFSETS // 2), x, direction[0][:6])
    assert gradient[0, :5].abs().min(1).values.gt(0).all()


REFUSED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "weight as the input": lambda x, w, e: F.linear(w, x),
    "two quantized": lambda x, w, e: w @ w.t(),
    "two quantized in batch": lambda x, w, e: torch.bmm(e, e.mT),
    "experts not transposed": lambda x, w, e: F.grouped_mm(x, e, offs=OFFSETS),
    "no offsets": lambda x, w, e: torch._grouped_mm(x, e.mT),
    "bias in grouped_mm": lambda x, w, e: torch._grouped_mm(x, e.mT, OFFSETS, bias=torch.ones(24)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_products_that_are_refused(
    weight: MixedPrecisionTensor, experts: MixedPrecisionTensor, name: str
) -> None:
    with pytest.raises(NotImplementedError, match="MixedPrecisionTensor"):
        REFUSED[name](torch.randn(10, 192), weight, experts)


def test_linear_with_all_experts_is_refused(experts: MixedPrecisionTensor) -> None:
    with pytest.raises(ValueError, match="index one expert first"):
        F.linear(torch.randn(10, 192), experts)
