"""State dicts, files, copies, devices and dtypes of modules with quantized weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.composition.mixed_models import ReluBlock, quantize_linears, quantized
from torchmix.tensor import MixedPrecisionTensor

X = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def block() -> nn.Module:
    return quantize_linears(ReluBlock())


def test_deepcopy_is_equal_and_apart(block: nn.Module) -> None:
    twin = copy.deepcopy(block)
    assert torch.equal(twin(X), block(X))
    twin.up.weight.qdata.zero_()
    assert not torch.equal(twin(X), block(X))


def test_state_dict_is_assigned_to_a_dense_model(block: nn.Module) -> None:
    state = block.state_dict()
    assert list(state) == ["up.weight", "up.bias", "down.weight"]
    other = ReluBlock()
    other.load_state_dict(state, assign=True)
    assert isinstance(other.up.weight, nn.Parameter)
    assert isinstance(other.up.weight, MixedPrecisionTensor)
    assert torch.equal(other(X), block(X))


def test_state_dict_is_copied_into_an_equally_quantized_model(block: nn.Module) -> None:
    other = quantize_linears(ReluBlock())
    before = other.up.weight.qdata.data_ptr()
    assert not torch.equal(other(X), block(X))
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(X), block(X))
    assert other.up.weight.qdata.data_ptr() == before
    assert other.up.weight.qdata.data_ptr() != block.up.weight.qdata.data_ptr()


def test_state_dict_of_another_mix_is_refused(block: nn.Module) -> None:
    other = quantize_linears(ReluBlock(), seed=99)
    with pytest.raises(RuntimeError, match=r"up\.weight.*\n?.*differ in size of qdata.*assign=True"):
        other.load_state_dict(block.state_dict())


@pytest.mark.parametrize("dense_first", [False, True])
def test_state_dict_between_dense_and_quantized_is_refused(block: nn.Module, dense_first: bool) -> None:
    source, target = (ReluBlock(), block) if dense_first else (block, ReluBlock())
    with pytest.raises(RuntimeError, match=r"equally quantized one.*assign=True"):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_save_weights_only(block: nn.Module, tmp_path: Path, mmap: bool) -> None:
    torch.save(block.state_dict(), tmp_path / "block.pt")
    state = torch.load(tmp_path / "block.pt", weights_only=True, mmap=mmap)
    other = ReluBlock()
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(X), block(X))


def test_the_file_is_as_small_as_the_weights(block: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    weights = (block.up.weight, block.down.weight)
    stored = sum(weight.bits_per_weight * weight.numel() / 8 for weight in weights) + 4 * 136
    assert stored < buffer.tell() < stored + 8192  # zip entries and names


def test_load_to_meta(block: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(block.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True, map_location="meta")
    assert state["up.weight"].device.type == "meta"
    assert state["up.weight"].qdata.device.type == "meta"
    assert state["up.weight"].shape == (136, 128)


def test_module_is_pickled(block: nn.Module) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(block))(X), block(X))
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), block(X))


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "float": (lambda m: m.bfloat16().float(), torch.float32),
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to_device_and_dtype": (lambda m: m.to("cpu", torch.float16), torch.float16),
}


@pytest.mark.parametrize("name", CASTS)
def test_module_casts_are_honoured(block: nn.Module, name: str) -> None:
    """Codes stay the same; the layer computes in the dtype of its input, so the error is that of rounding."""
    cast, dtype = CASTS[name]
    converted = cast(copy.deepcopy(block))
    assert converted.up.weight.dtype == converted.up.bias.dtype == dtype
    assert converted.up.weight.dequantize().dtype == dtype
    assert torch.equal(converted.up.weight.qdata, block.up.weight.qdata)
    assert isinstance(converted.up.weight, nn.Parameter)
    y = converted(X.to(dtype))
    assert y.dtype == dtype
    error = (y.float() - block(X)).norm() / block(X).norm()
    assert error < 4 * torch.finfo(dtype).eps + 2e-3  # an input that rounds to the next of 255 codes


def test_casts_that_cannot_be_honoured_are_errors(block: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"cannot become torch\.float64"):
        block.double()


def test_module_moves_to_meta_and_back_empty(block: nn.Module) -> None:
    meta = copy.deepcopy(block).to("meta")
    assert meta.up.weight.device.type == meta.up.weight.scale.device.type == "meta"
    assert isinstance(meta.up.weight, nn.Parameter)
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(block.state_dict())
    assert torch.equal(empty(X), block(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(block: nn.Module, dtype: torch.dtype) -> None:
    """As for a dense layer; the integer sums inside stay exact."""
    with torch.autocast("cpu", dtype):
        y = block.up(X)
        product = X @ block.up.weight.t()
    assert y.dtype == product.dtype == dtype
    assert torch.equal(y, nn.functional.linear(X.to(dtype), block.up.weight, block.up.bias))
    assert torch.equal(product, nn.functional.linear(X.to(dtype), block.up.weight))
    with torch.autocast("cpu", dtype, enabled=False):
        assert block.up(X).dtype == torch.float32


def test_memory_is_shared_between_processes(block: nn.Module) -> None:
    expected = block(X)
    assert not block.up.weight.is_shared()
    block.share_memory()
    assert block.up.weight.is_shared()
    assert torch.equal(block(X), expected)


def test_experts_keep_their_place_in_the_state_dict() -> None:
    module = nn.ParameterDict({"gate": quantized(torch.randn(2, 24, 192))})
    other = nn.ParameterDict({"gate": nn.Parameter(torch.randn(2, 24, 192))})
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other["gate"], module["gate"])
