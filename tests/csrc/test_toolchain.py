"""What the build step finds to compile with, and the settings it understands."""

from __future__ import annotations

from pathlib import Path

import pytest
import toolchain
from toolchain import Settings, Torch


def test_settings_by_default() -> None:
    settings = Settings.from_environment({})
    assert settings == Settings("auto", False, ("80+ptx", "90a"), toolchain.available_cores())


def test_settings_from_variables() -> None:
    variables = {
        "TORCHMIX_BUILD_CUDA": "1",
        "TORCHMIX_REQUIRE_KERNELS": "1",
        "TORCHMIX_CUDA_ARCHS": "8.6, 9.0a;12.0+PTX",
        "MAX_JOBS": "3",
    }
    assert Settings.from_environment(variables) == Settings("1", True, ("86", "90a", "120+ptx"), 3)


@pytest.mark.parametrize(
    "name, value",
    [
        ("TORCHMIX_BUILD_CUDA", "yes"),
        ("TORCHMIX_REQUIRE_KERNELS", "true"),
        ("TORCHMIX_CUDA_ARCHS", "hopper"),
        ("TORCHMIX_CUDA_ARCHS", "90a -Xptxas=-O0"),
        ("MAX_JOBS", "0"),
    ],
)
def test_settings_that_are_not_understood(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="is not understood"):
        Settings.from_environment({name: value})


def test_one_binary_for_several_gpus() -> None:
    assert toolchain.gencode_flags(("80+ptx", "90a")) == [
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


@pytest.mark.parametrize(
    "text, version, cuda",
    [
        (
            "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n",
            "2.13.0+cpu",
            None,
        ),
        ("__version__ = '2.11.0+cu130'\ncuda: Optional[str] = '13.0'\n", "2.11.0+cu130", "13.0"),
        ('__version__ = "2.12.0"\ncuda = "12.8"\n', "2.12.0", "12.8"),
    ],
)
def test_torch_is_read_from_its_files(
    text: str, version: str, cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError\n")
    (package / "version.py").write_text(text)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    assert toolchain.find_torch() == Torch(package, version, cuda)


def test_nvcc_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "USUAL_CUDA_FOLDER", tmp_path / "usual")
    programs = {name: tmp_path / name / "bin" / "nvcc" for name in ("home", "path", "usual", "named")}
    for program in programs.values():
        program.parent.mkdir(parents=True)
        program.touch(0o755)
    nothing = {"PATH": str(tmp_path)}
    on_path = {"PATH": str(programs["path"].parent)}
    home = {"CUDA_HOME": str(tmp_path / "home")}
    assert toolchain.find_nvcc(nothing) == str(programs["usual"])
    assert toolchain.find_nvcc(on_path) == str(programs["path"])
    assert toolchain.find_nvcc({**on_path, **home}) == str(programs["home"])
    assert toolchain.find_nvcc({**on_path, **home, "CUDACXX": str(programs["named"])}) == str(
        programs["named"]
    )
    assert toolchain.find_nvcc({**nothing, "CUDA_HOME": str(tmp_path / "empty")}) is None


def test_cxx_may_hold_arguments(tmp_path: Path) -> None:
    for name in ("clang++", "ccache"):
        (tmp_path / name).touch(0o755)
    environment = {"PATH": str(tmp_path)}
    assert toolchain.find_cxx(environment) == [str(tmp_path / "clang++")]
    assert toolchain.find_cxx({**environment, "CXX": "ccache clang++ -m64"}) == [
        str(tmp_path / "ccache"),
        "clang++",
        "-m64",
    ]
    assert toolchain.find_cxx({**environment, "CXX": "missing++"}) is None


def test_release_of_nvcc() -> None:
    assert toolchain.cuda_release("Cuda compilation tools, release 12.8, V12.8.93") == (12, 8)
    assert toolchain.cuda_release("something else") is None
