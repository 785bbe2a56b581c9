"""The linear op on prepared activations: the bits of the tiled op from the reference, the stated bound from kernels."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from tests.generators import ORDINARY_IN_FEATURES, WIDTHS, PackedWeight, packed_weight
from tests.ops.linear_oracle import assert_close_on
from tests.ops.test_mixed_linear_tiled import BATCHES, DTYPES, KERNEL_WIDTHS, tiles_of
from torchmix._extension import disable_kernels
from torchmix.ops import mixed_linear_tiled, mixed_linear_tiled_prepared, prepare_activation
from torchmix.tiles import pack_tiles


def check(
    weight: PackedWeight, x: Tensor, bias: Tensor | None, per_token: bool, device: torch.device
) -> None:
    """Against float64; on the CPU also against the tiled op, to the bit."""
    rows, there = len(weight.codes), None if bias is None else bias.to(device)
    tiles = tiles_of(weight, device)
    prepared = prepare_activation(x.to(device), per_token)
    y = mixed_linear_tiled_prepared(prepared, *x.shape, *tiles, there, rows, x.dtype)
    assert y.dtype == x.dtype
    assert y.device.type == device.type
    assert y.is_contiguous()
    assert_close_on(device, y, x, weight, bias, per_token)
    if device.type == "cpu":
        assert torch.equal(y, mixed_linear_tiled(x, *tiles, bias, rows, per_token))


@pytest.mark.parametrize("in_features", ORDINARY_IN_FEATURES)
@pytest.mark.parametrize("tokens", BATCHES)
@pytest.mark.parametrize("per_token", [False, True])
def test_tokens_and_inputs(tokens: int, in_features: int, per_token: bool, device: torch.device) -> None:
    weight, bias = packed_weight(150, in_features, widths=KERNEL_WIDTHS), torch.randn(150)
    check(weight, torch.randn(tokens, in_features), bias, per_token, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, bias_dtype: torch.dtype | None, device: torch.device) -> None:
    weight = packed_weight(150, 320, widths=KERNEL_WIDTHS)
    bias = None if bias_dtype is None else torch.randn(150).to(bias_dtype)
    check(weight, torch.randn(17, 320).to(dtype), bias, False, device)


@pytest.mark.parametrize(("tokens", "rows", "in_features"), [(1, 1100, 2176), (600, 520, 1024)])
def test_larger_layers(tokens: int, rows: int, in_features: int, device: torch.device) -> None:
    weight = packed_weight(rows, in_features, widths=(*[4] * 9, 8))
    check(weight, torch.randn(tokens, in_features).bfloat16(), None, False, device)


def test_all_widths_on_the_reference() -> None:
    weight = packed_weight(500, 172, widths=WIDTHS)
    check(weight, torch.randn(5, 172), torch.randn(500), False, torch.device("cpu"))


def test_layers_share_their_activations(device: torch.device) -> None:
    x = torch.randn(9, 320).bfloat16()
    prepared = prepare_activation(x.to(device))
    before = prepared.clone()
    for rows in (70, 300):
        weight = packed_weight(rows, 320, widths=KERNEL_WIDTHS, seed=rows)
        tiles = tiles_of(weight, device)
        y = mixed_linear_tiled_prepared(prepared, 9, 320, *tiles, None, rows, torch.float32)
        assert_close_on(device, y, x, weight, None, False)
    assert torch.equal(prepared, before)


@pytest.mark.parametrize(
    ("tokens", "in_features", "rows", "message"),
    [
        (17, 128, 70, r"17 tokens of 128 inputs take \d+"),
        (2, 129, 70, r"2 tokens of 129 inputs take \d+"),
        (2, 128, 69, r"\(69, 128\) need"),
    ],
)
def test_wrong_sizes_are_errors(tokens: int, in_features: int, rows: int, message: str) -> None:
    tiles = pack_tiles(*packed_weight(70, 128).inner, 128)
    prepared = prepare_activation(torch.randn(2, 128))
    with pytest.raises(ValueError, match=message):
        mixed_linear_tiled_prepared(prepared, tokens, in_features, *tiles, None, rows, torch.float32)


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(tokens: int, with_bias: bool, device: torch.device) -> None:
    tiles = tiles_of(packed_weight(70, 120, widths=KERNEL_WIDTHS), device)
    prepared = prepare_activation(torch.randn(tokens, 120, device=device))
    bias = torch.randn(70, device=device) if with_bias else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        op = torch.ops.torchmix.mixed_linear_tiled_prepared.default
        torch.library.opcheck(op, (prepared, tokens, 120, *tiles, bias, 70, torch.bfloat16))


def test_any_number_of_tokens_in_one_graph() -> None:
    tiles = pack_tiles(*packed_weight(70, 200).inner, 200)

    def layer(x: Tensor) -> Tensor:
        prepared = prepare_activation(x)
        return mixed_linear_tiled_prepared(prepared, *x.shape, *tiles, None, 70, x.dtype)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 16, 40):
        x = torch.randn(tokens, 200)
        assert torch.equal(compiled(x), layer(x))


def test_the_reference_on_request(device: torch.device) -> None:
    """Inside disable_kernels() it gives the bits of the tiled op on every device."""
    tiles = tiles_of(packed_weight(150, 320, widths=KERNEL_WIDTHS), device)
    bias, x = torch.randn(150).to(device), torch.randn(33, 320).bfloat16().to(device)
    with disable_kernels():
        prepared = prepare_activation(x)
        y = mixed_linear_tiled_prepared(prepared, 33, 320, *tiles, bias, 150, torch.bfloat16)
        assert torch.equal(y, mixed_linear_tiled(x, *tiles, bias, 150))
