"""What is installed and how: one version, exact pins inside the ranges, the demo model in the wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOP_LEVEL = {
    *("pyproject.toml", "torchmix", "csrc", "tests", "benchmarks", "tutorials"),
    *("README.md", "LICENSE", "CHANGELOG.md"),
}


def pins() -> dict[str, str]:
    """Package -> exact version, from the constraints file."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def direct_requirements() -> list[Requirement]:
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    return [
        requirement
        for text in texts
        if (requirement := Requirement(text)).name not in ("torchmix", "setuptools")
    ]


@pytest.mark.parametrize("requirement", direct_requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    pin = pins().get(requirement.name)
    assert pin is not None, f"{requirement.name} has no exact version in .ci/constraints.txt"
    assert requirement.specifier.contains(pin), (
        f"{requirement.name}=={pin} is outside {requirement.specifier}"
    )


def test_top_level_is_the_fixed_list() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_build_backend_is_in_the_clone_and_needs_no_torch() -> None:
    system = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert (ROOT / system["backend-path"][0] / f"{system['build-backend']}.py").is_file()
    assert not [text for text in system["requires"] if Requirement(text).name == "torch"]


def test_changelog_names_the_version() -> None:
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_wheel_holds_the_package_and_the_demo_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "torchmix", source / "torchmix", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "csrc").mkdir()
    for path in (ROOT / "csrc").glob("*.py"):  # the build backend; tests/csrc has what it compiles
        shutil.copy(path, source / "csrc")
    build = (
        "import sys; sys.path.insert(0, 'csrc'); import build_backend; build_backend.build_wheel(sys.argv[1])"
    )
    command = [sys.executable, "-c", build, str(tmp_path)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(next(tmp_path.glob("torchmix-*.whl"))) as wheel:
        names = set(wheel.namelist())
        entry_points = next(name for name in names if name.endswith("/entry_points.txt"))
        assert "torchmix = torchmix.cli:main" in wheel.read(entry_points).decode()
    model = ROOT / "torchmix" / "demo" / "wiki-llama-5m"
    assert {f"torchmix/demo/{model.name}/{path.name}" for path in model.iterdir()} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "torchmix").rglob("*.py")}
    assert modules <= names, f"not in the wheel: {sorted(modules - names)}"
    assert "torchmix/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "csrc"))]
