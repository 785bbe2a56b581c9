"""``torch.export`` with a dynamic batch: the program computes what the module does, before and after a file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torchao.utils import unwrap_tensor_subclass

from tests.composition.mixed_models import ReluBlock, expert_weight, quantize_linears, quantized
from torchmix.tensor import MixedPrecisionTensor

DYNAMIC_BATCH = ({0: Dim("batch", min=1, max=4096)},)
BATCHES = (1, 2, 5, 17)
# torch.export itself calls what it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def exported(module: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(module, (torch.randn(3, 128),), dynamic_shapes=DYNAMIC_BATCH, strict=strict)


def assert_same(program: torch.export.ExportedProgram, module: nn.Module) -> None:
    """Bit for bit: the same ops run."""
    runnable = program.module()
    for batch in BATCHES:
        x = torch.randn(batch, 128)
        assert torch.equal(runnable(x), module(x))


def called(program: torch.export.ExportedProgram) -> list[str]:
    """Operations of the graph, in order."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_exported_program(mode: Callable[[], torch.no_grad], strict: bool) -> None:
    module = quantize_linears(ReluBlock())
    with mode():
        program = exported(module, strict)
        assert_same(program, module)
    assert isinstance(program.state_dict["up.weight"], MixedPrecisionTensor)


@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_decomposed_program_holds_plain_tensors(strict: bool) -> None:
    """The graph of a C++ program: our op on the bytes of the file format, no Python classes."""
    module = quantize_linears(ReluBlock())
    program = exported(module, strict).run_decompositions({})
    assert_same(program, module)
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in program.state_dict.values())
    assert called(program).count("torchmix.mixed_linear.default") == 2
    stored = {tensor.data_ptr() for tensor in program.state_dict.values()}
    assert module.up.weight.qdata.data_ptr() in stored  # no copy either


@pytest.mark.parametrize("decompose", [False, True], ids=["subclass", "plain"])
def test_save_and_load(tmp_path: Path, decompose: bool) -> None:
    module = quantize_linears(ReluBlock())
    program = exported(module)
    torch.export.save(program.run_decompositions({}) if decompose else program, tmp_path / "block.pt2")
    assert_same(torch.export.load(tmp_path / "block.pt2"), module)


def test_unwrapped_module(tmp_path: Path) -> None:
    """torchao's way to export: parametrizations put the weight together from plain parameters."""
    module = quantize_linears(ReluBlock())
    plain = unwrap_tensor_subclass(copy.deepcopy(module))
    x = torch.randn(4, 128)
    assert torch.equal(plain(x), module(x))
    assert not any(isinstance(tensor, MixedPrecisionTensor) for tensor in plain.state_dict().values())
    program = exported(plain)
    assert_same(program, module)
    assert "torchmix.mixed_linear.default" in called(program)
    torch.export.save(program, tmp_path / "plain.pt2")
    assert_same(torch.export.load(tmp_path / "plain.pt2"), module)


class Conv1DLayer(nn.Module):
    """GPT-2's linear layer: the weight is (in_features, out_features)."""

    def __init__(self) -> None:
        super().__init__()
        dense = quantized(torch.randn(24, 128)).detach()
        self.weight = nn.Parameter(dense.t(), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Experts(nn.Module):
    """Tokens sorted by expert; the first expert gets all but three."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(expert_weight(in_features=128), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        last = torch.tensor([x.shape[0]], dtype=torch.int32)
        offsets = torch.cat([last - 1, last - 1, last - 1, last])
        return nn.functional.grouped_mm(x, self.weight.transpose(-2, -1), offs=offsets)


@pytest.mark.parametrize("make", [Conv1DLayer, Experts])
@pytest.mark.parametrize("strict", [False, True], ids=["not_strict", "strict"])
def test_other_layers(make: type[nn.Module], strict: bool) -> None:
    module = make()
    program = exported(module, strict)
    assert_same(program, module)
    assert_same(program.run_decompositions({}), module)
