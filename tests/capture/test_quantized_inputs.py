"""Fake quantization equals what the quantized op computes with, and reaches only the layers it was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchmix.capture import QuantizedInputs, fake_quantize


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_codes_times_scale(per_token, dtype):
    x = torch.randn(2, 3, 40, dtype=dtype)
    codes, scale, _ = torch.ops.torchmix.quantize_activation(x.flatten(0, 1), 16, per_token)
    expected = (codes.float() * scale.repeat_interleave(16, 1)[:, :40]).to(dtype).view(x.shape)
    found = fake_quantize(x, 16, per_token)
    assert torch.equal(found, expected)
    assert not torch.equal(found, x)


def test_only_added_weights_get_quantized_inputs():
    first, second = nn.Linear(32, 8), nn.Linear(32, 8)
    x = torch.randn(4, 32)
    mode = QuantizedInputs(16, False)
    mode.add(first.weight)
    with mode:
        assert torch.equal(
            first(x), nn.functional.linear(fake_quantize(x, 16, False), first.weight, first.bias)
        )
        assert torch.equal(second(x), nn.functional.linear(x, second.weight, second.bias))
    assert torch.equal(first(x), nn.functional.linear(x, first.weight, first.bias))


def test_one_input_is_quantized_once():
    layers = [nn.Linear(32, 8, bias=False) for _ in range(3)]
    mode = QuantizedInputs(16, False)
    for layer in layers:
        mode.add(layer.weight)
    x = torch.randn(4, 32)
    with mode:
        inputs = [mode._quantized(x) for _ in layers]
    assert all(found is inputs[0] for found in inputs)
    assert mode._last is None  # the input is not kept alive


def test_right_operands_of_matmul_count_too():
    weight = torch.randn(32, 8)
    mode = QuantizedInputs(16, False)
    mode.add(weight)
    x = torch.randn(4, 32)
    with mode:
        found = torch.addmm(torch.zeros(8), x, weight)
    torch.testing.assert_close(found, fake_quantize(x, 16, False) @ weight)
