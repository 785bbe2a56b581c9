"""Installing: kernels are compiled on the way, and a failure is one line unless kernels are required."""

from __future__ import annotations

import json
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.csrc.fake_project import Tree

PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")


def wheel_of(products: Path) -> tuple[str, set[str], str]:
    """Name, members and WHEEL file of the only wheel in a folder, which is removed."""
    (path,) = products.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        text = wheel.read(next(name for name in names if name.endswith("/WHEEL"))).decode()
    path.unlink()
    return path.name, names, text


def notes(tree: Tree) -> dict[str, str]:
    path = tree.root / "torchmix" / "_build_notes.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_wheel_with_kernels_is_for_one_platform_and_any_python(tree: Tree) -> None:
    result, products = tree.hook("build_wheel")
    assert result.returncode == 0, result.stderr
    assert "torchmix: torchmix/_C_cuda.so: 2 of 2 files compiled" in result.stderr
    name, members, text = wheel_of(products)
    assert name.endswith(f"-py3-none-{PLATFORM}.whl")
    assert f"Tag: py3-none-{PLATFORM}" in text
    assert "Root-Is-Purelib: false" in text
    assert "torchmix/_C_cuda.so" in members
    assert not [member for member in members if "csrc" in member or "notes" in member]

    result, products = tree.hook("build_wheel", TORCHMIX_BUILD_CUDA="0")
    name, members, text = wheel_of(products)
    assert name.endswith("-py3-none-any.whl"), "nothing is left of the build before"
    assert "torchmix/_C_cuda.so" not in members
    assert "torchmix/_build_notes.json" in members
    assert "Root-Is-Purelib: true" in text
    assert notes(tree) == {"cuda": "TORCHMIX_BUILD_CUDA=0"}


def test_editable_install_compiles_into_the_clone(tree: Tree) -> None:
    result, products = tree.hook("build_editable")
    assert result.returncode == 0, result.stderr
    assert tree.library("cuda").exists()
    assert wheel_of(products)[0].endswith(f"editable-py3-none-{PLATFORM}.whl")


def test_failure_is_one_line_and_the_installation_goes_on(tree: Tree) -> None:
    tree.write("cuda/two.cu", "#error\n")
    tree.library("cuda").write_text("from an earlier build")
    result, products = tree.hook("build_wheel")
    assert result.returncode == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert "kernels for cuda could not be compiled: nvcc failed on csrc/cuda/two.cu with status 2" in warning
    assert "error: it is broken" in warning
    assert warning.endswith("ops run on the PyTorch reference")
    assert "it is broken" in (tree.root / "build" / "kernels" / "cuda" / "failure.log").read_text()
    assert wheel_of(products)[0].endswith("-py3-none-any.whl")
    assert not tree.library("cuda").exists(), (
        "a library from other sources would be called with wrong arguments"
    )
    assert "nvcc failed" in notes(tree)["cuda"]


@pytest.mark.parametrize("fault", ["source", "nvcc"])
def test_required_kernels_fail_the_installation(tree: Tree, fault: str) -> None:
    if fault == "source":
        tree.write("cuda/two.cu", "#error\n")
    else:
        (tree.bin / "nvcc").unlink()
    result, products = tree.hook("build_wheel", TORCHMIX_REQUIRE_KERNELS="1")
    assert result.returncode != 0
    assert (
        "RuntimeError: TORCHMIX_REQUIRE_KERNELS=1, but kernels for cuda could not be compiled"
        in result.stderr
    )
    assert not list(products.iterdir())


def test_bare_machine_with_torch_for_the_cpu(tree: Tree) -> None:
    (tree.bin / "nvcc").unlink()
    tree.set_torch("2.13.0+cpu", None)
    result, products = tree.hook("build_wheel", TORCHMIX_REQUIRE_KERNELS="1")
    assert result.returncode == 0, "CUDA kernels are of no use there, so they are not missing"
    assert "WARNING" not in result.stderr
    assert notes(tree) == {"cuda": "torch 2.13.0+cpu is built without CUDA"}
    assert wheel_of(products)[0].endswith("-py3-none-any.whl")


def test_sdist_holds_csrc_and_nothing_compiled(tree: Tree) -> None:
    tree.compile("--cuda")
    result, products = tree.hook("build_sdist")
    assert result.returncode == 0, result.stderr
    (path,) = products.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {
        path.relative_to(tree.root).as_posix() for path in (tree.root / "csrc").rglob("*") if path.is_file()
    }
    assert {name for name in sources if "__pycache__" not in name} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
