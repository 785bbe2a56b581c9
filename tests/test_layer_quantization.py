"""One layer from weight to quantized tensor: the record tells what was done, and what was done instead."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from torchmix.evaluation import sqnr_db
from torchmix.layer_quantization import merge_notes, quantize_target
from torchmix.rounding import round_weight
from torchmix.selection import Target

N, K = 12, 64
BITS = torch.tensor([3, 4, 5, 6, 8, 4] * 2, dtype=torch.uint8)


def owner(weight):
    module = nn.Module()
    module.weight = nn.Parameter(weight)
    return module


def test_the_tensor_holds_what_the_rounding_chose():
    weight = torch.randn(N, K, dtype=torch.bfloat16)
    target = Target("a.weight", owner(weight), "weight", transposed=False)
    quantized, record = quantize_target(target, BITS, 32, "clip", [None], per_token=True)
    expected = round_weight(weight, BITS, 32, "clip")
    assert torch.equal(quantized.codes(), expected.codes)
    assert torch.equal(quantized.dequantize(torch.float32), expected.dequantize())
    assert quantized.per_token
    assert quantized.dtype == torch.bfloat16
    assert (record.name, record.method, record.notes) == ("a.weight", "clip", ())
    assert record.bits_per_weight == quantized.bits_per_weight
    assert record.sqnr_db == sqnr_db(weight.float(), expected.dequantize())


def test_a_transposed_weight_is_rounded_by_its_rows():
    weight = torch.randn(K, N)
    target = Target("a.weight", owner(weight), "weight", transposed=True)
    quantized, _ = quantize_target(target, BITS, 32, "rtn", [None], per_token=False)
    assert quantized.shape == (K, N)
    expected = round_weight(weight.T, BITS, 32, "rtn").dequantize()
    assert torch.equal(quantized.dequantize(), expected.T)


def test_experts_without_a_hessian_are_rounded_with_clip_search_and_named(caplog):
    weight = torch.randn(3, N, K)
    x = torch.randn(200, K)
    target = Target("experts.up", owner(weight), "weight", transposed=False)
    with caplog.at_level(logging.WARNING):
        quantized, record = quantize_target(
            target, BITS.repeat(3, 1), 32, "gptq", [x.T @ x, None, None], per_token=False
        )
    assert record.method == "clip/gptq"
    assert record.notes == (
        "2 of 3 experts [1, 2]: no calibration token reached it: rounded with clip search instead of GPTQ",
    )
    assert "experts.up" in caplog.text
    assert torch.equal(quantized.codes()[1], round_weight(weight[1], BITS, 32, "clip").codes)
    assert torch.equal(quantized.codes()[0], round_weight(weight[0], BITS, 32, "gptq", x.T @ x).codes)


def test_a_weight_that_is_rounded_already_is_only_packed():
    weight = torch.randn(N, K)
    ready = round_weight(weight + 1.0, BITS, 32, "rtn")
    target = Target("a.weight", owner(weight), "weight", transposed=False)
    quantized, _ = quantize_target(target, BITS, 32, "gptq", [None], per_token=False, rounded=ready)
    assert torch.equal(quantized.dequantize(), ready.dequantize())


@pytest.mark.parametrize(
    ("notes", "experts", "merged"),
    [
        (["", ""], True, ()),
        (["a"], False, ("a",)),
        (["a", "", "a", "b"], True, ("2 of 4 experts [0, 2]: a", "1 of 4 experts [3]: b")),
    ],
)
def test_merge_notes(notes, experts, merged):
    assert merge_notes(notes, experts) == merged
