"""The linear op against an oracle in int64 and float64 that shares no code with it."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.generators import ORDINARY_IN_FEATURES, packed_weight
from tests.ops.linear_oracle import assert_close, oracle
from torchmix.ops import mixed_linear, mixed_linear_quantized, quantize_activation
from torchmix.ops.mixed_linear import integer_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (0, 1, 3, 17, 129)


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("per_token", [False, True])
def test_against_the_oracle(tokens: int, in_features: int, per_token: bool, device: torch.device) -> None:
    weight, bias, x = packed_weight(23, in_features), torch.randn(23), torch.randn(tokens, in_features)
    y = mixed_linear(x.to(device), *weight.inner_on(device), bias.to(device), 128, per_token)
    assert_close(y.cpu(), x, weight, bias, per_token)


@given(
    st.integers(0, 5),
    st.integers(1, 20),
    st.integers(1, 70),
    st.sampled_from([8, 16, 64, 128]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.integers(0, 100),
)
@settings(max_examples=60)
def test_any_shape(
    tokens: int, rows: int, in_features: int, size: int, with_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    weight = packed_weight(rows, in_features, size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
    y = mixed_linear(x, *weight.inner, bias, size)
    assert y.dtype == dtype
    assert_close(y, x, weight, bias, False)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("group_size", [8, 128, 512])
def test_integer_sums_are_exact(group_size: int, precision: str, device: torch.device) -> None:
    """With scales of one, and one group at a time, the float32 result is the integer itself: for random codes
    and for the largest possible ones, also where PyTorch may multiply in bfloat16 (codes fit its 8 bits)."""
    weight = packed_weight(30, 512, group_size)
    weight.codes[0], weight.codes[1] = 127, -127
    weight.row_bits[:2], weight.zero_points[:2] = 8, 0
    weight.scale.fill_(1.0)
    codes = torch.randint(-127, 128, (9, 512)).to(torch.int8)
    codes[0], codes[1] = 127, -127
    groups = 512 // group_size
    sums = codes.view(9, groups, group_size).sum(-1, dtype=torch.int32)
    inner, quantized = weight.inner_on(device), (codes.to(device), sums.to(device))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        for g in range(groups):
            one_group = torch.zeros(9, groups, device=device)
            one_group[:, g] = 1.0
            y = mixed_linear_quantized(
                quantized[0], one_group, quantized[1], *inner, None, group_size, torch.float32
            )
            part = slice(g * group_size, (g + 1) * group_size)
            assert torch.equal(y.cpu().long(), codes[:, part].long() @ weight.centered[:, part].T)
    finally:
        torch.set_float32_matmul_precision(before)


def test_zero_points_can_be_taken_into_account_by_the_group_sums() -> None:
    """dot(x, code - zero_point) = dot(x, code) - zero_point * group_sum: what kernels compute."""
    weight = packed_weight(23, 172, 16)
    codes, _, group_sum = quantize_activation(torch.randn(7, 172), 16)
    for g, start in enumerate(range(0, 172, 16)):
        part = slice(start, min(start + 16, 172))
        raw = codes[:, part].long() @ weight.codes[:, part].long().T
        corrected = raw - weight.zero_points[:, g].long() * group_sum[:, g, None].long()
        assert torch.equal(corrected, codes[:, part].long() @ weight.centered[:, part].T)


def test_scales_act_per_group() -> None:
    """Hand calculation with two groups: 3 * 0.5 * 2 + (-4) * 0.25 * 8 = -5."""
    codes = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0]], dtype=torch.int8)
    centered = torch.tensor([[[1.0] * 8, [-1.0] * 8]])
    scale, activation_scale = torch.tensor([[0.5, 0.25]]), torch.tensor([[2.0, 8.0]])
    assert integer_linear(codes, activation_scale, centered, scale).tolist() == [[-5.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_dimensions_dtypes_and_strides(dtype: torch.dtype) -> None:
    weight = packed_weight(11, 40, 16)
    x = torch.randn(2, 40, 3, dtype=dtype).transpose(1, 2)  # (2, 3, 40), not contiguous
    y = mixed_linear(x, *weight.inner, None, 16)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 11)
    assert y.is_contiguous()
    assert torch.equal(y.view(6, 11), mixed_linear(x.reshape(6, 40), *weight.inner, None, 16))
    one = mixed_linear(x[0, 0], *weight.inner, None, 16)
    assert one.shape == (11,)
    assert torch.equal(one, y[0, 0])
    assert mixed_linear(x[:, :0], *weight.inner, None, 16).shape == (2, 0, 11)


def test_tokens_do_not_see_one_another() -> None:
    weight, x = packed_weight(11, 40, 16), torch.randn(5, 40)
    y = mixed_linear(x, *weight.inner, None, 16)
    for token in range(5):
        alone = mixed_linear(x[token : token + 1], *weight.inner, None, 16)
        assert torch.equal(alone[0], y[token])


def test_the_two_ops_agree_to_the_bit() -> None:
    weight, x, bias = packed_weight(11, 40, 16), torch.randn(5, 40).bfloat16(), torch.randn(11)
    parts = quantize_activation(x, 16)
    separate = mixed_linear_quantized(*parts, *weight.inner, bias, 16, torch.bfloat16)
    assert torch.equal(separate, mixed_linear(x, *weight.inner, bias, 16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_non_finite_token_poisons_its_own_outputs_only(bad: float, per_token: bool) -> None:
    weight, x = packed_weight(11, 40, 16), torch.randn(4, 40)
    clean = mixed_linear(x, *weight.inner, None, 16, per_token)
    x[2, 33] = bad
    y = mixed_linear(x, *weight.inner, None, 16, per_token)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_a_vanishing_token_gives_the_bias() -> None:
    weight, bias = packed_weight(11, 40, 16), torch.randn(11)
    y = mixed_linear(torch.full((2, 40), 2.0**-101), *weight.inner, bias, 16)
    assert torch.equal(y, bias.expand(2, 11))


@pytest.mark.parametrize("in_features", [64, 130, 180, 300])
def test_wrong_input_size_is_an_error(in_features: int) -> None:
    """Also where the number of groups happens to fit (130 and 180 inputs, two groups like 172)."""
    weight = packed_weight(11, 172)
    with pytest.raises(ValueError, match=str(in_features)):
        mixed_linear(torch.randn(2, in_features), *weight.inner, None, 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dense_layer(dtype: torch.dtype) -> None:
    """Straight-through: dL/dx = dL/dy W and dL/dbias = sum of dL/dy, whatever the activation quantizer does."""
    weight = packed_weight(11, 40, 16)
    x = torch.randn(2, 3, 40).to(dtype).requires_grad_()
    bias = torch.randn(11, requires_grad=True)
    grad = torch.randn(2, 3, 11).to(dtype)
    mixed_linear(x, *weight.inner, bias, 16).backward(grad)
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.dtype == dtype
    assert bias.grad.dtype == torch.float32
    expected = grad.double() @ weight.dense
    magnitude = grad.double().abs() @ weight.dense.abs()  # 11 products, each with a rounded weight
    assert bool(((x.grad.double() - expected).abs() <= 12 * torch.finfo(dtype).eps * magnitude).all())
    sums = grad.double().flatten(0, 1)
    assert bool(((bias.grad - sums.sum(0)).abs() <= 6 * torch.finfo(dtype).eps * sums.abs().sum(0)).all())


def test_backward_through_bias_alone() -> None:
    weight, bias = packed_weight(11, 40, 16), torch.zeros(11, requires_grad=True)
    mixed_linear(torch.randn(3, 40), *weight.inner, bias, 16).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [3.0] * 11


def test_large_float16_results_overflow_like_a_linear_layer() -> None:
    """The sum is taken in float32: only the result is rounded to float16."""
    weight, x = packed_weight(11, 40, 16), torch.full((1, 40), 60000.0, dtype=torch.float16)
    y = mixed_linear(x, *weight.inner, None, 16)
    expected, _ = oracle(x, weight, None, False)
    assert torch.equal(y.isinf(), expected.abs() > 65520)
    assert not y.isnan().any()


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(tokens: int, with_bias: bool) -> None:
    weight = packed_weight(11, 20, 8)
    x = torch.randn(2, tokens, 20, requires_grad=True)
    bias = torch.randn(11, requires_grad=True) if with_bias else None
    op = torch.ops.torchmix.mixed_linear.default
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        torch.library.opcheck(op, (x, *weight.inner, bias, 8, bool(tokens)))
        parts = quantize_activation(x.detach().flatten(0, 1), 8)
        bias = None if bias is None else bias.detach()
        quantized = torch.ops.torchmix.mixed_linear_quantized.default
        torch.library.opcheck(quantized, (*parts, *weight.inner, bias, 8, torch.bfloat16))


def test_sum_of_products_bound_is_not_vacuous() -> None:
    """The oracle's magnitude is of the size of the result, so the bound above means about seven digits."""
    weight, x = packed_weight(23, 880), torch.randn(17, 880)
    expected, magnitude = oracle(x, weight, None, False)
    assert float(magnitude.mean() / expected.abs().mean()) < math.sqrt(weight.scale.shape[1]) * 2
