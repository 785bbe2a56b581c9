"""The CUDA kernels on a CPU: builds ``emulator/`` with the kernels of ``csrc/cuda``, and calls them on tensors.

Sources are translated first, by the few things of CUDA C++ that no macro can express: shared variables and launches.
Libraries are kept in ``build/emulator`` under a hash of what they are made from.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import toolchain
import torch
from torch import Tensor

from torchmix.tiles import GROUP_SIZE, Tiles

ROOT = Path(__file__).parents[2]
KERNELS, EMULATOR = ROOT / "csrc" / "cuda", Path(__file__).parent / "emulator"
ARCHITECTURES = (800, 900)
PIECES = (64, 128)  # tokens of a piece of batch_kernel
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Undefined behaviour, such as a misaligned vector load, traps; faults.cpp makes an error of it.
CHECKS = "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
DEVICE_FLAGS = ("-DTORCHMIX_EMULATE", "-ffp-contract=off", CHECKS, "-fsanitize-undefined-trap-on-error")


class EmulatedError(Exception):
    """A launch failed: what the machine says about it."""


class StreamCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "row_index", "tile_table", "x", "codes")),
        *((name, ctypes.c_void_p) for name in ("token_scale", "group_sum", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("tile_bytes", "x_stride", "M", "N", "K", "T")),
        *((name, ctypes.c_int32) for name in ("x_type", "bias_type", "y_type", "aligned")),
        *((name, ctypes.c_int32) for name in ("together", "blocks", "slots", "clusters")),
        ("seed", ctypes.c_uint64),
        ("lanes_apart", ctypes.c_int32),
    ]


class QuantizeCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "group_sum")),
        *((name, ctypes.c_int64) for name in ("x_stride", "M", "K", "group_size")),
        *((name, ctypes.c_int32) for name in ("type", "aligned", "per_token")),
        ("seed", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Stream:
    """How ``stream_kernel`` is launched: ``StreamChoice`` of launch_choice.h, clusters, and the machine's seed.

    together: tokens that go through the weights together; those of :data:`PIECES` stand for ``batch_kernel``, whose
    blocks are as many as ``clusters`` says.
    lanes_apart: lanes of a warp may go apart wherever the kernel does not bring them together. A GPU may do so, but
    after a loop or a branch it hardly ever does.
    """

    together: int = 8
    blocks: int = 1
    slots: int = 8
    clusters: int = 1
    seed: int = 0
    arch: int = 900
    lanes_apart: bool = False


DEFAULT = Stream()


def why_unavailable() -> str | None:
    """Why kernels cannot be emulated here; None where they can."""
    if not (KERNELS / "stream.cuh").is_file():
        return "csrc/cuda has no kernels"
    return None if _compiler() is not None else "no C++ compiler was found ($CXX, g++)"


def stream(
    activation: Tensor | tuple[Tensor, Tensor, Tensor],
    tiles: Tiles,
    out_features: int,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    how: Stream = DEFAULT,
) -> Tensor:
    """Run ``stream_kernel`` or ``batch_kernel`` on x (M, K), or on its codes, scales and sums.

    Raises:
        EmulatedError: a deadlock, memory that is not there, or the like.
    """
    call = StreamCall(seed=how.seed, lanes_apart=how.lanes_apart)
    for name in ("together", "blocks", "slots", "clusters"):
        setattr(call, name, getattr(how, name))
    if isinstance(activation, Tensor):
        x, dtype = activation, activation.dtype
        call.x, call.x_type, call.x_stride = x.data_ptr(), FLOATS[dtype], x.stride(0)
        call.M, call.K = x.shape
        call.aligned = x.shape[1] % 4 == 0 and x.stride(0) % 4 == 0
    else:
        codes = activation[0]
        call.codes, call.token_scale, call.group_sum = (part.data_ptr() for part in activation)
        call.M, call.K = codes.shape
        call.aligned = codes.shape[1] % 4 == 0
    call.tiles, call.row_index, call.tile_table = (part.data_ptr() for part in tiles)
    call.tile_bytes, call.N, call.T = tiles.tiles.numel(), out_features, len(tiles.tile_table)
    if bias is not None:
        call.bias, call.bias_type = bias.data_ptr(), FLOATS[bias.dtype]
    y = torch.full((call.M, out_features), torch.nan, dtype=dtype)
    call.y, call.y_type = y.data_ptr(), FLOATS[dtype]
    function = "emulated_batch" if how.together in PIECES else "emulated_stream"
    _check(how.arch, function, ctypes.byref(call))
    return y


def quantize(
    x: Tensor, group_size: int = GROUP_SIZE, per_token: bool = False, seed: int = 0, arch: int = 900
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel that ``quantize_activation`` takes on x (M, K): codes int8, scale float32, group_sum int32."""
    (tokens, inputs), groups = x.shape, -(-x.shape[1] // group_size)
    codes = torch.full((tokens, inputs), -128, dtype=torch.int8)
    scale = torch.full((tokens, groups), -1.0)
    group_sum = torch.full((tokens, groups), 1 << 30, dtype=torch.int32)
    aligned = inputs % 8 == 0 and x.stride(0) * x.element_size() % 16 == 0
    pointers = (part.data_ptr() for part in (x, codes, scale, group_sum))
    call = QuantizeCall(
        *pointers, x.stride(0), tokens, inputs, group_size, FLOATS[x.dtype], aligned, per_token, seed
    )
    _check(arch, "emulated_quantize", ctypes.byref(call))
    return codes, scale, group_sum


class Choice(NamedTuple):
    """``StreamChoice`` of launch_choice.h, and the shared memory that a block takes beside the slots."""

    tokens: int
    blocks: int
    slots: int
    fixed_bytes: int


def choose_stream(
    tokens: int, groups: int, tiles: int, multiprocessors: int, shared_bytes: int, clusters: bool
) -> Choice:
    """``choose_stream`` of launch_choice.h."""
    result = (ctypes.c_int32 * 4)()
    choose = _load(build(900)).emulated_choose_stream
    choose(ctypes.c_int64(tokens), groups, tiles, multiprocessors, shared_bytes, clusters, result)
    return Choice(*result)


def selftest(name: str, seed: int = 0) -> Tensor:
    """Run one of the small kernels of ``selftest.cu``: its 64 results, int32."""
    source, result = torch.arange(512).to(torch.uint8), torch.full((64,), -1, dtype=torch.int32)
    _check(900, "emulated_selftest", name.encode(), ctypes.c_uint64(seed), source, result)
    return result


def _check(arch: int, function: str, *arguments: object) -> None:
    """Call a function of the library, with tensors as pointers. Raises EmulatedError where it does not return 0."""
    path = build(arch)
    library = _load(path)
    plain = [ctypes.c_void_p(part.data_ptr()) if isinstance(part, Tensor) else part for part in arguments]
    if getattr(library, function)(*plain) == 0:
        return
    text = library.emulated_error().decode()
    found = re.search(r"at code offset (0x[0-9a-f]+)", text)
    raise EmulatedError(f"{text}\n{_source_lines(path, found.group(1))}" if found else text)


def _source_lines(library: Path, offset: str) -> str:
    """Functions and lines of a place in the code, where binutils are there to ask."""
    command = ["addr2line", "-fiCe", str(library), offset]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


@cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.emulated_error.restype = ctypes.c_char_p
    return library


# --- build ----------------------------------------------------------------------------------------------------------


@cache
def _compiler() -> tuple[str, ...] | None:
    found = toolchain.find_cxx()
    return None if found is None else tuple(found)


@cache
def build(arch: int) -> Path:
    """The library for one value of ``__CUDA_ARCH__``. Raises RuntimeError with the compiler's output."""
    folder = ROOT / "build" / "emulator" / str(arch)
    sources = folder / "translated"
    sources.mkdir(parents=True, exist_ok=True)
    translated = {path.name: translate(path) for path in sorted(KERNELS.glob("*.*h"))}
    for pattern in ("stream_*.cu", "batch_*.cu", "prepare.cu"):
        translated |= {path.name: translate(path) for path in sorted(KERNELS.glob(pattern))}
    translated["quantize_kernels.h"] = quantize_kernels()
    translated["selftest.cu"] = translate(EMULATOR / "selftest.cu")
    for name, text in translated.items():
        _write(sources / name, text)
    machine = [EMULATOR / name for name in ("machine.cpp", "together.cpp", "shared_memory.cpp", "faults.cpp")]
    kernels = [EMULATOR / "driver.cpp", *(sources / name for name in translated if name.endswith(".cu"))]
    device_flags = (*DEVICE_FLAGS, f"-D__CUDA_ARCH__={arch}", f"-I{EMULATOR}", f"-I{sources}")
    own = [path.read_text() for path in sorted(EMULATOR.glob("*"))]
    all_texts = [*own, *translated.values()]
    jobs: list[tuple[Path, tuple[str, ...], list[str]]] = [(path, FLAGS, own) for path in machine]
    jobs += [(path, (*FLAGS, *device_flags), all_texts) for path in kernels]
    with ThreadPoolExecutor(toolchain.available_cores()) as pool:
        objects = list(pool.map(lambda job: _compile(folder, *job), jobs))
    library = folder / f"emulator.{_digest([], [path.name for path in objects])}.so"
    if not library.is_file():
        _compiled((*(str(path) for path in objects), "-shared", "-ldl"), library)
    return library


def _compile(folder: Path, source: Path, flags: tuple[str, ...], texts: list[str]) -> Path:
    target = folder / f"{source.stem}.{_digest([*flags, str(_compiler())], texts)}.o"
    if not target.is_file():
        for old in folder.glob(f"{source.stem}.*.o"):
            old.unlink(missing_ok=True)
        _compiled((*flags, "-x", "c++", "-c", str(source)), target)
    return target


def _compiled(arguments: tuple[str, ...], target: Path) -> None:
    compiler = _compiler()
    assert compiler is not None, why_unavailable()
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    command = [*compiler, *arguments, "-o", str(temporary)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    temporary.replace(target)


def _digest(words: list[str], texts: list[str]) -> str:
    return hashlib.sha256("\0".join([*words, *texts]).encode()).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(text)
        temporary.replace(path)


def translate(path: Path) -> str:
    """A source of csrc/cuda as plain C++, with the line numbers of the original."""
    text = path.read_text(encoding="utf-8")
    align = r"(?:__align__\(\d+\)\s*)?"
    text = re.sub(
        rf"extern __shared__ {align}(\w+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(emulator::dynamic_shared());",
        text,
    )
    text = re.sub(
        rf"__shared__ {align}([\w:]+) (\w+)((?:\[[^\]]*\])*);",
        r"auto& \2 = emulator::static_shared<\1\3>([] {});",
        text,
    )
    return f'#line 1 "{path}"\n{text}'


def quantize_kernels() -> str:
    """The kernels of quantize_activation.cu, without the functions for torch."""
    text = translate(KERNELS / "quantize_activation.cu")
    end = "\n}  // namespace\n"
    assert text.count(end) == 1, "quantize_activation.cu: kernels come first, in one unnamed namespace"
    kernels = text.split(end)[0].replace('#include "host.h"', '#include "common.cuh"')
    return f"#pragma once\n{kernels}\n}}  // namespace\n}}  // namespace torchmix\n"
