"""Compiled CPU kernels: each implementation against the references, whatever the sizes, threads and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, multiprocessing

from tests.generators import WIDTHS, PackedWeight, packed_weight
from tests.ops.cpu_kernels import CAPABILITIES, forced, needs_cpu_kernels, supported
from tests.ops.linear_oracle import assert_close_to_exact
from tests.ops.test_quantize_activation import awkward_tokens
from torchmix._extension import cpu_capability, disable_kernels
from torchmix.ops import mixed_linear, mixed_linear_quantized, quantize_activation

pytestmark = needs_cpu_kernels
TOKENS = (1, 2, 3, 4, 5, 9, 12, 13, 37)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation that this processor can run."""
    with forced(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def integers_of(weight: PackedWeight, codes: Tensor, sums: Tensor, group_size: int) -> list[Tensor]:
    """The integer sum of every group: with scales of one, and one group at a time, the result is that integer."""
    groups, inner = sums.shape[1], weight.inner
    one_group = torch.zeros(groups, len(codes), groups)
    for g in range(groups):
        one_group[g, :, g] = 1.0
    parts = (codes, sums)
    return [
        mixed_linear_quantized(parts[0], scale, parts[1], *inner, None, group_size, torch.float32)
        for scale in one_group
    ]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("in_features, group_size", [(512, 128), (300, 40), (880, 512)])
def test_integers_are_exact(capability: str, tokens: int, in_features: int, group_size: int) -> None:
    weight = packed_weight(61, in_features, group_size)
    weight.codes[0], weight.codes[1] = 127, -127  # the largest sums there can be
    weight.row_bits[:2], weight.zero_points[:2] = 8, 0
    weight.scale.fill_(1.0)
    codes = torch.randint(-127, 128, (tokens, in_features)).to(torch.int8)
    codes[0] = 127
    codes[-1] = -127
    groups = -(-in_features // group_size)
    padded = torch.nn.functional.pad(codes, (0, groups * group_size - in_features))
    sums = padded.view(tokens, groups, group_size).sum(-1, dtype=torch.int32)
    for g, found in enumerate(integers_of(weight, codes, sums, group_size)):
        part = slice(g * group_size, (g + 1) * group_size)
        assert torch.equal(found.long(), codes[:, part].long() @ weight.centered[:, part].T)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("in_features", [1, 172, 880])
def test_within_the_bound_of_float32_sums(
    capability: str, threads: int, tokens: int, in_features: int
) -> None:
    weight, x, bias = packed_weight(83, in_features), torch.randn(tokens, in_features), torch.randn(83)
    assert_close_to_exact(mixed_linear(x, *weight.inner, bias, 128), x, weight, bias, False)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 3, 6])
def test_rows_of_one_width(capability: str, bits: int, tokens: int) -> None:
    weight, x = packed_weight(37, 320, widths=(bits,)), torch.randn(tokens, 320)
    assert_close_to_exact(mixed_linear(x, *weight.inner, None, 128), x, weight, None, False)


@given(
    st.sampled_from(CAPABILITIES),
    st.integers(0, 30),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 64).map(lambda n: 8 * n),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 100),
)
@settings(max_examples=100)
def test_any_shape(
    name: str, tokens: int, rows: int, inputs: int, size: int, per_token: bool, dtype: torch.dtype, seed: int
) -> None:
    if not supported(name):
        return
    weight = packed_weight(rows, inputs, size, seed=seed)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.linspace(-1, 1, rows).to(dtype)
    with forced(name):
        y = mixed_linear(x, *weight.inner, bias, size, per_token)
    assert y.dtype == dtype
    assert_close_to_exact(y, x, weight, bias, per_token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("in_features, group_size", [(1, 8), (172, 32), (880, 512)])
def test_codes_of_activations_are_those_of_the_reference(
    capability: str, threads: int, in_features: int, group_size: int, per_token: bool, dtype: torch.dtype
) -> None:
    x = awkward_tokens(in_features, dtype)
    with disable_kernels():
        expected = quantize_activation(x, group_size, per_token)
    wide = torch.zeros(41, 2 * in_features + 1, dtype=dtype)
    wide[:, 1::2] = x
    shifted = torch.zeros(41 * in_features + 1, dtype=dtype)[1:]
    shifted.copy_(x.flatten())
    for same in (x, wide[:, 1::2], x.t().contiguous().t(), torch.cat([x, x], 1)[:, in_features:]):
        for part, wanted in zip(quantize_activation(same, group_size, per_token), expected, strict=True):
            torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)
    for part, wanted in zip(
        quantize_activation(shifted.view(x.shape), group_size, per_token), expected, strict=True
    ):
        torch.testing.assert_close(part, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 4, 9, 40])
def test_a_token_gives_the_same_bits_whatever_is_around_it(
    capability: str, threads: int, tokens: int
) -> None:
    """Other tokens, a NaN among them, other threads, quantized apart or inside, per token or per group."""
    weight, x, bias = packed_weight(83, 880), torch.randn(tokens, 880), torch.randn(83)
    for per_token in (False, True):
        y = mixed_linear(x, *weight.inner, bias, 128, per_token)
        parts = quantize_activation(x, 128, per_token)
        assert torch.equal(y, mixed_linear_quantized(*parts, *weight.inner, bias, 128, torch.float32))
        alone = torch.cat([mixed_linear(row[None], *weight.inner, bias, 128, per_token) for row in x])
        assert torch.equal(y, alone)
    x[tokens // 2, 5] = float("nan")
    marked = mixed_linear(x, *weight.inner, bias, 128, True)
    others = torch.arange(tokens) != tokens // 2
    assert marked[tokens // 2].isnan().all()
    assert torch.equal(marked[others], y[others])


@pytest.mark.parametrize("tokens", [1, 6])
def test_many_inputs(capability: str, tokens: int) -> None:
    """Rows of 2**17 inputs; bfloat16 results are rounded once."""
    weight, x = packed_weight(9, 1 << 17, widths=(3, 4, 8)), torch.randn(tokens, 1 << 17).bfloat16()
    assert_close_to_exact(mixed_linear(x, *weight.inner, None, 128), x, weight, None, False)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("rows", [1, 2, 17, 300])
def test_few_and_many_rows(capability: str, threads: int, rows: int, tokens: int) -> None:
    weight, x = packed_weight(rows, 172), torch.randn(tokens, 172)
    assert_close_to_exact(mixed_linear(x, *weight.inner, None, 128), x, weight, None, False)


@pytest.mark.parametrize("tokens", [1, 6, 50])
def test_work_is_shared_among_threads_to_the_same_bits(capability: str, tokens: int) -> None:
    """Large enough for threads to be woken, also for quantizing; more threads than this machine may have."""
    weight, x = packed_weight(1100, 2048), torch.randn(tokens, 2048)
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 64):
        torch.set_num_threads(count)
        results.append(mixed_linear(x, *weight.inner, None, 128))
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)
    assert_close_to_exact(results[0], x, weight, None, False)


@pytest.mark.parametrize("tokens", [1, 6])
def test_nothing_is_read_behind_the_tensors(capability: str, tokens: int) -> None:
    """All tensors end where a page ends that no process may read."""
    guard = GuardedMemory()
    for rows, inputs, size in ((1, 1, 8), (5, 8, 8), (33, 172, 128), (40, 880, 512)):
        weight, x = packed_weight(rows, inputs, size), torch.randn(tokens, inputs)
        expected = mixed_linear(x, *weight.inner, None, size)
        moved = [guard.at_the_end(part) for part in weight.inner]
        assert torch.equal(mixed_linear(guard.at_the_end(x), *moved, None, size), expected)
        parts = [guard.at_the_end(part) for part in quantize_activation(guard.at_the_end(x), size)]
        assert torch.equal(mixed_linear_quantized(*parts, *moved, None, size, torch.float32), expected)


@pytest.mark.parametrize("tokens", [1, 6])
def test_unaligned_memory(capability: str, tokens: int) -> None:
    weight, x, bias = packed_weight(33, 172), torch.randn(tokens, 172).bfloat16(), torch.randn(33)
    expected = mixed_linear(x, *weight.inner, bias, 128)
    inner = [shifted(part) for part in weight.inner]
    assert torch.equal(mixed_linear(shifted(x), *inner, shifted(bias), 128), expected)
    apart = x.t().contiguous().t()
    assert torch.equal(mixed_linear(apart, *inner, bias, 128), expected)


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element further on in memory."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return moved.copy_(tensor)


class GuardedMemory:
    """Tensors that end at the border of memory that must not be touched."""

    def __init__(self) -> None:
        import ctypes
        import mmap

        self._libc, self._maps, self._page = ctypes.CDLL(None), [], mmap.PAGESIZE

    def at_the_end(self, tensor: Tensor) -> Tensor:
        import ctypes
        import mmap

        pages = -(-tensor.nbytes // self._page) + 1
        area = mmap.mmap(-1, pages * self._page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        last = ctypes.c_void_p(address + (pages - 1) * self._page)
        assert self._libc.mprotect(last, self._page, 0) == 0
        self._maps.append(area)
        offset = (pages - 1) * self._page - tensor.nbytes
        values = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return values.view(tensor.shape).copy_(tensor) if tensor.numel() else tensor


def test_calls_at_the_same_time(capability: str) -> None:
    weight, x = packed_weight(83, 880), torch.randn(16, 40, 880)
    expected = [mixed_linear(tokens[: 1 + i], *weight.inner, None, 128) for i, tokens in enumerate(x)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            jobs = [
                pool.submit(mixed_linear, tokens[: 1 + i], *weight.inner, None, 128)
                for i, tokens in enumerate(x)
            ]
            assert all(torch.equal(job.result(), y) for job, y in zip(jobs, expected, strict=True))


def _work(x: Tensor, inner: list[Tensor], answers: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)  # as the workers of a DataLoader do: OpenMP's threads do not survive a fork
    answers.put(mixed_linear(x, *inner, None, 128).tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(method: str) -> None:
    weight, x = packed_weight(83, 880), torch.randn(6, 880)
    expected = mixed_linear(x, *weight.inner, None, 128)  # also starts torch's threads before the fork
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, about a fork with threads
        process = context.Process(target=_work, args=(x, list(weight.inner), answers))
        process.start()
    assert answers.get(timeout=60) == expected.tolist()
    process.join(10)
    assert process.exitcode == 0


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_opcheck(capability: str, tokens: int) -> None:
    weight, x = packed_weight(11, 40, 16), torch.randn(tokens, 40)
    ops = torch.ops.torchmix
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck's own
        torch.library.opcheck(ops.quantize_activation.default, (x, 16))
        torch.library.opcheck(ops.mixed_linear.default, (x, *weight.inner, None, 16))
        parts = quantize_activation(x, 16)
        arguments = (*parts, *weight.inner, torch.randn(11), 16, torch.bfloat16)
        torch.library.opcheck(ops.mixed_linear_quantized.default, arguments)


def test_what_does_not_fit_is_an_error() -> None:
    weight, x = packed_weight(11, 40, 16), torch.randn(2, 40)
    qdata, scale, zero_point, bits = weight.inner
    for wrong in (
        (qdata[:-1], scale, zero_point, bits),
        (qdata, scale[:, :-1], zero_point, bits),
        (qdata, scale.float(), zero_point, bits),
        (qdata, scale, zero_point[1:], bits),
        (qdata, scale, zero_point, torch.full_like(bits, 9)),
        (qdata, scale, zero_point, torch.zeros_like(bits)),
    ):
        with pytest.raises(ValueError, match="mixed_linear"):
            torch.ops.torchmix.mixed_linear(x, *wrong, None, 16)
    for group_size in (0, 4, 12, 520):
        with pytest.raises(ValueError, match="multiple of 8, at most 512"):
            torch.ops.torchmix.quantize_activation(x, group_size)
    with pytest.raises(ValueError, match="bias must have 11 values"):
        torch.ops.torchmix.mixed_linear(x, *weight.inner, torch.zeros(3), 16)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        torch.ops.torchmix.mixed_linear(x.double(), *weight.inner, None, 16)
    parts = quantize_activation(x, 8)
    with pytest.raises(ValueError, match="activation_scale and group_sum"):
        torch.ops.torchmix.mixed_linear_quantized(*parts, *weight.inner, None, 16, torch.float32)


def _in_process(capability: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import torch; from torchmix._extension import cpu_capability; from torchmix.ops import quantize_activation;"
        "print(cpu_capability()); quantize_activation(torch.ones(1, 8), 8)"
    )
    environment = {**os.environ, "TORCHMIX_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_environment_forces_an_implementation() -> None:
    result = _in_process("portable")
    assert result.stdout.split() == ["portable"], result.stderr
    result = _in_process("avx3")
    assert result.returncode == 1
    assert result.stdout.split() == ["None"]
    assert "TORCHMIX_CPU_CAPABILITY=avx3 is not understood; set it to one of" in result.stderr


def test_the_best_implementation_runs_by_default() -> None:
    if os.environ.get("TORCHMIX_CPU_CAPABILITY"):
        pytest.skip("TORCHMIX_CPU_CAPABILITY is set")
    assert cpu_capability() == next(name for name in CAPABILITIES if supported(name))
