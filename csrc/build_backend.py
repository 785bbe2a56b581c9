"""Build backend (PEP 517, PEP 660): setuptools, with the kernels compiled first.

A kernel that cannot be compiled does not stop an installation: one line says why, ``torchmix env`` repeats it
later, and ops run on their PyTorch reference. ``TORCHMIX_REQUIRE_KERNELS=1`` makes it an error,
``TORCHMIX_BUILD_CUDA=0|1|auto`` decides about CUDA ("auto": where torch is built for it).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import compile_kernels
import toolchain
from compile_kernels import DEVICES, LIBRARY_NAME, ROOT, BuildError
from setuptools import build_meta
from setuptools.build_meta import (
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

NOTES = ROOT / "torchmix" / "_build_notes.json"  # read by torchmix/_extension.py


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """Compile the kernels, then build the wheel with them inside."""
    compile_all()
    _remove_leftovers()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    """Compile the kernels into the clone, then build the wheel that points to it."""
    compile_all()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """The sources, csrc among them; nothing is compiled."""
    return build_meta.build_sdist(sdist_directory, config_settings)


def compile_all() -> None:
    """Compile what is wanted into ``torchmix/``, and leave there no library from an earlier build.

    Raises RuntimeError where kernels are required and one is missing, ValueError for a setting that is
    not understood.
    """
    settings = toolchain.Settings.from_environment()
    torch = toolchain.find_torch()
    notes: dict[str, str] = {}
    for device in DEVICES:
        reason = compile_kernels.why_not_wanted(device, settings, torch)
        if not compile_kernels.sources(device):
            _remove_library(device)
        elif reason is not None:
            _remove_library(device)
            notes[device] = reason
            _say(f"kernels for {device} are not compiled: {reason}")
        else:
            try:
                built = compile_kernels.build(device, settings, torch=torch)
            except BuildError as error:
                _remove_library(device)
                notes[device] = str(error)
                _report_failure(device, error, settings.require)
            else:
                _say(f"torchmix/{built.library.name}: {built}")
    _write_notes(notes)


def _report_failure(device: str, error: BuildError, required: bool) -> None:
    """One line about kernels that are missing, as a warning, or as an error where they are required."""
    text = f"kernels for {device} could not be compiled: {error}"
    if error.output:
        log = ROOT / "build" / "kernels" / device / "failure.log"
        log.write_text(error.output, encoding="utf-8")
        text += f" (see {log})"
    if required:
        print(error.output, file=sys.stderr, flush=True)
        raise RuntimeError(f"TORCHMIX_REQUIRE_KERNELS=1, but {text}") from error
    _say(f"WARNING: {text}; ops run on the PyTorch reference")


def _say(text: str) -> None:
    print(f"torchmix: {text}", file=sys.stderr, flush=True)


def _remove_library(device: str) -> None:
    (ROOT / "torchmix" / LIBRARY_NAME[device]).unlink(missing_ok=True)


def _write_notes(notes: dict[str, str]) -> None:
    """Keep why kernels are missing for ``torchmix env``: pip shows no output of a build that succeeds."""
    NOTES.unlink(missing_ok=True)
    if notes:
        NOTES.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


def _remove_leftovers() -> None:
    """Remove setuptools' own copies from an earlier wheel, which would go into this one too."""
    for folder in (ROOT / "build").glob("lib*"):
        shutil.rmtree(folder)


class PlatformWheel(bdist_wheel):
    """A wheel for one platform where it holds kernels, for every platform where it does not.

    The kernels have no Python symbol, so the tag is py3-none in both cases.
    """

    def finalize_options(self) -> None:
        """Tell setuptools about the libraries, which it did not build."""
        if any((ROOT / "torchmix").glob("_C*.so")):
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """py3, none, and the platform or "any"."""
        return ("py3", "none", super().get_tag()[2])


class SourceDistribution(sdist):
    """The package and csrc, without what was compiled from it."""

    def make_distribution(self) -> None:
        """Add csrc to setuptools' list of files, and take out what was made by a build."""
        files = [
            path for path in Path("csrc").rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        self.filelist.extend([str(path) for path in sorted(files)])
        self.filelist.exclude_pattern("*.so", anchor=False)
        self.filelist.exclude_pattern(NOTES.name, anchor=False)
        super().make_distribution()
