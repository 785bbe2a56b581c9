"""The kernel loader: what it finds, what it says, and how it is switched off."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchmix import _extension
from torchmix._extension import KernelLibrary, KernelStatus, disable_kernels, kernel_status, kernels_available
from torchmix.ops import mixed_linear, mixed_linear_quantized, quantize_activation
from torchmix.tensor import MixedPrecisionTensor

ROOT = Path(__file__).parents[1]
LIVE = (KernelLibrary(Path("_C.so"), "cpu"),)


@pytest.fixture
def live_cpu_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_LIBRARIES", LIVE)


def test_build_without_kernels_says_so() -> None:
    reason = KernelStatus(()).reason("cpu")
    assert reason == "this build has no compiled kernels; ops run on the PyTorch reference"


def test_status_and_availability_agree() -> None:
    for device_type in ("cpu", "cuda"):
        assert kernels_available(device_type) == (kernel_status().reason(device_type) is None)


def test_library_serves_its_device_only() -> None:
    assert KernelStatus(LIVE).reason("cpu") is None
    assert "no compiled kernels for cuda (found _C.so)" in str(KernelStatus(LIVE).reason("cuda"))


@pytest.fixture(params=[None, "13.0"], ids=["torch without CUDA", "torch with CUDA"])
def cuda_version(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What torch says it is built for."""
    monkeypatch.setattr(torch.version, "cuda", request.param)
    return request.param


def test_broken_library_is_recorded_and_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "_C.so").write_bytes(b"not a shared library")
    (tmp_path / "_C_cuda.so").write_bytes(b"nor is this")
    (tmp_path / "other.so").write_bytes(b"not ours")
    with pytest.warns(RuntimeWarning, match="failed to load"):
        libraries = _extension._load_libraries(tmp_path)
    assert [(library.path.name, library.device_type) for library in libraries] == [
        ("_C.so", "cpu"),
        ("_C_cuda.so", "cuda"),
    ]
    reason = str(KernelStatus(libraries).reason("cuda"))
    assert "_C_cuda.so: OSError" in reason
    assert "PyTorch reference" in reason


def test_cuda_library_is_left_alone_where_torch_has_no_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    (tmp_path / "_C_cuda.so").write_bytes(b"needs symbols that this torch does not have")
    status = KernelStatus(_extension._load_libraries(tmp_path))
    assert not recwarn.list
    reason = f"compiled kernels for cuda are not loaded (_C_cuda.so: torch {torch.__version__} is built without CUDA)"
    assert str(status.reason("cuda")).startswith(reason)
    assert "no compiled kernels for cpu (found _C_cuda.so)" in str(status.reason("cpu"))


def test_notes_of_the_build_say_why_kernels_are_missing(tmp_path: Path) -> None:
    assert _extension._read_notes(tmp_path) == {}
    path = tmp_path / "_build_notes.json"
    path.write_text('{"cuda": "nvcc was not found"}')
    notes = _extension._read_notes(tmp_path)
    reason = str(KernelStatus((), notes=notes).reason("cuda"))
    assert "kernels for cuda were not compiled on installation (nvcc was not found)" in reason
    assert KernelStatus((KernelLibrary(Path("_C_cuda.so"), "cuda"),), notes=notes).reason("cuda") is None
    for text in ("{", "[]"):
        path.write_text(text)
        assert _extension._read_notes(tmp_path) == {}


def test_good_library_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    for name in ("_C_cuda.abi3.so", "_C.abi3.so"):
        (tmp_path / name).touch()
    status = KernelStatus(_extension._load_libraries(tmp_path))
    assert loaded == [str(tmp_path / "_C.abi3.so"), str(tmp_path / "_C_cuda.abi3.so")], "CPU first"
    assert status.reason("cpu") is None
    assert status.reason("cuda") is None


@pytest.mark.usefixtures("live_cpu_library")
def test_disable_kernels_nests_and_restores() -> None:
    assert kernels_available("cpu")
    with disable_kernels():
        with disable_kernels():
            assert not kernels_available("cpu")
        assert "disable_kernels()" in str(kernel_status().reason("cpu"))
    assert kernels_available("cpu")
    with pytest.raises(KeyError), disable_kernels():
        raise KeyError("an error inside the block")
    assert kernels_available("cpu")


@pytest.mark.usefixtures("live_cpu_library")
def test_disable_kernels_holds_for_its_thread_only() -> None:
    seen: list[bool] = []
    with disable_kernels():
        thread = threading.Thread(target=lambda: seen.append(kernels_available("cpu")))
        thread.start()
        thread.join()
    assert seen == [True]


@pytest.fixture
def kernel_calls() -> Iterator[list[str]]:
    """CPU kernels for two ops, of which a third consists: one gives codes 1, the other zeros; both note their calls."""
    calls: list[str] = []

    def quantize(x: Tensor, group_size: int, per_token: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        calls.append("quantize_activation")
        groups = x.new_ones((len(x), -(-x.shape[1] // group_size)))
        return torch.ones_like(x, dtype=torch.int8), groups, groups.int()

    def linear(codes: Tensor, *args: Any) -> Tensor:
        calls.append("mixed_linear_quantized")
        return codes.new_zeros((len(codes), len(args[5])), dtype=args[-1])

    def both(x: Tensor, *args: Any) -> Tensor:
        inner, group_size, per_token = args[:5], args[5], args[6] if len(args) > 6 else False
        parts = quantize_activation(x, group_size, per_token)
        return mixed_linear_quantized(*parts, *inner, group_size, x.dtype)

    with warnings.catch_warnings(), torch.library._scoped_library("torchmix", "IMPL") as library:
        warnings.filterwarnings(
            "ignore", message="Warning only once for all operators"
        )  # compiled ones give way
        library.impl("quantize_activation", quantize, "CPU")
        library.impl("mixed_linear_quantized", linear, "CPU")
        library.impl("mixed_linear", both, "CPU")
        yield calls


@pytest.mark.parametrize("door", ["op", "linear", "matmul", "compiled"])
def test_disable_kernels_runs_the_references(kernel_calls: list[str], door: str) -> None:
    """Through every door, with the same gradients; and compiled code too."""
    weight = MixedPrecisionTensor.from_hp(torch.randn(24, 128), 4)
    inner = (weight.qdata, weight.scale, weight.zero_point, weight.row_bits)
    doors: dict[str, Callable[[Tensor], Tensor]] = {
        "op": lambda x: mixed_linear(x, *inner, None, 128),
        "linear": lambda x: torch.nn.functional.linear(x, weight),
        "matmul": lambda x: x @ weight.t(),
    }
    doors["compiled"] = torch.compile(doors["linear"], fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 128, requires_grad=True)
    assert float(doors[door](x).detach().abs().max()) == 0
    assert set(kernel_calls) == {"quantize_activation", "mixed_linear_quantized"}
    kernel_calls.clear()
    with disable_kernels():
        y = doors[door](x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not kernel_calls
    dense = weight.dequantize()
    torch.testing.assert_close(y, x @ dense.t(), rtol=0.05, atol=0.5)
    torch.testing.assert_close(gradient, dense.sum(0).expand(5, -1))
    assert float(doors[door](x).detach().abs().max()) == 0


@pytest.mark.usefixtures("kernel_calls")
def test_disable_kernels_leaves_other_threads_their_kernels() -> None:
    seen: list[int] = []
    x = torch.zeros(1, 8)
    with disable_kernels():
        thread = threading.Thread(target=lambda: seen.append(int(quantize_activation(x, 8)[0].sum())))
        thread.start()
        thread.join()
        assert int(quantize_activation(x, 8)[0].sum()) == 0
    assert seen == [8]


@pytest.mark.parametrize("value", ["", "0"])
def test_kernels_are_optional_by_default(value: str) -> None:
    _extension._check_required((), value)


def test_required_kernels_are_those_torch_is_built_for(cuda_version: str | None) -> None:
    live = KernelLibrary(Path("_C_cuda.so"), "cuda")
    if cuda_version is None:
        _extension._check_required(
            (*LIVE, KernelLibrary(Path("_C_cuda.so"), "cuda", "built without CUDA")), "1"
        )
        with pytest.raises(ImportError, match="no compiled kernels for cpu"):
            _extension._check_required((live,), "1")
    else:
        _extension._check_required((live,), "1")
        with pytest.raises(ImportError, match=r"not compiled on installation \(no nvcc\)"):
            _extension._check_required(LIVE, "1", {"cuda": "no nvcc"})
        broken = (*LIVE, KernelLibrary(Path("_C_cuda.so"), "cuda", "OSError: no such symbol"))
        with pytest.raises(ImportError, match=r"_C_cuda\.so: OSError: no such symbol"):
            _extension._check_required(broken, "1")


@pytest.mark.usefixtures("cuda_version")
def test_required_kernels_must_all_be_live() -> None:
    with pytest.raises(ImportError, match=r"_C\.so: OSError"):
        _extension._check_required((KernelLibrary(Path("_C.so"), "cpu", "OSError: no libgomp"),), "1")
    with pytest.raises(ImportError, match="'yes' is not understood"):
        _extension._check_required(LIVE, "yes")


def test_require_variable_fails_the_import_of_a_build_without_kernels() -> None:
    if not _missing_kernels():
        pytest.skip("this build has the kernels its torch is for")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHMIX_REQUIRE_KERNELS": "1"}
    command = [sys.executable, "-c", "import torchmix._extension"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ImportError: TORCHMIX_REQUIRE_KERNELS=1, but " in result.stderr
    assert _missing_kernels() in result.stderr


def _missing_kernels() -> str:
    """Why there are no kernels for what torch is built for, "" where there are."""
    return kernel_status().reason("cuda" if torch.version.cuda else "cpu") or ""
