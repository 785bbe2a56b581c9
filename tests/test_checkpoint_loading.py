"""Loading into a module that the caller built: everything finds its partner, or an error names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.tiny_models import apply_plan, error_of, random_plan, sequential
from torchmix.checkpoint import load_pretrained, save_pretrained
from torchmix.tensor import MixedPrecisionTensor


class Tied(nn.Module):
    """Two layers and a bias-free head that share one weight, a buffer, and a buffer that is not saved."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(136, 136)
            self.second = nn.Linear(136, 136)
            self.norm = nn.BatchNorm1d(136)
        if tie:
            self.second.weight = self.first.weight
            self.second.bias = self.first.bias
        self.register_buffer("table", torch.arange(136, dtype=torch.int32))
        self.register_buffer("cache", torch.ones(136), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x * self.cache))) + self.table


def saved(tmp_path: Path, model: nn.Module, **options: Any) -> tuple[nn.Module, Path]:
    """The model with random row widths, and where it was saved."""
    apply_plan(model.eval(), random_plan(model))
    save_pretrained(model, tmp_path / "out", max_shard_size=40_000, **options)
    return model, tmp_path / "out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skeleton_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_bit_comes_back(tmp_path, dtype, skeleton_dtype, device):
    model, directory = saved(tmp_path, sequential(dtype))
    with torch.device(device):
        skeleton = sequential(skeleton_dtype)
    loaded = load_pretrained(directory, model=skeleton, verify=True)
    assert loaded is skeleton
    for name, tensor in model.state_dict().items():
        other = loaded.state_dict()[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        for part in (
            MixedPrecisionTensor.tensor_data_names if isinstance(tensor, MixedPrecisionTensor) else []
        ):
            assert torch.equal(getattr(other, part), getattr(tensor, part)), (name, part)
    x = torch.randn(3, 172, dtype=dtype)
    assert torch.equal(loaded(x), model(x))
    assert repr(loaded) == repr(model)


def test_a_loaded_module_can_be_saved_again(tmp_path):
    _, directory = saved(tmp_path, sequential())
    loaded = load_pretrained(directory, model=sequential())
    save_pretrained(loaded, tmp_path / "again", max_shard_size=40_000)
    for path in directory.glob("model*"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_dtype_argument_changes_what_is_seen_and_not_what_is_stored(tmp_path):
    model, directory = saved(tmp_path, sequential())
    loaded: Any = load_pretrained(directory, model=sequential(), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded[0].weight.dequantize(torch.float32), model[0].weight.dequantize())
    assert loaded(torch.randn(2, 172, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_weights_stay_one_parameter(tmp_path, device):
    model, directory = saved(tmp_path, Tied())
    with torch.device(device):
        skeleton = Tied()
    if device == "meta":
        skeleton.cache = torch.ones(136)
    loaded: Any = load_pretrained(directory, model=skeleton.eval())
    assert loaded.second.weight is loaded.first.weight
    assert loaded.second.bias is loaded.first.bias
    assert isinstance(loaded.first.weight, MixedPrecisionTensor)
    assert isinstance(loaded.second.bias, nn.Parameter)
    assert not isinstance(loaded.table, nn.Parameter)
    assert loaded.table.dtype == torch.int32
    assert loaded.first.bias.requires_grad
    assert not loaded.first.weight.requires_grad
    x = torch.randn(3, 136)
    assert torch.equal(loaded(x), model(x))


def test_a_buffer_that_nobody_saved_must_have_values(tmp_path):
    _, directory = saved(tmp_path, Tied())
    with torch.device("meta"):
        skeleton = Tied()
    message = error_of(lambda: load_pretrained(directory, model=skeleton))
    assert "the buffer cache is not saved with the model and has no values on the meta device" in message
    assert message.startswith(f"ValueError: {directory}")
    assert skeleton.table.device.type == "meta"  # untouched


@pytest.mark.parametrize(
    ("skeleton", "text"),
    [
        (
            lambda: Tied(tie=False),
            r"missing \['second.weight', 'second.bias'\] \(2 in all\), unknown \[\] \(0",
        ),
        (
            lambda: sequential(),
            r"missing \['0.weight', '0.bias', '1.weight'\]|missing \['0.weight', '0.bias', '2",
        ),
        (
            lambda: nn.Sequential(),
            r"missing \[\] \(0 in all\), unknown .* \(8 in all\); pass the module that was",
        ),
    ],
)
def test_another_model_is_refused(tmp_path, skeleton, text):
    _, directory = saved(tmp_path, Tied())
    with pytest.raises(ValueError, match=rf"{directory}: does not fit the model: .*{text}"):
        load_pretrained(directory, model=skeleton())


def test_another_shape_is_refused_and_nothing_is_loaded(tmp_path):
    _, directory = saved(tmp_path, sequential())
    skeleton: Any = sequential()
    skeleton[2] = nn.Linear(136, 321)
    with pytest.raises(
        ValueError, match=r"2\.(bias|weight) has shape \(320.*in the checkpoint and \(321.*in the m"
    ):
        load_pretrained(directory, model=skeleton)
    assert not isinstance(skeleton[0].weight, MixedPrecisionTensor)


def test_a_quantized_skeleton_is_overwritten(tmp_path):
    model, directory = saved(tmp_path, sequential())
    skeleton = apply_plan(sequential(), random_plan(sequential(), [3], seed=1))
    x = torch.randn(3, 172)
    assert torch.equal(load_pretrained(directory, model=skeleton)(x), model(x))
