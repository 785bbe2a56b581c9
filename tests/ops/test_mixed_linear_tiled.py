"""The linear op on tiles: the bits of the plain op from the reference, the stated bound from kernels."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from tests.generators import ORDINARY_IN_FEATURES, WIDTHS, PackedWeight, packed_weight
from tests.ops.linear_oracle import assert_close_on
from torchmix._extension import disable_kernels, kernels_available
from torchmix.ops import (
    mixed_linear,
    mixed_linear_tiled,
    mixed_linear_tiled_quantized,
    quantize_activation,
)
from torchmix.tiles import Tiles, pack_tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BATCHES = (0, 1, 3, 17, 129)
KERNEL_WIDTHS = (3, 4, 5, 6, 8)  # what kernels serve; the references take all widths


def tiles_of(weight: PackedWeight, device: torch.device) -> Tiles:
    return pack_tiles(*weight.inner_on(device), weight.codes.shape[1])


def check(
    weight: PackedWeight, x: Tensor, bias: Tensor | None, per_token: bool, device: torch.device
) -> None:
    """Both ops against float64; on the CPU also against the plain op, to the bit."""
    rows, there = len(weight.codes), None if bias is None else bias.to(device)
    tiles = tiles_of(weight, device)
    y = mixed_linear_tiled(x.to(device), *tiles, there, rows, per_token)
    parts = quantize_activation(x.to(device).flatten(0, -2), 128, per_token)
    separate = mixed_linear_tiled_quantized(*parts, *tiles, there, rows, x.dtype).view(y.shape)
    for found in (y, separate):
        assert found.dtype == x.dtype
        assert found.device.type == device.type
        assert found.is_contiguous()
        assert_close_on(device, found.flatten(0, -2), x.flatten(0, -2), weight, bias, per_token)
    if device.type == "cpu":
        assert torch.equal(y, mixed_linear(x, *weight.inner, bias, 128, per_token))
        assert torch.equal(separate, y)


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("per_token", [False, True])
def test_tokens_and_inputs(tokens: int, in_features: int, per_token: bool, device: torch.device) -> None:
    weight, bias = packed_weight(150, in_features, widths=KERNEL_WIDTHS), torch.randn(150)
    check(weight, torch.randn(tokens, in_features), bias, per_token, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17, 129])
def test_dtypes(
    dtype: torch.dtype, bias_dtype: torch.dtype | None, tokens: int, device: torch.device
) -> None:
    weight = packed_weight(150, 320, widths=KERNEL_WIDTHS)
    bias = None if bias_dtype is None else torch.randn(150).to(bias_dtype)
    check(weight, torch.randn(tokens, 320).to(dtype), bias, False, device)


@pytest.mark.parametrize(
    "widths", [(3,), (4,), (5,), (6,), (8,), (4, 8), (4, 4, 4, 4, 4, 4, 4, 4, 4, 8), (3, 5, 6)]
)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("tokens", [1, 40])
def test_widths_and_rows(widths: tuple[int, ...], rows: int, tokens: int, device: torch.device) -> None:
    weight, bias = packed_weight(rows, 256, widths=widths), torch.randn(rows)
    check(weight, torch.randn(tokens, 256).bfloat16(), bias, False, device)


@pytest.mark.parametrize(
    ("tokens", "rows", "in_features"), [(1, 2048, 2048), (64, 1100, 1088), (600, 520, 1024)]
)
def test_larger_layers(tokens: int, rows: int, in_features: int, device: torch.device) -> None:
    weight = packed_weight(rows, in_features, widths=(*[4] * 9, 8))
    check(weight, torch.randn(tokens, in_features).bfloat16(), None, False, device)


def test_all_widths_on_the_reference() -> None:
    weight = packed_weight(500, 172, widths=WIDTHS)
    check(weight, torch.randn(5, 172), torch.randn(500), False, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 17, 129])
def test_integer_sums_are_exact(tokens: int, device: torch.device) -> None:
    """With scales of one, and one group at a time, the float32 result is the integer itself."""
    weight = packed_weight(200, 512, widths=KERNEL_WIDTHS)
    weight.codes[0], weight.codes[1] = 127, -127
    weight.row_bits[:2], weight.zero_points[:2] = 8, 0
    weight.scale.fill_(1.0)
    codes = torch.randint(-127, 128, (tokens, 512)).to(torch.int8)
    codes[0] = 127
    sums, tiles = codes.view(tokens, 4, 128).sum(-1, dtype=torch.int32), tiles_of(weight, device)
    for g in range(4):
        one_group = torch.zeros(tokens, 4)
        one_group[:, g] = 1.0
        parts = [part.to(device) for part in (codes, one_group, sums)]
        y = mixed_linear_tiled_quantized(*parts, *tiles, None, 200, torch.float32)
        group = slice(128 * g, 128 * (g + 1))
        exact = codes[:, group].double() @ weight.centered[:, group].double().T
        assert torch.equal(y.cpu().double(), exact)


@pytest.mark.parametrize("exponent", [-40, 40])
@pytest.mark.parametrize("tokens", [1, 33])
def test_scales_of_any_size(exponent: int, tokens: int, device: torch.device) -> None:
    weight = packed_weight(150, 320, widths=KERNEL_WIDTHS)
    weight.scale[::2] *= 2.0**exponent
    weight.scale[5] = 0.0
    check(weight, torch.randn(tokens, 320), None, False, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_dimensions_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    weight = packed_weight(70, 140, widths=KERNEL_WIDTHS)
    check(weight, torch.randn(2, 140, 3, dtype=dtype).transpose(1, 2), None, False, device)
    tiles = tiles_of(weight, device)
    x = torch.randn(2, 280, 3, dtype=dtype, device=device).transpose(1, 2)[..., ::2]
    y = mixed_linear_tiled(x, *tiles, None, 70)
    assert torch.equal(y, mixed_linear_tiled(x.contiguous(), *tiles, None, 70))
    assert mixed_linear_tiled(x[0, 0], *tiles, None, 70).shape == (70,)
    assert mixed_linear_tiled(x[:, :0], *tiles, None, 70).shape == (2, 0, 70)


@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_repeated_runs_give_the_same_bits(tokens: int, device: torch.device) -> None:
    weight = packed_weight(700, 1088, widths=KERNEL_WIDTHS)
    tiles, x = tiles_of(weight, device), torch.randn(tokens, 1088).bfloat16().to(device)
    first = mixed_linear_tiled(x, *tiles, None, 700)
    assert all(torch.equal(mixed_linear_tiled(x, *tiles, None, 700), first) for _ in range(5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("tokens", [4, 70])
def test_a_non_finite_token_poisons_its_own_outputs_only(
    bad: float, per_token: bool, tokens: int, device: torch.device
) -> None:
    tiles = tiles_of(packed_weight(70, 300, widths=KERNEL_WIDTHS), device)
    x = torch.randn(tokens, 300, device=device)
    clean = mixed_linear_tiled(x, *tiles, None, 70, per_token)
    x[2, 133] = bad
    y = mixed_linear_tiled(x, *tiles, None, 70, per_token)
    others = [token for token in range(tokens) if token != 2]
    assert y[2].isnan().all()
    assert torch.equal(y[others], clean[others])


def test_a_vanishing_token_gives_the_bias(device: torch.device) -> None:
    tiles = tiles_of(packed_weight(70, 140, widths=KERNEL_WIDTHS), device)
    bias = torch.randn(70, device=device)
    y = mixed_linear_tiled(torch.full((2, 140), 2.0**-101, device=device), *tiles, bias, 70)
    assert torch.equal(y, bias.expand(2, 70))


@pytest.mark.parametrize(("rows", "in_features"), [(70, 129), (70, 257), (69, 128), (71, 128)])
def test_wrong_sizes_are_errors(rows: int, in_features: int) -> None:
    tiles = pack_tiles(*packed_weight(70, 128).inner, 128)
    with pytest.raises(ValueError, match=rf"\({rows}, {in_features}\)"):
        mixed_linear_tiled(torch.randn(2, in_features), *tiles, None, rows)


def test_activations_of_another_group_size_are_errors() -> None:
    tiles = pack_tiles(*packed_weight(70, 128).inner, 128)
    parts = quantize_activation(torch.randn(2, 128), 32)
    with pytest.raises(ValueError, match=r"scales and sums of shape \(2, 1\).*\(2, 4\) and \(2, 4\)"):
        mixed_linear_tiled_quantized(*parts, *tiles, None, 70, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_plain_op(dtype: torch.dtype, device: torch.device) -> None:
    weight = packed_weight(70, 140)
    x = torch.randn(2, 3, 140).to(device, dtype).requires_grad_()
    bias = torch.randn(70, device=device, requires_grad=True)
    grad = torch.randn(2, 3, 70).to(device, dtype)
    plain = mixed_linear(x, *weight.inner_on(device), bias, 128)
    tiled = mixed_linear_tiled(x, *tiles_of(packed_weight(70, 140), device), bias, 70)
    expected = torch.autograd.grad(plain, (x, bias), grad)
    for found, wanted in zip(torch.autograd.grad(tiled, (x, bias), grad), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_backward_through_bias_alone() -> None:
    tiles = pack_tiles(*packed_weight(70, 128).inner, 128)
    bias = torch.zeros(70, requires_grad=True)
    mixed_linear_tiled(torch.randn(3, 128), *tiles, bias, 70).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [3.0] * 70


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(tokens: int, with_bias: bool, device: torch.device) -> None:
    tiles = tiles_of(packed_weight(70, 120, widths=KERNEL_WIDTHS), device)
    x = torch.randn(2, tokens, 120, device=device, requires_grad=True)
    bias = torch.randn(70, device=device, requires_grad=True) if with_bias else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        op = torch.ops.torchmix.mixed_linear_tiled.default
        torch.library.opcheck(op, (x, *tiles, bias, 70, bool(tokens)))
        parts = quantize_activation(x.detach().flatten(0, 1), 128)
        bias = None if bias is None else bias.detach()
        quantized = torch.ops.torchmix.mixed_linear_tiled_quantized.default
        torch.library.opcheck(quantized, (*parts, *tiles, bias, 70, torch.bfloat16))


def test_the_reference_on_request(device: torch.device) -> None:
    """Inside disable_kernels() the tiled op and the plain op are the same on every device, to the bit."""
    weight, bias = packed_weight(150, 320, widths=KERNEL_WIDTHS), torch.randn(150).to(device)
    x = torch.randn(33, 320).bfloat16().to(device)
    with disable_kernels():
        plain = mixed_linear(x, *weight.inner_on(device), bias, 128)
        assert torch.equal(mixed_linear_tiled(x, *tiles_of(weight, device), bias, 150), plain)


@pytest.mark.skipif(not (kernels_available("cuda") and torch.cuda.is_available()), reason="no CUDA kernels")
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_kernels_can_be_captured(tokens: int) -> None:
    """A CUDA graph on a side stream, replayed with other activations."""
    tiles = tiles_of(packed_weight(700, 1088, widths=KERNEL_WIDTHS), torch.device("cuda"))
    x, other = torch.randn(2, tokens, 1088).bfloat16().cuda()
    expected = mixed_linear_tiled(other, *tiles, None, 700)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mixed_linear_tiled(x, *tiles, None, 700)
    x.copy_(other)
    graph.replay()
    assert torch.equal(y, expected)
