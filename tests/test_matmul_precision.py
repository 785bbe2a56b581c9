"""The setting holds inside only, and products stay within what ten bits of mantissa allow."""

from __future__ import annotations

import pytest
import torch

from torchmix.matmul_precision import tf32_products


def test_the_setting_from_before_comes_back():
    before = torch.backends.cuda.matmul.fp32_precision

    @tf32_products()
    def fail():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_a_gram_matrix_stays_close(device):
    """Each operand is off by 2^-11 of itself at most, so a product by 2^-10 of the product of magnitudes."""
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(device)
    with tf32_products():
        found = x.T @ x
    exact, magnitudes = x.double().T @ x.double(), x.double().abs().T @ x.double().abs()
    assert ((found - exact).abs() <= 1.01 * 2**-10 * magnitudes).all()
