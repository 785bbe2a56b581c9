"""Products with dense weights behave like those of the quantized layers, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from torchmix import tuning_inputs
from torchmix.capture import fake_quantize
from torchmix.evaluation import sqnr_db
from torchmix.tensor import MixedPrecisionTensor
from torchmix.tuning_inputs import DenseWeight, TunedProducts

# The integers are equal; what differs is the order of float32 additions (2**-24 each, so far above 100 dB).
MIN_SQNR_DB = 100.0


def pair(shape, *, per_token=False, transposed=False):
    """A quantized weight, and its dense values for one step."""
    quantized = MixedPrecisionTensor.from_hp(
        torch.randn(shape), 4, 64, per_token=per_token, transposed=transposed
    )
    return quantized, DenseWeight(quantized.dequantize(), quantized.in_features, 64, per_token)


@pytest.mark.parametrize("per_token", [False, True])
def test_linear_equals_the_quantized_layer(per_token):
    quantized, dense = pair((24, 136), per_token=per_token)
    x, bias = torch.randn(2, 5, 136), torch.randn(24)
    products = TunedProducts({"w": dense})
    with products:
        y = functional.linear(x, dense.value, bias)
        named = functional.linear(x, weight=dense.value, bias=bias)
    assert sqnr_db(functional.linear(x, quantized, bias), y.detach()) > MIN_SQNR_DB
    assert torch.equal(named, y)
    assert products.seen == {"w"}


def test_conv1d_equals_the_quantized_layer():
    quantized, dense = pair((136, 24), transposed=True)
    x, bias = torch.randn(5, 136), torch.randn(24)
    with TunedProducts({"w": dense}):
        y = torch.addmm(bias, x, dense.value)
    assert sqnr_db(torch.addmm(bias, x, quantized), y.detach()) > MIN_SQNR_DB


def test_gradients_go_straight_through():
    _, dense = pair((24, 128))
    x = torch.randn(5, 128, requires_grad=True)
    upstream = torch.randn(5, 24)
    with TunedProducts({"w": dense}):
        functional.linear(x, dense.value).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ dense.value.detach())
    expected = upstream.T @ fake_quantize(x.detach(), 64, False)
    torch.testing.assert_close(dense.take_gradient(), expected)
    assert dense.take_gradient() is None, "taken once"


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_its_own_gradient(transposed):
    shape = (4, 128, 24) if transposed else (4, 24, 128)
    quantized, dense = pair(shape, transposed=transposed)
    x = torch.randn(5, 128)
    with TunedProducts({"w": dense}):
        part = dense.value[torch.tensor(2)]  # as a loop over the experts that were hit does
        y = x @ part if transposed else functional.linear(x, part)
        again = torch.matmul(x, dense.value[2] if transposed else dense.value[2].T)
    y.sum().backward()
    expected = torch.matmul(x, quantized[2]) if transposed else functional.linear(x, quantized[2])
    assert sqnr_db(expected, y.detach()) > MIN_SQNR_DB
    assert sqnr_db(expected, again.detach()) > MIN_SQNR_DB
    assert dense.value.grad is None, "no gradient as large as all experts"
    assert [leaf.grad is not None for leaf in dense.experts] == [False, False, True, False]
    gradient = dense.take_gradient()
    assert gradient.shape == shape
    assert gradient[2].any()
    assert not gradient[[0, 1, 3]].any()


def test_all_experts_at_once():
    quantized, dense = pair((4, 128, 24), transposed=True)
    x = torch.randn(4, 5, 128)
    with TunedProducts({"w": dense}):
        y = torch.bmm(x, dense.value)
    y.sum().backward()
    assert sqnr_db(torch.bmm(x, quantized), y.detach()) > MIN_SQNR_DB
    assert dense.take_gradient().shape == (4, 128, 24)


def test_layers_with_one_input_quantize_it_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        tuning_inputs, "fake_quantize", lambda x, *rest: calls.append(x) or fake_quantize(x, *rest)
    )
    (_, first), (_, second) = pair((24, 128)), pair((8, 128))
    x = torch.randn(5, 128)
    with TunedProducts({"a": first, "b": second}):
        functional.linear(x, first.value)
        functional.linear(x, second.value)
        assert len(calls) == 1
        x.add_(1.0)
        functional.linear(x, second.value)
    assert len(calls) == 2


def test_other_weights_are_left_alone():
    _, dense = pair((24, 128))
    x, other = torch.randn(5, 128), torch.randn(24, 128)
    products = TunedProducts({"w": dense})
    with products:
        assert torch.equal(functional.linear(x, other), x @ other.T)
    assert not products.seen
