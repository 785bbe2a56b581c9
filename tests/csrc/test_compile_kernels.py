"""Compiling in place: which commands, when again, and what a failure says."""

from __future__ import annotations

import shutil
from pathlib import Path

import compile_kernels
import pytest
import toolchain
from toolchain import Settings, Torch

from tests.csrc.fake_project import Tree

CPU_TORCH = Torch(Path("torch"), "2.13.0+cpu", None)
CUDA_TORCH = Torch(Path("torch"), "2.11.0+cu130", "13.0")


def test_cuda_sources_become_one_library(tree: Tree) -> None:
    result = tree.compile("--cuda")
    assert result.returncode == 0, result.stderr
    assert "torchmix/_C_cuda.so: 2 of 2 files compiled" in result.stdout
    *compiled, linked = tree.commands()
    assert sorted(next(word for word in line.split() if word.endswith(".cu")) for line in compiled) == [
        str(tree.root / "csrc" / "cuda" / name) for name in ("one.cu", "two.cu")
    ]
    for flag in (
        *("-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-Xptxas=-v"),
        *("-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a"),
        f"-isystem {tree.root.parent / 'site' / 'torch' / 'include'}",
    ):
        assert all(f" {flag} " in line for line in compiled), flag
    assert "-shared -cudart=static" in linked
    assert linked.endswith("-Xlinker=--no-as-needed -ltorch -ltorch_cpu")
    assert "-ltorch_cuda" not in linked, "a torch without libtorch_cuda would do for linking"
    assert tree.library("cuda").read_text().startswith("-shared")
    assert not list((tree.root / "torchmix").glob("*.tmp"))


def test_only_what_changed_is_compiled_again(tree: Tree) -> None:
    tree.compile("--cuda")
    tree.commands()
    assert "0 of 2 files compiled" in tree.compile("--cuda").stdout
    assert tree.commands() == [], "nothing changed, nothing is linked either"

    tree.write("cuda/two.cu", "// something\n")
    tree.compile("--cuda")
    assert [line.count("two.cu") > 0 for line in tree.commands()] == [True, True], "compiled, then linked"

    tree.write("cuda/deep.h", "// 2\n")
    assert "1 of 2 files compiled" in tree.compile("--cuda").stdout, "one.cu includes it through shared.cuh"
    assert "2 of 2 files compiled" in tree.compile("--cuda", TORCHMIX_CUDA_ARCHS="90a").stdout
    assert "2 of 2 files compiled" in tree.compile("--cuda", NVCC_APPEND_FLAGS="-lineinfo").stdout
    tree.set_torch("2.12.0+cu130", "13.0")
    assert "2 of 2 files compiled" in tree.compile("--cuda").stdout
    assert len(list((tree.root / "build" / "kernels" / "cuda").glob("*.o"))) == 2, "old objects are removed"

    tree.library("cuda").unlink()
    tree.commands()
    tree.compile("--cuda")
    assert tree.library("cuda").exists()
    assert tree.commands() == []


def test_cpu_sources_take_the_cxx_compiler(tree: Tree) -> None:
    tree.add_compiler("g++")
    tree.write("cpu/one.cpp", "// nothing\n")
    result = tree.compile("--cpu")
    assert result.returncode == 0, result.stderr
    compiled, linked = tree.commands()
    assert compiled.startswith("g++ -std=c++20 -O3 -fPIC -fvisibility=hidden")
    assert linked.endswith("-ltorch_cpu")
    assert tree.library("cpu").exists()
    assert not tree.library("cuda").exists()


def test_sanitizers_are_asked_for_in_both_steps(tree: Tree) -> None:
    """And a library without them is another one."""
    tree.add_compiler("g++")
    tree.write("cpu/one.cpp", "// nothing\n")
    assert tree.compile("--cpu", "--sanitize").returncode == 0
    assert all("-fsanitize=address,undefined" in command for command in tree.commands())
    assert tree.compile("--cpu").returncode == 0
    plain = tree.commands()
    assert len(plain) == 2
    assert not any("-fsanitize" in command for command in plain)


def test_errors_are_shown_and_the_old_library_stays(tree: Tree) -> None:
    tree.compile("--cuda")
    before = tree.library("cuda").read_text()
    tree.write("cuda/one.cu", "#error\n")
    tree.write("cuda/two.cu", "#error\n")
    result = tree.compile("--cuda")
    assert result.returncode == 1
    assert "one.cu with status 2" in result.stderr
    assert "two.cu(1): error: it is broken" in result.stderr
    assert "(1 more files failed)" in result.stderr
    assert tree.library("cuda").read_text() == before
    assert not list((tree.root / "build").rglob("*tmp*"))


def test_warnings_are_shown_again_and_can_be_errors(tree: Tree) -> None:
    tree.write("cuda/one.cu", "#warning\n")
    for state in ("compiled in", "unchanged"):
        result = tree.compile("--cuda")
        assert result.returncode == 0
        assert f"csrc/cuda/one.cu: {state}" in result.stdout
        assert "one.cu(1): warning: it is ugly" in result.stderr
    result = tree.compile("--cuda", "--werror")
    assert result.returncode == 1
    assert "a warning counts as an error" in result.stderr
    tree.write("cuda/one.cu", "// nothing\n")
    assert tree.compile("--cuda", "--werror").returncode == 0


def test_what_is_missing_is_named(tree: Tree) -> None:
    (tree.bin / "nvcc").unlink()
    result = tree.compile()
    assert result.returncode == 1
    assert "cuda: nvcc was not found; install the CUDA toolkit, or set CUDA_HOME" in result.stderr
    assert tree.compile("--cpu").returncode == 1, "asked for, but there is no source"
    shutil.rmtree(tree.root.parent / "site")
    code = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p and 'dist-packages' not in p]; "
    code += "import compile_kernels; sys.exit(compile_kernels.main(['--cuda']))"
    assert "no torch is visible to this build" in tree.run("-S", "-c", code).stderr


@pytest.mark.parametrize(
    "build_cuda, torch, wanted",
    [
        ("auto", CUDA_TORCH, True),
        ("auto", CPU_TORCH, False),
        ("auto", None, True),  # and then fails for want of torch, which is worth a line
        ("1", CPU_TORCH, True),
        ("0", CUDA_TORCH, False),
    ],
)
def test_when_cuda_is_wanted(build_cuda: str, torch: Torch | None, wanted: bool) -> None:
    assert (compile_kernels.why_not_wanted("cuda", Settings(build_cuda), torch) is None) == wanted
    assert compile_kernels.why_not_wanted("cpu", Settings(build_cuda), torch) is None


def test_auto_does_not_build_for_a_newer_driver(tree: Tree) -> None:
    tree.set_torch("2.11.0+cu128", "12.8")
    result = tree.compile()
    assert result.returncode == 1
    assert "nvcc 13.0 is newer than the CUDA 12.8 of torch 2.11.0+cu128" in result.stderr
    assert tree.compile(TORCHMIX_BUILD_CUDA="1").returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="no nvcc")
def test_a_real_library(tmp_path: Path) -> None:
    torch = toolchain.find_torch()
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "torchmix").mkdir()
    source = (
        "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/tensor.h>\n"
        "__global__ void nothing() {}\n"
        "void run(const torch::stable::Tensor& x) { nothing<<<1, 1>>>(); }\n"
        'STABLE_TORCH_LIBRARY(torchmix_try, m) { m.def("run(Tensor x) -> ()"); }\n'
        'STABLE_TORCH_LIBRARY_IMPL(torchmix_try, CUDA, m) { m.impl("run", TORCH_BOX(&run)); }\n'
    )
    (tmp_path / "csrc" / "cuda" / "try.cu").write_text(source)
    settings = Settings("1", cuda_archs=("80+ptx", "90a"), jobs=2)
    built = compile_kernels.build("cuda", settings, torch=torch, warnings_are_errors=True, root=tmp_path)
    binary = built.library.read_bytes()
    assert binary.startswith(b"\x7fELF")
    assert b"sm_90a" in binary
    assert b"libtorch.so" in binary, "named as needed, so that libtorch_cuda is found through it"
    assert b"libcudart.so" not in binary
