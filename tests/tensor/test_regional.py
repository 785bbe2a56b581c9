"""``compile_blocks``: what it asks of the compiler, and that it leaves the compiler's settings alone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from torchmix.tensor import MixedPrecisionTensor, compile_blocks
from torchmix.tensor.regional import SOURCE_LISTS, _packed_sources


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleList([nn.Linear(128, 24), nn.Linear(24, 128)])
        quantized = MixedPrecisionTensor.from_hp(self.mlp[0].weight.detach(), 4)
        self.mlp[0].weight = nn.Parameter(quantized, requires_grad=False)
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp[1](self.mlp[0](x))


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def settings() -> list[str]:
    return [getattr(torch.compiler.config, name) for name in SOURCE_LISTS]


def test_sources_name_the_packed_tensors_and_nothing_else() -> None:
    (pattern,) = _packed_sources(Block()).split(",")
    layer = "L['self']._modules['mlp']._modules['0']._parameters['weight']"
    for name in ("qdata", "zero_point"):
        assert re.match(pattern, f"{layer}.{name}")
    for other in (
        f"{layer}.scale",
        f"{layer}.row_bits",
        layer,
        "L['self']._modules['mlp']._modules['1']._parameters['weight'].qdata",
        "L['self']._modules['mlp']._modules['0']._parameters['bias'].qdata",
        "L['x'].qdata",
    ):
        assert not re.match(pattern, other)


def test_the_compiler_uses_these_names() -> None:
    """Fails when a PyTorch names inputs otherwise; tests/composition/test_regional_compile.py counts the effect."""
    block, guards = Block(), []

    def keep(entries: list[object]) -> list[bool]:
        guards.extend(str(entry.name) for entry in entries)
        return [True] * len(entries)

    compile_blocks([block], backend="eager", options={"guard_filter_fn": keep})
    with torch.no_grad():
        block(torch.randn(2, 128))
    (pattern,) = _packed_sources(block).split(",")
    assert any(re.match(r".*\W0\W.*\Wweight\W", name) for name in guards), guards
    assert re.match(pattern, next(name for name in guards if "'0'" in name and "weight" in name) + ".qdata")


def test_settings_are_restored() -> None:
    block, before = Block(), settings()
    with torch.compiler.config.patch(dynamic_sources="L['mine']"):
        compile_blocks([block], backend="eager")
        block(torch.randn(2, 128))
        assert torch.compiler.config.dynamic_sources == "L['mine']"
        with pytest.raises(Exception, match=r"shape|size|inputs"):
            block(torch.randn(2, 7))
        assert torch.compiler.config.dynamic_sources == "L['mine']"
    assert settings() == before


def test_settings_hold_while_a_block_runs() -> None:
    block, seen = Block(), []
    block.register_forward_hook(torch.compiler.disable(lambda *_: seen.append(settings())))
    compile_blocks([block], backend="eager")
    block(torch.randn(2, 128))
    assert all("qdata" in setting for setting in seen[0])


def test_copies_of_a_compiled_block_are_not_compiled() -> None:
    """As after nn.Module.compile."""
    block = Block()
    compile_blocks([block], backend="eager")
    x = torch.randn(2, 128)
    assert torch.equal(copy.deepcopy(block)(x), block(x))


def test_a_module_instead_of_a_list_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"pass \[module\] for a single one"):
        compile_blocks(["layers.0"])
    with pytest.raises(TypeError):
        compile_blocks(nn.Linear(2, 2))
