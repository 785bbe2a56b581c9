"""Layer 0: load the compiled kernels once, and say which of them are live.

A build with kernels leaves shared libraries named ``_C*.so`` next to this file: ``_C.so`` for the CPU and
``_C_cuda.so`` for CUDA. They are loaded when this module is first imported, before any op is defined in
Python, because a library may define the schemas itself. A build without kernels is complete: every op
then runs on its PyTorch reference, and ``_build_notes.json`` says why kernels were not compiled.
``TORCHMIX_REQUIRE_KERNELS=1`` turns their absence into an ImportError.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._C import DispatchKey
from torch.utils._python_dispatch import TorchDispatchMode

_REQUIRE_VARIABLE = "TORCHMIX_REQUIRE_KERNELS"
_FALLBACK = "ops run on the PyTorch reference"


@dataclass(frozen=True)
class KernelLibrary:
    """One compiled library found next to the package.

    path: the file. device_type: "cpu" or "cuda". error: why it is not loaded, None where it is live.
    """

    path: Path
    device_type: str
    error: str | None = None


@dataclass(frozen=True)
class KernelStatus:
    """Which kernels are live, and why the others are not.

    libraries: every library found, in loading order. disabled: True inside ``disable_kernels()``.
    notes: device type -> why its kernels were not compiled when torchmix was installed.
    """

    libraries: tuple[KernelLibrary, ...]
    disabled: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)

    def reason(self, device_type: str) -> str | None:
        """Why no kernel serves ``device_type`` ("cpu", "cuda"), in one sentence; None where one does."""
        matching = [library for library in self.libraries if library.device_type == device_type]
        errors = [
            f"{library.path.name}: {library.error}" for library in matching if library.error is not None
        ]
        if errors:
            return f"compiled kernels for {device_type} are not loaded ({'; '.join(errors)}); {_FALLBACK}"
        if not matching and device_type in self.notes:
            note = self.notes[device_type]
            return f"kernels for {device_type} were not compiled on installation ({note}); {_FALLBACK}"
        if not self.libraries:
            return f"this build has no compiled kernels; {_FALLBACK}"
        if not matching:
            found = ", ".join(library.path.name for library in self.libraries)
            return f"this build has no compiled kernels for {device_type} (found {found}); {_FALLBACK}"
        if self.disabled:
            return f"kernels are switched off by disable_kernels(); {_FALLBACK}"
        return None


def kernels_available(device_type: str) -> bool:
    """True where a compiled library for ``device_type`` ("cpu", "cuda") is loaded and not switched off.

    Asks only what was loaded: it does not initialise CUDA and does not look for a device.
    """
    return kernel_status().reason(device_type) is None


def kernel_status() -> KernelStatus:
    """The libraries found when torchmix was imported, and whether the caller has switched them off."""
    return KernelStatus(_LIBRARIES, disabled=_DISABLED.get(), notes=_NOTES)


def cpu_capability() -> str | None:
    """Which implementation of the CPU kernels runs: "avx512_vnni", "avx2" or "portable".

    None without CPU kernels, or where ``TORCHMIX_CPU_CAPABILITY`` names one that cannot run here; ops then raise.
    """
    found = [library for library in _LIBRARIES if library.device_type == "cpu" and library.error is None]
    if not found:
        return None
    function = ctypes.CDLL(str(found[0].path)).torchmix_cpu_capability
    function.restype = ctypes.c_char_p
    name = function()
    return None if name is None else str(name.decode())


@contextmanager
def disable_kernels() -> Iterator[None]:
    """Run ops on the PyTorch reference inside this block, to test or time a kernel against it.

    Holds for the current thread only, and may be nested. Compiled code runs its references inside the block too;
    a CUDA graph keeps the choice it was captured with.
    """
    token = _DISABLED.set(True)
    try:
        with _References():
            yield
    finally:
        _DISABLED.reset(token)


class _References(TorchDispatchMode):
    """Sends every op of torchmix to its reference, whatever kernels its device has; gradients are not concerned."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """``torch.compile`` works inside the block; the graph is traced without this mode and runs under it."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: tuple[Any, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation; tensor subclasses, fake tensors among them, do so themselves and come back here."""
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented
        reference = DispatchKey.CompositeExplicitAutograd
        if func.namespace == "torchmix" and func.has_kernel_for_dispatch_key(reference):
            with self:  # a reference may call other ops
                return func._op_dk(reference, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _load_libraries(directory: Path) -> tuple[KernelLibrary, ...]:
    """Load every ``_C*.so`` of ``directory``, the CPU library first; a failure is recorded and warned of."""
    return tuple(_load_library(path) for path in sorted(directory.glob("_C*.so")))


def _load_library(path: Path) -> KernelLibrary:
    device_type = "cuda" if path.name.startswith("_C_cuda") else "cpu"
    if (
        device_type == "cuda" and torch.version.cuda is None
    ):  # nothing is amiss: no tensor could ever reach it
        return KernelLibrary(path, device_type, f"torch {torch.__version__} is built without CUDA")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # torch names the file only, its cause the missing symbol
        message = f"{type(reason).__name__}: {reason}"
        warnings.warn(
            f"torchmix: {path} failed to load ({message}); {_FALLBACK}", RuntimeWarning, stacklevel=2
        )
        return KernelLibrary(path, device_type, message)
    return KernelLibrary(path, device_type)


def _read_notes(directory: Path) -> dict[str, str]:
    """What the build left in ``_build_notes.json``: device type -> why no kernels; {} where it left nothing."""
    try:
        notes = json.loads((directory / "_build_notes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _check_required(
    libraries: tuple[KernelLibrary, ...], required: str, notes: Mapping[str, str] | None = None
) -> None:
    """Raise ImportError where ``required``, the variable's value, is "1" and a kernel is missing.

    Needed are kernels for what torch is built for, CUDA or the CPU alone, and every library found for it.
    """
    if required in ("", "0"):
        return
    if required != "1":
        raise ImportError(
            f"{_REQUIRE_VARIABLE}={required!r} is not understood; set it to 1, or to 0 or nothing"
        )
    status = KernelStatus(libraries, notes=notes or {})
    cuda = torch.version.cuda is not None
    found = {library.device_type for library in libraries if cuda or library.device_type != "cuda"}
    device_types = {"cuda" if cuda else "cpu"} | found
    reasons = [reason for device_type in sorted(device_types) if (reason := status.reason(device_type))]
    if reasons:
        raise ImportError(
            f"{_REQUIRE_VARIABLE}=1, but {' and '.join(reasons)}. "
            f"Rebuild torchmix with its kernels, or unset {_REQUIRE_VARIABLE}"
        )


_DISABLED: ContextVar[bool] = ContextVar("torchmix_kernels_disabled", default=False)
_NOTES = _read_notes(Path(__file__).parent)
_LIBRARIES = _load_libraries(Path(__file__).parent)
_check_required(_LIBRARIES, os.environ.get(_REQUIRE_VARIABLE, ""), _NOTES)
