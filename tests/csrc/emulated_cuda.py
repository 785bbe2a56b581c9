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
PIECES = (8, 16, 32, 64, 128)  # tokens of a piece of hopper_kernel
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Undefined behaviour, such as a misaligned vector load, traps; faults.cpp makes an error of it.
CHECKS = "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
DEVICE_FLAGS = ("-DTORCHMIX_EMULATE", "-ffp-contract=off", CHECKS, "-fsanitize-undefined-trap-on-error")


class EmulatedError(Exception):
    """A launch failed: what the machine says about it."""


class LinearCall(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("tiles", "row_index", "tile_table", "x", "codes")),
        *((name, ctypes.c_void_p) for name in ("token_scale", "group_sum", "bias", "y", "prepared")),
        *((name, ctypes.c_int64) for name in ("tile_bytes", "x_stride", "M", "N", "K", "T")),
        *((name, ctypes.c_int32) for name in ("x_type", "bias_type", "y_type", "aligned")),
        *((name, ctypes.c_int32) for name in ("together", "slots", "blocks")),
        *((name, ctypes.c_int32) for name in ("tokens", "clusters", "wide_shift", "early")),
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
    """How ``stream_kernel`` is launched: ``StreamChoice`` of launch_choice.h, blocks, and the machine's seed.

    together: tokens that go through the weights together.
    lanes_apart: lanes of a warp may go apart wherever the kernel does not bring them together. A GPU may do so, but
    after a loop or a branch it hardly ever does.
    """

    together: int = 8
    slots: int = 8
    blocks: int = 1
    seed: int = 0
    arch: int = 900
    lanes_apart: bool = False


@dataclass(frozen=True)
class Hopper:
    """How ``hopper_kernel`` is launched: tokens of a piece (:data:`PIECES`), clusters, and what a wide group costs."""

    tokens: int = 8
    clusters: int = 1
    wide_shift: int = 1
    early: bool = True
    seed: int = 0
    lanes_apart: bool = False


DEFAULT = Stream()
Activation = Tensor | tuple[Tensor, Tensor, Tensor]


def why_unavailable() -> str | None:
    """Why kernels cannot be emulated here; None where they can."""
    if not (KERNELS / "stream.cuh").is_file():
        return "csrc/cuda has no kernels"
    return None if _compiler() is not None else "no C++ compiler was found ($CXX, g++)"


def prepare(activation: Activation, seed: int = 0, lanes_apart: bool = False, arch: int = 900) -> Tensor:
    """Run ``prepare_kernel`` on x (M, K), or on its codes, scales and sums: what ``prepare_activation`` gives."""
    call = LinearCall(seed=seed, lanes_apart=lanes_apart)
    first = activation if isinstance(activation, Tensor) else activation[0]
    _set_activation(call, activation, 8)
    tokens, groups = -(-first.shape[0] // 16) * 16, -(-first.shape[1] // GROUP_SIZE)
    prepared = torch.full((tokens * (groups * 132 + -(-groups // 16) * 64),), 0xFF, dtype=torch.uint8)
    call.prepared = prepared.data_ptr()
    _check(arch, "emulated_prepare", ctypes.byref(call))
    return prepared


def linear(
    activation: Activation,
    tiles: Tiles,
    out_features: int,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    how: Stream | Hopper = DEFAULT,
) -> Tensor:
    """Run ``stream_kernel`` or ``hopper_kernel`` on x (M, K), or on its codes, scales and sums.

    Only ``stream_kernel`` quantizes x itself, of at most 16 tokens together; else ``prepare_kernel`` runs first.

    Raises:
        EmulatedError: a deadlock, memory that is not there, or the like.
    """
    call = LinearCall(seed=how.seed, lanes_apart=how.lanes_apart)
    hopper = isinstance(how, Hopper)
    names = ("tokens", "clusters", "wide_shift", "early") if hopper else ("together", "slots", "blocks")
    for name in names:
        setattr(call, name, getattr(how, name))
    arch = 900 if isinstance(how, Hopper) else how.arch
    if isinstance(activation, Tensor):
        dtype = activation.dtype
    _set_activation(call, activation, 4)
    prepared = None
    if hopper or not isinstance(activation, Tensor):
        prepared = prepare(activation, how.seed, how.lanes_apart, arch)
        call.prepared, call.x = prepared.data_ptr(), None
    call.tiles, call.row_index, call.tile_table = (part.data_ptr() for part in tiles)
    call.tile_bytes, call.N, call.T = tiles.tiles.numel(), out_features, len(tiles.tile_table)
    if bias is not None:
        call.bias, call.bias_type = bias.data_ptr(), FLOATS[bias.dtype]
    y = torch.full((call.M, out_features), torch.nan, dtype=dtype)
    call.y, call.y_type = y.data_ptr(), FLOATS[dtype]
    _check(arch, "emulated_hopper" if hopper else "emulated_stream", ctypes.byref(call))
    return y


def _set_activation(call: LinearCall, activation: Activation, alignment: int) -> None:
    """Pointers and sizes of x or of codes, scales and sums; aligned: rows start at multiples of so many values."""
    if isinstance(activation, Tensor):
        x = activation
        call.x, call.x_type, call.x_stride = x.data_ptr(), FLOATS[x.dtype], x.stride(0)
        call.M, call.K = x.shape
        call.aligned = x.shape[1] % alignment == 0 and x.stride(0) % alignment == 0
    else:
        codes = activation[0]
        call.codes, call.token_scale, call.group_sum = (part.data_ptr() for part in activation)
        call.M, call.K = codes.shape
        call.aligned = codes.shape[1] % alignment == 0


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
    slots: int
    fixed_bytes: int


class HopperChoice(NamedTuple):
    """``HopperChoice`` of launch_choice.h."""

    tokens: int
    cluster: int
    row_pieces: int
    token_pieces: int
    clusters: int
    wide_shift: int


class Part(NamedTuple):
    """``Part`` of schedule.h, and the nearest block before that has a part of the same piece (-1: none)."""

    rows: int
    tokens: int
    first: int
    last: int
    shared: int
    sharer: int


def choose_stream(tokens: int, groups: int, shared_bytes: int) -> Choice:
    """``choose_stream`` of launch_choice.h."""
    result = (ctypes.c_int32 * 3)()
    _load(build(900)).emulated_choose_stream(ctypes.c_int64(tokens), groups, shared_bytes, result)
    return Choice(*result)


def choose_hopper(tokens: int, groups: int, tiles: int, multiprocessors: int) -> HopperChoice:
    """``choose_hopper`` of launch_choice.h."""
    result = (ctypes.c_int32 * 6)()
    _load(build(900)).emulated_choose_hopper(ctypes.c_int64(tokens), groups, tiles, multiprocessors, result)
    return HopperChoice(*result)


def parts(schedule: tuple[int, int, int, int, int, int], block: int) -> list[Part]:
    """What a block does: ``Parts`` of schedule.h; the arguments of ``Schedule`` are row_pieces, token_pieces, groups,
    blocks, wide and wide_shift."""
    room = schedule[0] * schedule[1] + 2
    result = (ctypes.c_int32 * (6 * room))()
    count = _load(build(900)).emulated_parts((ctypes.c_int32 * 6)(*schedule), block, result, room)
    return [Part(*result[6 * i : 6 * i + 6]) for i in range(count)]


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
    translated = {
        path.name: translate(path) for path in sorted(KERNELS.glob("*.*h")) if path.name != "host.h"
    }
    for pattern in ("stream_*.cu", "hopper_[0-9]*.cu", "prepare.cu"):
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
