"""Projections with one input as one product: the same outputs, and the same bytes in files and state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny_models import logits, quantized_model, random_ids
from torchmix import fuse_projections, repack, save_pretrained, to_plain, unfuse_projections
from torchmix.fusing import FusedLinear, FusedPart
from torchmix.tensor import MixedPrecisionTensor, TiledTensor


class Attention(nn.Module):
    """Three projections of one input, and one of another."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(200, 64, bias), nn.Linear(200, 32, bias)
        self.v_proj, self.o_proj = nn.Linear(200, 32, bias), nn.Linear(64, 200, bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q_proj(x) * torch.cat([self.k_proj(x), self.v_proj(x)], -1)
        return self.o_proj(mixed)


def quantized(module: nn.Module) -> Any:
    """All linear weights with rows of 3 to 8 bits, groups of 128."""
    torch.manual_seed(0)
    for child in module.children():
        assert isinstance(child, nn.Linear)
        bits = torch.tensor([3, 4, 5, 6, 8], dtype=torch.uint8).repeat(40)[: child.out_features]
        weight = MixedPrecisionTensor.from_hp(torch.randn(child.weight.shape), bits)
        child.weight = nn.Parameter(weight, requires_grad=False)
    return module.eval()


def inner(state: dict[str, Any]) -> dict[str, Tensor]:
    """Plain tensors of a state dict by name."""
    result = {}
    for name, tensor in state.items():
        assert not isinstance(tensor, TiledTensor)
        if isinstance(tensor, MixedPrecisionTensor):
            result |= {f"{name}.{part}": getattr(tensor, part) for part in tensor.tensor_data_names}
        else:
            result[name] = tensor
    return result


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    first, second = inner(found), inner(expected)
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def as_it_is(model: nn.Module) -> None:
    """Weights in the plain order."""


def tiled(model: nn.Module) -> None:
    assert not repack(model, force=True).left


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prepare", [as_it_is, tiled])
def test_outputs_and_state_dict_stay(bias: bool, prepare: Callable[[nn.Module], None]) -> None:
    model, x = quantized(Attention(bias)), torch.randn(3, 5, 200)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    prepare(model)
    report = fuse_projections(model)
    assert report.fused == (("q_proj", "k_proj", "v_proj"),)
    assert report.left == ()
    assert isinstance(model.q_proj, FusedLinear)
    assert isinstance(model.k_proj, FusedPart)
    torch.testing.assert_close(model(x), expected)
    assert_same(model.state_dict(), before)
    assert_same(copy.deepcopy(model).state_dict(), before)
    assert [name for name, _ in model.named_parameters() if "weight" in name] == [
        "q_proj.weight",
        "o_proj.weight",
    ]
    assert unfuse_projections(model) == ("q_proj", "k_proj", "v_proj")
    assert all(type(child) is nn.Linear for child in model.children())
    assert all(isinstance(child.weight, TiledTensor) == (prepare is tiled) for child in model.children())
    torch.testing.assert_close(model(x), expected)
    assert_same(model.state_dict(), before)


def test_repacking_after_fusing() -> None:
    model, x = quantized(Attention()), torch.randn(4, 200)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    fuse_projections(model)
    assert repack(model, force=True).repacked == ("q_proj.weight", "o_proj.weight")
    torch.testing.assert_close(model(x), expected)
    assert_same(model.state_dict(), before)
    assert to_plain(model) == ("q_proj.weight", "o_proj.weight")
    assert_same(model.state_dict(), before)


def test_one_product_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is kept when all have asked; another order, or another input, gives the right result too."""
    model, products = quantized(Attention()), []
    x, other = torch.randn(4, 200), torch.randn(4, 200)
    q, k, v = model.q_proj(x), model.k_proj(x), model.v_proj(x)
    k_other = model.k_proj(other)
    fuse_projections(model)
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: products.append(1) or linear(*a))
    for part, expected in ((model.q_proj, q), (model.k_proj, k), (model.v_proj, v)):
        torch.testing.assert_close(part(x), expected)
    assert len(products) == 1
    assert model.q_proj._kept is None
    torch.testing.assert_close(model.v_proj(x), v)
    torch.testing.assert_close(model.k_proj(other), k_other)
    torch.testing.assert_close(model.k_proj(other), k_other)
    torch.testing.assert_close(model.q_proj(x), q)


def test_an_input_that_is_a_parameter() -> None:
    """Keeping it must not make it one of the model's."""
    model, x = quantized(Attention()), nn.Parameter(torch.randn(4, 200))
    fuse_projections(model)
    names = [name for name, _ in model.named_parameters()]
    model.q_proj(x)
    assert [name for name, _ in model.named_parameters()] == names


def test_gradients_reach_the_input() -> None:
    model, x = quantized(Attention()), torch.randn(4, 200, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    fuse_projections(model)
    model(x).sum().backward()
    torch.testing.assert_close(
        x.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )  # other sums


@pytest.mark.parametrize("prepare", [as_it_is, tiled])
def test_one_graph(prepare: Callable[[nn.Module], None]) -> None:
    torch._dynamo.reset()
    model = quantized(Attention())
    prepare(model)
    fuse_projections(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for x in torch.randn(3, 4, 200):
            torch.testing.assert_close(compiled(x), model(x))
    assert model.q_proj._kept is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_transformers_model(tmp_path: Path, family: str) -> None:
    """A saved directory has the bytes of the model that is not fused, with biases (qwen2) and without."""
    (model, _), ids = quantized_model(family), random_ids(2, 9)
    expected = logits(model, ids)
    save_pretrained(model, tmp_path / "before")
    report = fuse_projections(model)
    assert len(report.fused) == 4  # attention and MLP of two blocks
    torch.testing.assert_close(logits(model, ids), expected)
    save_pretrained(model, tmp_path / "after")
    name = "model.safetensors"
    assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert unfuse_projections(model)
    torch.testing.assert_close(logits(model, ids), expected)


def test_what_stays_apart_has_a_reason() -> None:
    dense = Attention()
    assert fuse_projections(dense).fused == ()
    assert fuse_projections(dense).left == ()  # nothing is quantized
    model = quantized(Attention())
    model.k_proj.bias = None
    assert fuse_projections(model).left == (
        ("q_proj, k_proj, v_proj", "their biases differ, or only some have one"),
    )
    model = quantized(Attention())
    model.v_proj.register_forward_hook(lambda *_: None)
    assert "forward hooks" in fuse_projections(model).left[0][1]
    model = quantized(Attention())
    model.v_proj.weight = nn.Parameter(TiledTensor.from_plain(model.v_proj.weight), requires_grad=False)
    assert "weights differ" in fuse_projections(model).left[0][1]


def test_a_shared_weight_stays() -> None:
    model = quantized(Attention())
    model.tied = nn.Linear(200, 64, device="meta")
    model.tied.weight = model.q_proj.weight
    assert fuse_projections(model).left == (
        ("q_proj, k_proj, v_proj", "a weight is shared with another module"),
    )


def test_loading_into_a_fused_model_is_refused() -> None:
    model = quantized(Attention())
    state = model.state_dict()
    fuse_projections(model)
    with pytest.raises(
        RuntimeError, match=r"q_proj is fused .* torchmix\.unfuse_projections\(model\) before loading"
    ):
        model.load_state_dict(state)
    unfuse_projections(model)
    model.load_state_dict(state, assign=True)


def test_a_printed_model_says_what_is_fused() -> None:
    model = quantized(Attention())
    fuse_projections(model)
    assert "out_features=64 + 32 + 32" in repr(model)
    assert "part=2" in repr(model)
