"""Build step, part 1: what there is to compile with. Finds torch without importing it, nvcc and a C++ compiler.

Needs the standard library only. Settings come from the environment, see ``Settings``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# PTX of compute capability 8.0 serves every GPU that has no machine code of its own in the library.
DEFAULT_CUDA_ARCHS = ("80+ptx", "90a")
USUAL_CUDA_FOLDER = Path("/usr/local/cuda")


@dataclass(frozen=True)
class Settings:
    """What the caller asks for.

    build_cuda: "auto", "0" or "1" (TORCHMIX_BUILD_CUDA). require: a kernel that is missing is an error
    (TORCHMIX_REQUIRE_KERNELS=1). cuda_archs: such as ("80+ptx", "90a") (TORCHMIX_CUDA_ARCHS, separated by
    commas, semicolons or spaces). jobs: compilers that run at a time (MAX_JOBS, default: the cores). sanitize: CPU
    kernels check addresses and undefined behaviour; for tests.
    """

    build_cuda: str = "auto"
    require: bool = False
    cuda_archs: tuple[str, ...] = DEFAULT_CUDA_ARCHS
    jobs: int = 1
    sanitize: bool = False

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
        """The settings in these variables. Raises ValueError where a value is not understood."""
        build_cuda = environment.get("TORCHMIX_BUILD_CUDA") or "auto"
        if build_cuda not in ("auto", "0", "1"):
            raise ValueError(f"TORCHMIX_BUILD_CUDA={build_cuda!r} is not understood; set it to auto, 0 or 1")
        require = environment.get("TORCHMIX_REQUIRE_KERNELS") or "0"
        if require not in ("0", "1"):
            raise ValueError(f"TORCHMIX_REQUIRE_KERNELS={require!r} is not understood; set it to 0 or 1")
        jobs = environment.get("MAX_JOBS") or str(available_cores())
        if not jobs.isdecimal() or int(jobs) < 1:
            raise ValueError(f"MAX_JOBS={jobs!r} is not understood; set it to a number of processes")
        archs = parse_cuda_archs(environment.get("TORCHMIX_CUDA_ARCHS", ""))
        return Settings(build_cuda, require == "1", archs, int(jobs))


@dataclass(frozen=True)
class Torch:
    """The torch that the kernels are compiled against.

    root: its package folder. version: such as "2.13.0+cpu". cuda: CUDA version it was built with, or None.
    """

    root: Path
    version: str
    cuda: str | None


def available_cores() -> int:
    """Cores this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def parse_cuda_archs(text: str) -> tuple[str, ...]:
    """ "8.0+PTX;90a" -> ("80+ptx", "90a"); nothing -> the default. Raises ValueError for anything else."""
    archs = tuple(part.replace(".", "").lower() for part in re.split(r"[,;\s]+", text) if part)
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(\+ptx)?", arch):
            raise ValueError(
                f"CUDA architecture {arch!r} is not understood; write such as 80, 9.0a or 80+PTX, "
                "separated by commas"
            )
    return archs or DEFAULT_CUDA_ARCHS


def gencode_flags(archs: tuple[str, ...]) -> list[str]:
    """The flags of nvcc for one binary with machine code for each of ``archs``, and PTX where "+ptx" says so."""
    flags = []
    for arch in archs:
        name = arch.removesuffix("+ptx")
        code = f"[sm_{name},compute_{name}]" if arch.endswith("+ptx") else f"sm_{name}"
        flags.append(f"-gencode=arch=compute_{name},code={code}")
    return flags


def find_torch() -> Torch | None:
    """The torch that an import would find, read from its files; None where there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    version_file = root / "version.py"
    if not version_file.is_file():
        return None
    text = version_file.read_text(encoding="utf-8")
    version = _assigned(text, "__version__")
    return None if version is None else Torch(root, version, _assigned(text, "cuda"))


def _assigned(text: str, name: str) -> str | None:
    """The string a module assigns to ``name``, annotated or not; None where it assigns None or nothing."""
    match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match and match.group(1)


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """nvcc by $CUDACXX, $CUDA_HOME, $CUDA_PATH or PATH, in this order; None without one.

    The folder where CUDA is usually installed is looked into where no variable names another.
    """
    homes = [Path(environment[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environment.get(name)]
    candidates = [environment.get("CUDACXX") or "", *(str(home / "bin" / "nvcc") for home in homes), "nvcc"]
    if not homes:
        candidates.append(str(USUAL_CUDA_FOLDER / "bin" / "nvcc"))
    path = environment.get("PATH", "")
    return next((found for name in candidates if name and (found := shutil.which(name, path=path))), None)


def find_cxx(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler by $CXX (which may hold arguments), else g++ or clang++; None without one."""
    path = environment.get("PATH", "")
    candidates = (
        [shlex.split(environment["CXX"])] if environment.get("CXX") else [["g++"], ["clang++"], ["c++"]]
    )
    for command in candidates:
        found = shutil.which(command[0], path=path)
        if found is not None:
            return [found, *command[1:]]
    return None


def compiler_version(command: list[str]) -> str:
    """What the compiler prints about its version. Raises OSError where it does not run."""
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or result.stderr.strip()


def cuda_release(version_text: str) -> tuple[int, int] | None:
    """(13, 0) from what ``nvcc --version`` prints; None where it names no release."""
    match = re.search(r"release (\d+)\.(\d+)", version_text)
    return match and (int(match.group(1)), int(match.group(2)))
