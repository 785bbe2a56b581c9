"""The algorithm is chosen by name; a Hessian reaches it."""

from __future__ import annotations

import pytest
import torch

from tests.generators import correlated_inputs, row_bits
from torchmix.rounding import (
    ROUNDING_METHODS,
    RoundedWeight,
    clip_round,
    gptq_round,
    hqq_round,
    round_weight,
    rtn_round,
)


def same(a: RoundedWeight, b: RoundedWeight) -> bool:
    return (a.method, a.note) == (b.method, b.note) and torch.equal(a.dequantize(), b.dequantize())


def test_each_name_is_its_algorithm() -> None:
    weight, bits, x = torch.randn(7, 40), row_bits(7), correlated_inputs(60, 40)
    hessian = 2 / 60 * x.T @ x
    assert same(round_weight(weight, bits, 16, "rtn", hessian), rtn_round(weight, bits, 16))
    assert same(round_weight(weight, bits, 16, "clip"), clip_round(weight, bits, 16))
    assert same(round_weight(weight, bits, 16, "clip", hessian), clip_round(weight, bits, 16, hessian))
    assert same(round_weight(weight, bits, 16, "gptq", hessian), gptq_round(weight, bits, 16, hessian))
    assert same(round_weight(weight, bits, 16, "hqq"), hqq_round(weight, bits, 16))
    assert [round_weight(weight, bits, 16, name, hessian).method for name in ROUNDING_METHODS] == [
        *ROUNDING_METHODS
    ]


def test_wrong_names_and_a_missing_hessian() -> None:
    weight, bits = torch.randn(7, 40), row_bits(7)
    with pytest.raises(ValueError, match=r"rounding='awq' is not known.*'clip'"):
        round_weight(weight, bits, 16, "awq")
    with pytest.raises(ValueError, match=r"needs Hessians.*hessians=True"):
        round_weight(weight, bits, 16, "gptq")
