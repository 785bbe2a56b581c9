"""``print(model)`` of quantized modules, also after copies and pickling."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn

from torchmix.tensor import MixedPrecisionTensor
from torchmix.tensor.module_repr import show_quantized_weights


def quantized_linear(out_features: int = 8) -> nn.Linear:
    layer = nn.Linear(64, out_features)
    layer.weight = nn.Parameter(
        MixedPrecisionTensor.from_hp(layer.weight.detach(), 4, 64), requires_grad=False
    )
    show_quantized_weights(layer)
    return layer


def test_the_module_own_text_comes_first_then_every_quantized_weight():
    text = repr(quantized_linear())
    assert text.startswith("Linear(in_features=64, out_features=8, bias=True, weight=MixedPrecisionTensor(")
    assert "shape=(8, 64), group_size=64" in text
    assert "bits per weight" in text


def test_experts_and_modules_without_text_of_their_own():
    experts = nn.Module()
    for name in ("up", "down"):
        weight = MixedPrecisionTensor.from_hp(torch.randn(2, 8, 64), 4, 64)
        experts.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    show_quantized_weights(experts)
    assert repr(experts).startswith("Module(up=MixedPrecisionTensor(shape=(2, 8, 64)")
    assert ", down=MixedPrecisionTensor(" in repr(experts)


def test_calling_it_again_changes_nothing():
    layer = quantized_linear()
    before = repr(layer)
    show_quantized_weights(layer)
    assert repr(layer) == before


def test_a_weight_that_is_dense_again_is_not_listed():
    layer = quantized_linear()
    layer.weight = nn.Parameter(layer.weight.dequantize())
    assert repr(layer) == "Linear(in_features=64, out_features=8, bias=True)"


def test_an_own_extra_repr_of_the_instance_is_kept():
    layer = nn.Linear(64, 8)
    layer.extra_repr = lambda: "mine"  # type: ignore[method-assign]
    layer.weight = quantized_linear().weight
    show_quantized_weights(layer)
    assert repr(layer).startswith("Linear(mine, weight=MixedPrecisionTensor(")


def test_deepcopy_describes_the_copy_and_not_the_original():
    layer = quantized_linear()
    other = copy.deepcopy(layer)
    assert repr(other) == repr(layer)
    other.out_features = 99
    layer.weight = nn.Parameter(torch.zeros(8, 64))
    assert "out_features=99" in repr(other)
    assert "MixedPrecisionTensor" in repr(other)
    assert "MixedPrecisionTensor" not in repr(layer)


def test_pickle_and_torch_save_of_whole_modules():
    model = nn.Sequential(quantized_linear(64), nn.ReLU(), quantized_linear())
    x = torch.randn(3, 64)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert repr(other) == repr(model)
        assert torch.equal(other(x), model(x))


def test_compiled_without_graph_breaks():
    layer = quantized_linear()
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
