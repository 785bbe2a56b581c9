"""The package's layer table and size limits, checked on the syntax trees: imports point downwards only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torchmix"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# A unit is a folder of the package, or a file; files named config_*.py belong to the unit config, and so on.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("_extension", "primitives", "packing", "tiles", "accounting", "matmul_precision"),
    ("ops",),
    ("tensor", "evaluation", "capture"),
    ("rounding", "salience", "allocation", "transforms"),
    ("selection", "repacking", "fusing"),
    ("scoring", "sequential", "layer_quantization", "calibration"),
    ("config", "checkpoint_format", "model_card", "hub"),
    ("workflow", "data", "huggingface", "checkpoint_files"),
    ("checkpoint_inspection", "forecast", "tuning"),
    ("checkpoint",),
    ("cli", "demo", "plots"),
    ("__init__", "__main__"),  # the public face: nothing inside the package imports it
)
LAYER = {unit: layer for layer, units in enumerate(LAYERS) for unit in units}
SAME_LAYER = {
    ("packing", "accounting"),
    ("tiles", "packing"),
    ("tiles", "accounting"),
    ("fusing", "repacking"),
    ("workflow", "data"),
    ("cli", "demo"),
    ("cli", "plots"),
}
# Package from outside -> units that may import it. Whatever is not named here may not be imported at all.
THIRD_PARTY = {
    "torch": set(LAYER),
    "numpy": {unit for layer in LAYERS[3:] for unit in layer},
    "safetensors": {unit for layer in LAYERS[5:10] for unit in layer},
    "tqdm": {unit for layer in LAYERS[7:11] for unit in layer},
    "torchao": {"tensor", "config", "cli", "demo"},
    "transformers": {"huggingface"},
    "tokenizers": {"huggingface"},
    "huggingface_hub": {"huggingface", "hub"},
    "datasets": {"data"},
    "matplotlib": {"plots"},
    "triton": {"rounding"},
}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def unit_of(parts: tuple[str, ...]) -> str:
    """The unit of a module's path inside the package, e.g. ("tensor", "dispatch") -> "tensor"."""
    name = parts[0] if parts else "__init__"
    family = name.split("_")[0]
    return family if name not in LAYER and family in LAYER else name


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, inside functions too; "*" stands for a star import."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            inside = module == "torchmix"  # from torchmix import X: X may be a module
            modules = {path.stem for path in PACKAGE.iterdir()} if inside else set()
            for alias in node.names:
                yield (
                    "*"
                    if alias.name == "*"
                    else f"{module}.{alias.name}"
                    if alias.name in modules
                    else module
                )


def fault(unit: str, imported: str) -> str | None:
    """Why a file of `unit` may not import the module `imported`, or None."""
    top, *rest = imported.split(".")
    if top == "torchmix":
        target = unit_of(tuple(rest))
        if target not in LAYER:
            return f"{target} is in no layer: add it to LAYERS"
        downwards = LAYER[target] < LAYER[unit] or target == unit or (unit, target) in SAME_LAYER
        return None if downwards else f"layer {LAYER[unit]} must not import layer {LAYER[target]}"
    if imported == "*":
        return "name what is imported"
    if top in sys.stdlib_module_names or unit in THIRD_PARTY.get(top, set()):
        return None
    return f"{unit} must not import {top}; allowed in {sorted(THIRD_PARTY.get(top, set()))}"


@pytest.mark.parametrize("path", python_files("torchmix"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    unit = unit_of(path.relative_to(PACKAGE).with_suffix("").parts)
    assert unit in LAYER, f"{unit} is in no layer: add it to LAYERS"
    faults = [f"{name}: {why}" for name in imported_modules(path) if (why := fault(unit, name))]
    assert not faults, "; ".join(faults)


@pytest.mark.parametrize(
    ("unit", "imported", "allowed"),
    [
        ("ops", "torchmix.packing", True),
        ("ops", "torchmix.ops.mixed_linear", True),
        ("ops", "torchmix.tensor", False),
        ("packing", "torchmix.primitives", False),
        ("workflow", "torchmix.data", True),
        ("data", "torchmix.workflow", False),
        ("checkpoint", "torchmix.checkpoint_shards", True),
        ("cli", "torchmix", False),
        ("tensor", "torchao.utils", True),
        ("rounding", "torchao.utils", False),
        ("workflow", "transformers", False),
        ("rounding", "numpy", True),
        ("capture", "numpy", False),
        ("cli", "*", False),
        ("cli", "yaml", False),
        ("packing", "dataclasses", True),
    ],
)
def test_the_rule_itself(unit: str, imported: str, allowed: bool) -> None:
    assert (fault(unit, imported) is None) == allowed


@pytest.mark.parametrize(
    "path", python_files("torchmix", "tests"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    assert lines <= MAX_FILE_LINES, f"{lines} lines in {path.name}, at most {MAX_FILE_LINES}: split it"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines, at most {MAX_FUNCTION_LINES}"


def test_every_assert_of_the_package_has_a_message() -> None:
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in python_files("torchmix")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and node.msg is None
    ]
    assert not silent, f"assert without a message: {silent}"


def test_every_module_has_its_test_file() -> None:
    modules = [
        path.relative_to(PACKAGE) for path in python_files("torchmix") if not path.stem.startswith("__")
    ]
    expected = [ROOT / "tests" / path.parent / f"test_{path.stem.lstrip('_')}.py" for path in modules]
    missing = [str(path.relative_to(ROOT)) for path in expected if not path.is_file()]
    assert not missing, f"test files that mirror a module but do not exist: {missing}"


def test_import_is_lean() -> None:
    code = (
        "import sys, torch, torchmix\n"
        "assert not torch.cuda.is_initialized(), 'CUDA was initialised'\n"
        "print(*(name for name in ('matplotlib', 'datasets', 'pandas') if name in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stdout.strip(), f"import torchmix also imported {result.stdout.strip()}"
