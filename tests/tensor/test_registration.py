"""Lists of classes that file formats keep."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.prototype.safetensors import safetensors_support, safetensors_utils

from tests.generators import row_bits
from torchmix.tensor import MixedPrecisionTensor, register_with_torchao_safetensors


def test_torchao_flattens_the_weight_into_safetensors_and_back(tmp_path: Path) -> None:
    weight = MixedPrecisionTensor.from_hp(torch.randn(24, 192), row_bits(24), 64)
    experts = MixedPrecisionTensor.from_hp(torch.randn(2, 24, 192), row_bits(48).view(2, 24), 64)
    state = {
        "a.weight": weight,
        "a.bias": torch.randn(24),
        "b.weight": weight.t().bfloat16(),
        "c.experts": experts,
    }
    tensors, metadata = safetensors_support.flatten_tensor_state_dict(state)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        loaded, rest = safetensors_support.unflatten_tensor_state_dict(stored, file.metadata())
    assert not rest
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape


def test_registering_again_changes_nothing() -> None:
    before = list(safetensors_utils.ALLOWED_TENSORS_SUBCLASSES)
    assert register_with_torchao_safetensors()
    assert before == safetensors_utils.ALLOWED_TENSORS_SUBCLASSES
    assert before.count("MixedPrecisionTensor") == 1


@pytest.mark.parametrize("change", ["no module", "no list"])
def test_a_torchao_without_the_lists_is_left_alone(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    if change == "no module":
        monkeypatch.setitem(sys.modules, "torchao.prototype.safetensors", None)
    else:
        monkeypatch.delattr(safetensors_utils, "ALLOWED_TENSORS_SUBCLASSES")
    assert not register_with_torchao_safetensors()
