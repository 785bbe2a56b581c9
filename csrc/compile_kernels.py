"""Build step, part 2: compile ``csrc/cuda`` and ``csrc/cpu`` into ``torchmix/_C_cuda.so`` and ``torchmix/_C.so``.

For developers: ``python csrc/compile_kernels.py --cuda --verbose`` builds in place. The build backend
(``build_backend.py``) does the same when torchmix is installed. The libraries use torch's stable ABI, so that one
file serves every torch from 2.11 on and every Python. Objects are kept in ``build/kernels`` under a hash of
their command, sources and headers; what has not changed is not compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import ptxas_report
import toolchain
from toolchain import Settings, Torch

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("cpu", "cuda")
LIBRARY_NAME = {"cpu": "_C.so", "cuda": "_C_cuda.so"}
# Errors end the process; -O1, later on the command line than -O3, keeps lines apart.
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g1",
    "-O1",
)
SOURCE_SUFFIX = {"cpu": ".cpp", "cuda": ".cu"}
TORCH_TARGET = (
    "0x020a000000000000ULL"  # the stable ABI of torch 2.10: all that is used, with a version to spare
)
# Change what the compilers do without showing up in a command, so they are part of the hash.
HIDDEN_FLAGS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CPATH", "CPLUS_INCLUDE_PATH")


class BuildError(Exception):
    """A library could not be built. The text is one line; ``output`` is all that the compiler said."""

    def __init__(self, text: str, output: str = "") -> None:
        super().__init__(text)
        self.output = output


@dataclass(frozen=True)
class Toolchain:
    """How one library is compiled.

    compile: command up to the source. link: command up to the objects. libraries: what follows the objects.
    version: what identifies the compiler and torch beyond the commands. parallel: flags of ``compile`` that
    change its speed alone.
    """

    compile: tuple[str, ...]
    link: tuple[str, ...]
    libraries: tuple[str, ...]
    version: str
    parallel: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """One source file on its way: its object, and the log of the compiler beside it. cached: was there already."""

    source: Path
    object: Path
    log: Path
    cached: bool = False
    seconds: float = 0.0

    def warnings(self) -> str:
        """What the compiler said besides the notes about resources, "" for nothing."""
        return ptxas_report.without_notes(self.log.read_text(encoding="utf-8")).strip()


@dataclass(frozen=True)
class Built:
    """A finished library: where it is, and what was done for it."""

    library: Path
    units: tuple[Unit, ...]

    def __str__(self) -> str:
        fresh = [unit for unit in self.units if not unit.cached]
        size = self.library.stat().st_size / 1e6
        return f"{len(fresh)} of {len(self.units)} files compiled, {size:.1f} MB"


def sources(device: str, root: Path = ROOT) -> list[Path]:
    """The source files of ``device`` ("cpu", "cuda"), sorted."""
    return sorted((root / "csrc" / device).rglob(f"*{SOURCE_SUFFIX[device]}"))


def why_not_wanted(device: str, settings: Settings, torch: Torch | None) -> str | None:
    """Why kernels for ``device`` are not built although nothing is amiss; None where they are wanted."""
    if device != "cuda":
        return None
    if settings.build_cuda == "0":
        return "TORCHMIX_BUILD_CUDA=0"
    if settings.build_cuda == "auto" and torch is not None and torch.cuda is None:
        return f"torch {torch.version} is built without CUDA"
    return None


def build(
    device: str,
    settings: Settings,
    *,
    torch: Torch | None,
    warnings_are_errors: bool = False,
    root: Path = ROOT,
) -> Built:
    """Compile and link the library of ``device`` into ``root/torchmix``. Raises BuildError."""
    if torch is None:
        raise BuildError(
            "no torch is visible to this build; install torch first and use --no-build-isolation"
        )
    make = _cuda_toolchain if device == "cuda" else _cpu_toolchain
    found = sources(device, root)
    tools = make(settings, torch, root)
    folder = root / "build" / "kernels" / device
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(settings.jobs) as pool:
        results = list(pool.map(lambda source: _compile_or_error(source, tools, folder, root), found))
    errors = [result for result in results if isinstance(result, BuildError)]
    if errors:
        more = f" ({len(errors) - 1} more files failed)" if len(errors) > 1 else ""
        raise BuildError(f"{errors[0]}{more}", "\n".join(error.output for error in errors))
    units = tuple(result for result in results if isinstance(result, Unit))
    if warnings_are_errors:
        _refuse_warnings(units)
    library = root / "torchmix" / LIBRARY_NAME[device]
    _link(units, tools, folder, library)
    return Built(library, units)


def _refuse_warnings(units: tuple[Unit, ...]) -> None:
    """Raise BuildError where the compiler warned, now or when it made an object that is still in use."""
    outputs = [warnings for unit in units if (warnings := unit.warnings())]
    if outputs:
        first = next(
            (line for line in outputs[0].splitlines() if "warning" in line), outputs[0].splitlines()[0]
        )
        raise BuildError(f"a warning counts as an error: {first.strip()}", "\n".join(outputs))


def _cuda_toolchain(settings: Settings, torch: Torch, root: Path) -> Toolchain:
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found; install the CUDA toolkit, or set CUDA_HOME")
    version = _version([nvcc])
    _check_release(settings, torch, version)
    host = toolchain.find_cxx() if os.environ.get("CXX") else None
    common = [nvcc, *(["-ccbin", host[0]] if host else [])]
    command = [*common, "-std=c++20", "-O3", *toolchain.gencode_flags(settings.cuda_archs)]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-Xptxas=-v", "--expt-relaxed-constexpr"]
    command += ["-DUSE_CUDA", *_torch_flags(torch, root)]
    link = [*common, "-shared", "-cudart=static", *toolchain.gencode_flags(settings.cuda_archs)]
    # Some symbols live in libtorch_cuda, which a torch without CUDA does not have. libtorch names all parts
    # of the torch at hand as its own needs, so it is kept and they are found when the library is loaded.
    libraries = [f"-L{torch.root / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu"]
    threads = settings.jobs // len(
        sources("cuda", root)
    )  # one for each architecture, where there are cores for it
    parallel = (f"--threads={min(threads, len(settings.cuda_archs))}",) if threads > 1 else ()
    return Toolchain((*command, "-c"), tuple(link), tuple(libraries), f"{version}\n{torch.version}", parallel)


def _check_release(settings: Settings, torch: Torch, version: str) -> None:
    """Raise BuildError where "auto" would build kernels that the GPU's driver may be too old for."""
    release = toolchain.cuda_release(version)
    if settings.build_cuda != "auto" or release is None or torch.cuda is None:
        return
    if release[0] > int(torch.cuda.split(".")[0]):
        raise BuildError(
            f"nvcc {release[0]}.{release[1]} is newer than the CUDA {torch.cuda} of torch {torch.version}, and the "
            "driver may be too old for it; TORCHMIX_BUILD_CUDA=1 compiles all the same"
        )


def _cpu_toolchain(settings: Settings, torch: Torch, root: Path) -> Toolchain:
    cxx = toolchain.find_cxx()
    if cxx is None:
        raise BuildError(f"no C++ compiler was found ({os.environ.get('CXX') or 'g++, clang++'})")
    command = [*cxx, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    command.append("-ffp-contract=off")  # the formula of the activations' codes rounds every product
    command += _torch_flags(torch, root)
    checks = SANITIZE if settings.sanitize else ()
    command += checks
    libraries = (f"-L{torch.root / 'lib'}", "-ltorch_cpu")
    return Toolchain(
        (*command, "-c"), (*cxx, *checks, "-shared"), libraries, f"{_version(cxx)}\n{torch.version}"
    )


def _torch_flags(torch: Torch, root: Path) -> list[str]:
    return [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-I{root / 'csrc'}",
        "-isystem",
        str(torch.root / "include"),
    ]


def _version(command: list[str]) -> str:
    try:
        return toolchain.compiler_version(command)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error


def _compile_or_error(source: Path, tools: Toolchain, folder: Path, root: Path) -> Unit | BuildError:
    """``_compile``, with the error as a result, so that every file that fails is named."""
    try:
        return _compile(source, tools, folder, root)
    except BuildError as error:
        return error


def _compile(source: Path, tools: Toolchain, folder: Path, root: Path) -> Unit:
    """Compile one file, unless its object is there. Raises BuildError with the first error in its text."""
    digest = _digest([*tools.compile, tools.version], [source, *headers(source, root / "csrc")], root)
    name = "-".join(source.relative_to(root / "csrc").parts[1:])
    target = folder / f"{name}.{digest}.o"
    log = target.with_suffix(".log")
    if target.is_file() and log.is_file():
        return Unit(source, target, log, cached=True)
    start = time.monotonic()
    temporary = target.with_suffix(f".{os.getpid()}.tmp.o")
    command = [*tools.compile, *tools.parallel, str(source), "-o", str(temporary)]
    output = _run(command, source.relative_to(root), temporary)
    log.write_text(output, encoding="utf-8")
    temporary.replace(target)
    for old in folder.glob(f"{name}.*"):
        if old.suffix in (".o", ".log") and ".tmp" not in old.name and old not in (target, log):
            old.unlink(missing_ok=True)
    return Unit(source, target, log, seconds=time.monotonic() - start)


def _link(units: tuple[Unit, ...], tools: Toolchain, folder: Path, library: Path) -> None:
    """Link into ``build`` unless that is there already, then put a copy in place, by renaming."""
    objects = [str(unit.object) for unit in units]
    digest = _digest([*tools.link, *objects, *tools.libraries, tools.version], [], folder)
    linked = folder / f"{library.stem}.{digest}.so"
    temporary = linked.with_suffix(f".{os.getpid()}.tmp")
    if not linked.is_file():
        _run([*tools.link, *objects, "-o", str(temporary), *tools.libraries], Path(library.name), temporary)
        for old in folder.glob(f"{library.stem}.*.so"):
            old.unlink(missing_ok=True)
        temporary.replace(linked)
    in_place = library.with_name(f"{library.name}.{os.getpid()}.tmp")  # a running process keeps the old file
    shutil.copy2(linked, in_place)
    in_place.replace(library)


def _run(command: list[str], name: Path, product: Path) -> str:
    """Run a compiler and return what it said. Raises BuildError where it fails or makes no ``product``."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error})") from error
    output = result.stdout + result.stderr
    if result.returncode != 0 or not product.is_file():
        product.unlink(missing_ok=True)
        lines = ptxas_report.without_notes(output).splitlines()
        first = next(
            (line for line in lines if re.search(r"\b(error|fatal)\b", line)), (lines or ["no output"])[0]
        )
        raise BuildError(
            f"{Path(command[0]).name} failed on {name} with status {result.returncode}: {first.strip()}",
            f"{' '.join(command)}\n{output}",
        )
    return output


def headers(source: Path, base: Path) -> list[Path]:
    """Files that ``source`` includes in quotes, and they in turn, looked for beside the file and in ``base``."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(
            r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE
        ):
            matches = (folder / name for folder in (path.parent, base))
            header = next((match.resolve() for match in matches if match.is_file()), None)
            if header is not None and header not in found:
                found[header] = None
                waiting.append(header)
    return sorted(found)


def _digest(words: list[str], files: list[Path], root: Path) -> str:
    """16 hexadecimal digits that name these words and the contents of these files."""
    digest = hashlib.sha256()
    for word in [*words, *(f"{name}={os.environ.get(name, '')}" for name in HIDDEN_FLAGS)]:
        digest.update(word.encode() + b"\0")
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 0, or 1 where a library could not be built."""
    options = _parser().parse_args(arguments)
    settings = Settings.from_environment()
    if options.archs:
        settings = dataclasses.replace(settings, cuda_archs=toolchain.parse_cuda_archs(options.archs))
    settings = dataclasses.replace(settings, sanitize=options.sanitize)
    if options.cuda:
        settings = dataclasses.replace(settings, build_cuda="1")
    chosen = [device for device in DEVICES if getattr(options, device)] or DEVICES
    torch = toolchain.find_torch()
    failures = [device for device in chosen if not _build_and_report(device, settings, torch, options)]
    return 1 if failures else 0


def _build_and_report(
    device: str, settings: Settings, torch: Torch | None, options: argparse.Namespace
) -> bool:
    """Build one library and print what was done; False where that failed."""
    reason = why_not_wanted(device, settings, torch)
    if not sources(device):
        reason = f"csrc/{device} has no {SOURCE_SUFFIX[device]} files"
    if reason is not None:
        print(f"{device}: not built, {reason}")
        return not getattr(options, device)
    try:
        built = build(device, settings, torch=torch, warnings_are_errors=options.werror)
    except BuildError as error:
        print(f"{ptxas_report.without_notes(error.output)}\n{device}: {error}", file=sys.stderr)
        return False
    for unit in built.units:
        state = "unchanged" if unit.cached else f"compiled in {unit.seconds:.1f} s"
        print(f"{unit.source.relative_to(ROOT)}: {state}")
        if unit.warnings():
            print(unit.warnings(), file=sys.stderr)
        if options.verbose:
            lines = ptxas_report.kernel_lines(unit.log.read_text(encoding="utf-8"))
            print("".join(f"  {line}\n" for line in lines), end="")
    print(f"{built.library.relative_to(ROOT)}: {built}")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compile torchmix's kernels in place, into torchmix/_C*.so.")
    parser.add_argument(
        "--cuda", action="store_true", help="build the CUDA kernels, whatever torch is installed"
    )
    parser.add_argument("--cpu", action="store_true", help="build the CPU kernels")
    parser.add_argument("--archs", help="GPU architectures, such as 90a or 80+PTX,90a (the default)")
    parser.add_argument(
        "--verbose", action="store_true", help="registers, spills and shared memory of each kernel"
    )
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="CPU kernels with checks of addresses and undefined behaviour; to load them, preload libasan and libubsan",
    )
    parser.add_argument("--werror", action="store_true", help="a warning of the compiler is an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
