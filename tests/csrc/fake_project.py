"""A small copy of the project with compilers and a torch that are only scripts and text."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# Writes its arguments into $COMPILER_LOG and something into the file after -o; fails where the first line of a
# source is "#error", and warns where it is "#warning". Needs nothing from PATH.
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0; fi
echo "${0##*/} $*" >> "$COMPILER_LOG"
for argument in "$@"; do
    case "$argument" in *.cu | *.cpp)
        read -r first < "$argument"
        if [ "$first" = "#error" ]; then echo "$argument(1): error: it is broken" >&2; exit 2; fi
        if [ "$first" = "#warning" ]; then echo "$argument(1): warning: it is ugly" >&2; fi
    esac
    if [ "$previous" = -o ]; then echo "$*" > "$argument"; fi
    previous=$argument
done
"""


@dataclass
class Tree:
    """The copy: its folder, the folder that is PATH, and what runs in it sees as the environment."""

    root: Path
    bin: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)

    def add_compiler(self, name: str) -> None:
        """A fake compiler on PATH."""
        path = self.bin / name
        path.write_text(COMPILER, encoding="utf-8")
        path.chmod(0o755)

    def set_torch(self, version: str, cuda: str | None) -> None:
        """The torch that is installed: only what tells its version, and an import that fails."""
        package = self.root.parent / "site" / "torch"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("raise ImportError('torch must not be imported')\n")
        text = f"__version__ = {version!r}\ndebug = False\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
        (package / "version.py").write_text(text)

    def write(self, name: str, text: str) -> Path:
        """A file of csrc."""
        path = self.root / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the copy."""
        environment = {**self.environment, **variables}
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, check=False
        )

    def compile(self, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The developers' command."""
        return self.run("csrc/compile_kernels.py", *flags, **variables)

    def hook(self, name: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        """One hook of the build backend, and the folder its product is in."""
        products = self.root.parent / "products"
        products.mkdir(exist_ok=True)
        code = f"import build_backend; build_backend.{name}({str(products)!r})"
        return self.run("-c", code, **variables), products

    def commands(self) -> list[str]:
        """What the compilers were asked for since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def library(self, device: str) -> Path:
        """Where the library of "cpu" or "cuda" is put."""
        return self.root / "torchmix" / {"cpu": "_C.so", "cuda": "_C_cuda.so"}[device]
