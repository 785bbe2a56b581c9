"""The public names exist, are documented, and are what torchao and torch.load find them under."""

from __future__ import annotations

import inspect

import pytest
import torch
from torchao.core.config import ALLOWED_AO_MODULES

import torchmix


@pytest.mark.parametrize("name", torchmix.__all__)
def test_public_names_are_documented_and_annotated(name):
    public = getattr(torchmix, name)
    assert inspect.getdoc(public)
    if inspect.isfunction(public):
        signature = inspect.signature(public)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_nothing_else_looks_public():
    functions = {
        name for name, value in vars(torchmix).items() if inspect.isroutine(value) or inspect.isclass(value)
    }
    assert {name for name in functions if not name.startswith("_")} - set(torchmix.__all__) <= {"Path"}


def test_classes_are_found_under_the_package_name():
    assert torchmix.MixedPrecisionTensor.__module__ == "torchmix"
    assert torchmix.MixLLMConfig.__module__ == "torchmix"
    assert "torchmix" in ALLOWED_AO_MODULES
    assert torchmix.MixedPrecisionTensor in torch.serialization.get_safe_globals()
