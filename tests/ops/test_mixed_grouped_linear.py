"""One linear layer per expert: equal to the plain op on every expert's tokens."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from tests.generators import PackedWeight, packed_weight
from torchmix.ops import mixed_grouped_linear, mixed_linear

ENDS = {
    "all experts": [2, 5, 9],
    "empty first": [0, 5, 9],
    "empty middle": [4, 4, 9],
    "empty last": [4, 9, 9],
    "rows beyond the last": [1, 3, 6],
    "no rows": [0, 0, 0],
}


def experts(count: int = 3, in_features: int = 20) -> tuple[list[PackedWeight], tuple[Tensor, ...]]:
    """Experts of 7 rows, groups of 8, and their joint inner tensors."""
    weights = [packed_weight(7, in_features, 8, seed=seed) for seed in range(count)]
    qdata, scale, zero_point, bits = zip(*(weight.inner for weight in weights), strict=True)
    return weights, (torch.cat(qdata), torch.stack(scale), torch.cat(zero_point), torch.stack(bits))


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("per_token", [False, True])
def test_each_expert_sees_its_rows(ends: list[int], offsets_dtype: torch.dtype, per_token: bool) -> None:
    weights, inner = experts()
    x = torch.randn(9, 20).bfloat16()
    y = mixed_grouped_linear(x, torch.tensor(ends, dtype=offsets_dtype), *inner, 8, per_token)
    expected = torch.zeros(9, 7, dtype=torch.bfloat16)
    for weight, start, end in zip(weights, [0, *ends[:-1]], ends, strict=True):
        expected[start:end] = mixed_linear(x[start:end], *weight.inner, None, 8, per_token)
    assert torch.equal(y, expected)


def test_no_tokens_at_all() -> None:
    _, inner = experts()
    y = mixed_grouped_linear(torch.empty(0, 20), torch.zeros(3, dtype=torch.int32), *inner, 8)
    assert y.shape == (0, 7)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS.keys())
def test_gradients_are_those_of_dense_experts(ends: list[int]) -> None:
    """dL/dx = dL/dy W of the row's expert, zero for rows of no expert."""
    weights, inner = experts()
    x = torch.randn(9, 20, requires_grad=True)
    grad = torch.randn(9, 7)
    mixed_grouped_linear(x, torch.tensor(ends), *inner, 8).backward(grad)
    expected, magnitude = torch.zeros(9, 20, dtype=torch.float64), torch.zeros(9, 20, dtype=torch.float64)
    for weight, start, end in zip(weights, [0, *ends[:-1]], ends, strict=True):
        expected[start:end] = grad[start:end].double() @ weight.dense
        magnitude[start:end] = grad[start:end].double().abs() @ weight.dense.abs()
    assert x.grad is not None
    assert bool(((x.grad - expected).abs() <= 8 * 2.0**-24 * magnitude).all())  # 7 products in float32


def test_a_non_finite_token_poisons_its_own_outputs_only() -> None:
    _, inner = experts()
    x, ends = torch.randn(9, 20), torch.tensor([2, 5, 9])
    clean = mixed_grouped_linear(x, ends, *inner, 8)
    x[3, 1] = float("nan")
    y = mixed_grouped_linear(x, ends, *inner, 8)
    others = [token for token in range(9) if token != 3]
    assert y[3].isnan().all()
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("in_features", [12, 30])
def test_wrong_input_size_is_an_error(in_features: int) -> None:
    _, inner = experts()
    with pytest.raises(ValueError, match=str(in_features)):
        mixed_grouped_linear(torch.randn(9, in_features), torch.tensor([2, 5, 9]), *inner, 8)


def test_opcheck() -> None:
    _, inner = experts()
    x, ends = torch.randn(9, 20, requires_grad=True), torch.tensor([2, 2, 7], dtype=torch.int32)
    ops = torch.ops.torchmix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        torch.library.opcheck(ops.mixed_grouped_linear.default, (x, ends, *inner, 8, True))
        backward = (torch.randn(9, 7), ends, *inner, 20, 8)
        torch.library.opcheck(ops.mixed_grouped_linear_backward.default, backward)
