"""SQNR against its definition and at its edges."""

from __future__ import annotations

import math

import pytest
import torch

from torchmix.evaluation import sqnr_db


def test_known_value():
    reference = torch.tensor([3.0, 4.0])
    assert sqnr_db(reference, reference + torch.tensor([0.3, 0.4])) == pytest.approx(20.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_is_computed_in_float64(dtype):
    torch.manual_seed(0)
    reference = torch.randn(7, 33).to(dtype)
    noisy = (reference + 0.1 * torch.randn(7, 33)).to(dtype)
    signal, noise = reference.double(), reference.double() - noisy.double()
    assert sqnr_db(reference, noisy) == pytest.approx(
        10 * math.log10(signal.pow(2).sum() / noise.pow(2).sum()), abs=1e-9
    )


def test_edges():
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert sqnr_db(ones, ones) == math.inf
    assert sqnr_db(zeros, zeros) == math.inf
    assert sqnr_db(zeros, ones) == -math.inf
    assert math.isnan(sqnr_db(ones, torch.tensor([1.0, math.nan, 1.0])))
    assert math.isnan(sqnr_db(zeros, torch.tensor([1.0, math.nan, 1.0])))
    assert math.isnan(sqnr_db(torch.tensor([1.0, math.nan, 1.0]), ones))


def test_gradients_do_not_matter():
    weight = torch.ones(4, requires_grad=True)
    assert sqnr_db(weight, weight * 0.9) == pytest.approx(20.0, abs=1e-4)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        sqnr_db(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"at least one element.*\(0, 3\)"):
        sqnr_db(torch.ones(0, 3), torch.ones(0, 3))
