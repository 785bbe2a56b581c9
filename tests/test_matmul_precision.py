"""The setting holds inside only, and products stay within what ten bits of mantissa allow."""

from __future__ import annotations

import pytest
import torch

from torchmix.matmul_precision import token_sums


def precision() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_setting_from_before_comes_back(dtype):
    before = precision()

    @token_sums(dtype)
    def fail():
        assert precision() == "tf32"
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert precision() == before


def test_float32_models_keep_their_setting():
    before = precision()
    with token_sums(torch.float32):
        assert precision() == before


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_a_gram_matrix_stays_close(device):
    """Each operand is off by 2^-10 of itself at most (cut off), so a product by 2^-9 of the product of magnitudes."""
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(device)
    with token_sums(torch.bfloat16):
        found = x.T @ x
    exact, magnitudes = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    assert ((found - exact).abs() <= 1.01 * 2**-9 * magnitudes).all()
