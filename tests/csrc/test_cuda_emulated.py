"""The logic of the CUDA kernels without a GPU: on the machine of ``emulator/``, against the references.

Products have the bound of every kernel (tests/ops/linear_oracle.py), quantization is exact, and the order in which
threads run and copies are done changes no bit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.csrc import emulated_cuda
from tests.csrc.emulated_cuda import ARCHITECTURES, PIECES, Hopper, Stream, choose_stream, why_unavailable
from tests.generators import packed_weight
from tests.ops.linear_oracle import assert_close_to_exact, assert_close_with_offsets
from torchmix.ops import prepare_activation, quantize_activation
from torchmix.tiles import pack_tiles

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

MIXED, EIGHT, NARROW, ORDINARY = (3, 4, 5, 6, 8), (8,), (3, 4), (*[4] * 9, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 3


def check(
    shape: tuple[int, int, int],
    how: Stream | Hopper,
    widths: tuple[int, ...] = MIXED,
    dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    quantize: bool = False,
    per_token: bool = False,
    seeds: int = SEEDS,
) -> None:
    """A product of (M, N, K) within the bound, the same by all seeds. quantize: from x, not from its codes."""
    tokens, rows, inputs = shape
    weight = packed_weight(rows, inputs, widths=widths, seed=how.seed)
    x = torch.randn(tokens, inputs).to(dtype)
    activation = x if quantize else quantize_activation(x, 128, per_token)
    tiles = pack_tiles(*weight.inner, inputs)
    results = [
        emulated_cuda.linear(activation, tiles, rows, bias, dtype, replace(how, seed=how.seed + 100 * i))
        for i in range(seeds)
    ]
    assert_close = assert_close_with_offsets if isinstance(how, Hopper) else assert_close_to_exact
    assert_close(results[0], x, weight, bias, per_token)
    assert all(torch.equal(result, results[0]) for result in results[1:])


# --- stream_kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("inputs", [128, 172, 256, 640])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("quantize", [False, True])
def test_tokens_and_inputs(tokens: int, inputs: int, quantize: bool, arch: int) -> None:
    check((tokens, 200, inputs), Stream(blocks=2, arch=arch), quantize=quantize)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("widths", [MIXED, EIGHT, NARROW])
def test_rows_and_widths(rows: int, widths: tuple[int, ...], arch: int) -> None:
    check((2, rows, 256), Stream(blocks=2, slots=9, arch=arch), widths)


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize("tokens", [7, 14])
def test_many_tiles(blocks: int, tokens: int) -> None:
    """The ring wraps around many times, and a block has several tiles, or none."""
    check((tokens, 500, 640), Stream(tokens, 4, blocks), quantize=True)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4, 5, 7, 40])
@pytest.mark.parametrize("widths", [ORDINARY, MIXED])
def test_every_tile_is_read_once(blocks: int, widths: tuple[int, ...]) -> None:
    """More tiles than blocks, wide ones and narrow ones; the driver counts the bytes that are copied."""
    check((1, 1400, 128), Stream(blocks=blocks), widths, seeds=1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tokens", "together"), [(9, 9), (16, 16), (17, 9), (17, 17), (33, 11), (33, 32)])
def test_several_token_tiles(tokens: int, together: int, arch: int) -> None:
    check((tokens, 130, 300), Stream(together, 4, 1, arch=arch))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
@pytest.mark.parametrize("how", [Stream(blocks=2), Hopper(clusters=3)])
def test_dtypes_and_bias(dtype: torch.dtype, bias_dtype: torch.dtype | None, how: Stream | Hopper) -> None:
    bias = None if bias_dtype is None else torch.randn(100).to(bias_dtype)
    check((3, 100, 256), how, dtype=dtype, bias=bias, quantize=True, seeds=2)


@pytest.mark.parametrize("how", [Stream(), Hopper()])
def test_rows_of_x_with_a_stride(how: Stream | Hopper) -> None:
    weight, x = packed_weight(70, 256, widths=MIXED), torch.randn(3, 300)[:, :256]
    y = emulated_cuda.linear(x, pack_tiles(*weight.inner, 256), 70, how=how)
    assert_close = assert_close_with_offsets if isinstance(how, Hopper) else assert_close_to_exact
    assert_close(y, x, weight, None, False)


@pytest.mark.parametrize("tokens", [1, 8, 16, 20])
@pytest.mark.parametrize("inputs", [128, 640])
def test_launches_that_are_chosen(tokens: int, inputs: int) -> None:
    """What the host would launch on a device of few multiprocessors."""
    choice = choose_stream(tokens, -(-inputs // 128), 166912)
    check((tokens, 330, inputs), Stream(choice.tokens, choice.slots, 6, arch=800), quantize=tokens <= 16)


@pytest.mark.parametrize("how", [Stream(7), Stream(28), Hopper(32)])
def test_a_scale_for_a_whole_token(how: Stream | Hopper) -> None:
    check((28, 100, 300), how, per_token=True)


@pytest.mark.parametrize("widths", [EIGHT, NARROW])
def test_lanes_that_go_apart(widths: tuple[int, ...]) -> None:
    """Nothing but the kernel's own barriers keeps lanes of a warp together."""
    check((1, 300, 640), Stream(lanes_apart=True), widths, quantize=True, seeds=40)
    check((1, 300, 300), Stream(arch=800, lanes_apart=True), widths, quantize=True, seeds=40)
    check((2, 200, 640), Hopper(clusters=3, lanes_apart=True), widths, seeds=20)


# --- hopper_kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("inputs", [1, 128, 172, 1100, 2200])
@pytest.mark.parametrize("clusters", [1, 3])
def test_pieces_of_tokens(inputs: int, clusters: int, piece: int) -> None:
    """More inputs than one chunk of 16 groups, pieces of tokens that are not full, stages that come around."""
    tokens = {8: 5, 128: 150}.get(piece, piece + 3)
    check((tokens, 200, inputs), Hopper(piece, clusters), seeds=2)


@pytest.mark.parametrize("widths", [MIXED, EIGHT, NARROW, ORDINARY])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (33, 65), (64, 64), (70, 130), (150, 40)])
def test_rows_of_many_tokens(tokens: int, rows: int, widths: tuple[int, ...]) -> None:
    check((tokens, rows, 300), Hopper(64, 3), widths, torch.bfloat16, torch.randn(rows), seeds=2)


@pytest.mark.parametrize("piece", [8, 16, 64])
@pytest.mark.parametrize("clusters", [1, 2, 3, 5, 7, 13])
@pytest.mark.parametrize("early", [False, True])
def test_pieces_that_blocks_share(early: bool, clusters: int, piece: int) -> None:
    """Blocks begin and end anywhere in a piece, also within a chunk of 16 groups, and share it with many others."""
    check((8, 400, 2560), Hopper(piece, clusters, early=early), ORDINARY, seeds=2)
    check((8, 100, 2560), Hopper(piece, clusters, 0, early), ORDINARY, seeds=2)


@pytest.mark.parametrize("piece", [8, 128])
def test_scales_of_any_size(piece: int) -> None:
    """Scales that the fast units do not hold, and tokens near both ends of float32."""
    weight = packed_weight(70, 300, widths=MIXED)
    scale = weight.scale.clone()
    scale[::3], scale[1::7] = scale[::3] * 2.0**40, scale[1::7] * 2.0**-95
    weight = replace(weight, scale=scale)
    x = torch.randn(8, 300)
    x[3], x[5], x[7, 128:] = x[3] * 2.0**60, x[5] * 2.0**-20, x[7, 128:] * 2.0**-40
    y = emulated_cuda.linear(x, pack_tiles(*weight.inner, 300), 70, how=Hopper(piece))
    assert_close_with_offsets(y, x, weight, None, False)


def test_values_that_are_not_finite() -> None:
    """NaN in all outputs of their tokens and of no others."""
    weight, x = packed_weight(70, 300, widths=MIXED), torch.randn(40, 300)
    x[3, 7], x[4, 299], x[5] = torch.nan, torch.inf, 0.0
    y = emulated_cuda.linear(x, pack_tiles(*weight.inner, 300), 70, how=Hopper(64))
    assert y[3:5].isnan().all()
    assert (y[5] == 0).all()
    x, y = torch.cat([x[:3], x[6:]]), torch.cat([y[:3], y[6:]])
    assert_close_with_offsets(y, x, weight, None, False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_random_problems(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=draw))]

    rows, widths = one_of(1, 63, 64, 65, 200, 500), (MIXED, EIGHT, NARROW, ORDINARY)[one_of(0, 1, 2, 3)]
    if one_of(0, 1, 1):
        piece = one_of(*PIECES)
        tokens = one_of(1, 5, 8) if piece == 8 else one_of(1, 7, 16, 17, 33, 65, 130)
        how: Stream | Hopper = Hopper(piece, one_of(1, 2, 3, 5, 8), one_of(0, 1), bool(one_of(0, 1)), seed)
        check((tokens, rows, one_of(1, 64, 129, 512, 640, 2300)), how, widths, seeds=2)
        return
    together, arch = one_of(1, 3, 8, 12, 16, 32), one_of(*ARCHITECTURES)
    how = Stream(together, one_of(4, 5), one_of(1, 2, 3, 5), seed, arch)
    tokens, inputs = one_of(1, 2, 7, 8, 15, 16, 17, 33, 65), one_of(1, 64, 129, 172)
    check((tokens, rows, inputs), how, widths, quantize=together <= 16)


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 100, 128, 172, 2200])
def test_prepared_activations_are_exact(dtype: torch.dtype, inputs: int, arch: int) -> None:
    """Padding and all, from x and from its codes."""
    x = torch.randn(19, inputs).to(dtype)
    x[5] = 0.0
    expected = prepare_activation(x)
    assert torch.equal(emulated_cuda.prepare(x, arch=arch), expected)
    assert torch.equal(emulated_cuda.prepare(quantize_activation(x, 128), arch=arch), expected)
    per_token = quantize_activation(x, 128, True)
    assert torch.equal(emulated_cuda.prepare(per_token, arch=arch), prepare_activation(x, True))


def check_quantization(x: Tensor, group_size: int = 128, per_token: bool = False, arch: int = 900) -> None:
    expected = quantize_activation(x, group_size, per_token)
    for seed in range(2):
        found = emulated_cuda.quantize(x, group_size, per_token, seed, arch)
        for part, wanted in zip(found, expected, strict=True):
            assert part.dtype == wanted.dtype
            torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 100, 128, 172, 640])
@pytest.mark.parametrize(("group_size", "per_token"), [(128, False), (128, True), (64, False), (32, True)])
def test_quantization_is_exact(
    dtype: torch.dtype, inputs: int, group_size: int, per_token: bool, arch: int
) -> None:
    check_quantization(torch.randn(5, inputs).to(dtype), group_size, per_token, arch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
def test_quantization_of_special_values(dtype: torch.dtype, per_token: bool) -> None:
    values = (0.0, -0.0, 1e-40, 2.0**-101, 2.0**-100, 1e-30, 65504.0, 3e38, torch.inf, -torch.inf, torch.nan)
    x = torch.randn(3 * len(values), 256)
    for i, value in enumerate(values):
        x[3 * i] = value  # all of a token, one group, one value
        x[3 * i + 1, :128] = value
        x[3 * i + 2, 200] = value
    check_quantization(x.to(dtype), 128, per_token)


def test_quantization_rounds_half_to_even() -> None:
    x = torch.arange(-127, 129).view(1, 256) / 2
    x[:, 0], x[:, 128] = 127.0, -127.0
    check_quantization(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantization_of_rows_with_a_stride(dtype: torch.dtype) -> None:
    check_quantization(torch.randn(4, 300).to(dtype)[:, :256])
    check_quantization(torch.randn(4, 288).to(dtype)[:, :256])
    check_quantization(torch.randn(40, 384).to(dtype))
