"""The project to compile that the tests of the build step share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.csrc.fake_project import Tree

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A copy with two CUDA sources, nvcc, and a torch for CUDA."""
    root, programs = tmp_path / "project", tmp_path / "bin"
    programs.mkdir()
    (root / "torchmix").mkdir(parents=True)
    (root / "torchmix" / "__init__.py").touch()
    (root / "csrc").mkdir()
    for path in (ROOT / "csrc").glob("*.py"):
        shutil.copy(path, root / "csrc")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    search = [str(tmp_path / "site"), str(root / "csrc")]
    kept = {
        name: value for name, value in os.environ.items() if name in ("HOME", "TMPDIR", "LD_LIBRARY_PATH")
    }
    tree = Tree(root, programs, tmp_path / "commands.txt")
    tree.environment = {
        **kept,
        "PATH": str(programs),
        "PYTHONPATH": os.pathsep.join(search),
        "CUDA_HOME": str(tmp_path / "no_cuda_here"),
        "COMPILER_LOG": str(tree.log),
    }
    tree.set_torch("2.11.0+cu130", "13.0")
    tree.add_compiler("nvcc")
    tree.write("cuda/one.cu", '#include "shared.cuh"\n')
    tree.write("cuda/two.cu", "// nothing\n")
    tree.write("cuda/shared.cuh", '#include "cuda/deep.h"\n')
    tree.write("cuda/deep.h", "// 1\n")
    return tree
