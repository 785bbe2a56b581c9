"""Every implementation of the CPU kernels in one process: which there are, and how to force one."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from torchmix._extension import kernel_status, kernels_available

CAPABILITIES = ("avx512_vnni", "avx2", "portable")
needs_cpu_kernels = pytest.mark.skipif(not kernels_available("cpu"), reason="no compiled kernels for the CPU")


def library() -> ctypes.CDLL:
    """The loaded library for the CPU."""
    path = next(found.path for found in kernel_status().libraries if found.device_type == "cpu")
    return ctypes.CDLL(str(path))


def supported(capability: str) -> bool:
    """Whether this processor has the instructions; leaves the choice as it is afterwards."""
    with _restored() as kernels:
        return bool(kernels.torchmix_set_cpu_capability(capability.encode()))


@contextmanager
def forced(capability: str) -> Iterator[None]:
    """All calls inside use this implementation; the test is skipped where the processor does not have it."""
    with _restored() as kernels:
        if not kernels.torchmix_set_cpu_capability(capability.encode()):
            pytest.skip(f"this processor does not have the instructions of {capability}")
        yield


@contextmanager
def _restored() -> Iterator[ctypes.CDLL]:
    kernels = library()
    kernels.torchmix_set_cpu_capability.restype = ctypes.c_bool
    kernels.torchmix_cpu_capability.restype = ctypes.c_char_p
    before = kernels.torchmix_cpu_capability()
    try:
        yield kernels
    finally:
        kernels.torchmix_set_cpu_capability(before or b"")
