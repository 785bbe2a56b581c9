"""Blocks compiled one by one: one graph serves all of them, although each has its own mix of row widths."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.composition.mixed_models import GraphCounter, ReluBlock, quantize_linears
from torchmix.repacking import repack
from torchmix.tensor import compile_blocks

BLOCKS = 12  # above PyTorch's limit of 8 recompilations


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def mixed_blocks(count: int = BLOCKS) -> nn.Sequential:
    """Every block has other row counts per width; in one there are no zero points at all, in one only 3 bits."""
    blocks = [quantize_linears(ReluBlock(), seed=100 * number) for number in range(count)]
    blocks[1] = quantize_linears(ReluBlock(), widths=(8,))
    blocks[2] = quantize_linears(ReluBlock(), widths=(3,))
    lengths = {block.up.weight.qdata.numel() for block in blocks}
    assert len(lengths) >= min(count, 9), "the blocks of this test must differ"
    return nn.Sequential(*blocks)


def eager(blocks: nn.Sequential, x: Tensor) -> Tensor:
    for block in blocks:
        x = block.forward(x)
    return x


@pytest.mark.parametrize("wrapped", [False, True], ids=["block.compile", "torch.compile"])
def test_without_help_every_block_is_a_graph(wrapped: bool) -> None:
    """What compile_blocks is for. PyTorch takes shapes of parameters as constants."""
    blocks, counter = mixed_blocks(4), GraphCounter()
    with torch.no_grad():
        for block in blocks:
            compiled = torch.compile(block, fullgraph=True, backend=counter) if wrapped else block
            block.compile(fullgraph=True, backend=counter)
            compiled(torch.randn(5, 128))
    assert counter.count == len(blocks)


def test_without_help_the_limit_is_reached() -> None:
    blocks = mixed_blocks()
    for block in blocks:
        block.compile(fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        blocks(torch.randn(5, 128))


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
def test_one_graph_for_all_blocks(dynamic: bool | None, graphs: int) -> None:
    """As many graphs as a single block needs (tests/composition/test_compile.py)."""
    blocks, counter = mixed_blocks(), GraphCounter()
    compile_blocks(blocks, fullgraph=True, dynamic=dynamic, backend=counter)
    with torch.no_grad():
        for tokens in (5, 3, 17, 2):
            x = torch.randn(tokens, 128)
            assert torch.equal(blocks(x), eager(blocks, x))
        assert counter.count == graphs
        blocks(torch.randn(1, 128))
    assert counter.count == graphs + 1


def test_one_graph_in_training() -> None:
    """The input of the first block requires a gradient, as behind a trained embedding."""
    blocks, counter = mixed_blocks(), GraphCounter()
    compile_blocks(blocks, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (5, 3, 17):
        x = torch.randn(tokens, 128, requires_grad=True)
        found, expected = blocks(x), eager(blocks, x)
        assert torch.equal(found, expected)
        (gradient,) = torch.autograd.grad(found.square().sum(), x)
        (reference,) = torch.autograd.grad(expected.square().sum(), x)
        assert torch.equal(gradient, reference)
    assert counter.count == 1


def test_one_graph_with_inductor() -> None:
    blocks, counter = mixed_blocks(), GraphCounter("inductor")
    compile_blocks(blocks, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in (5, 3):
            x = torch.randn(tokens, 128)
            assert torch.equal(blocks(x), eager(blocks, x))
    assert counter.count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_for_repacked_blocks(backend: str) -> None:
    """Tiles have other lengths in every block, too; in one block all rows fit a single tile."""
    blocks, counter = nn.Sequential(), GraphCounter(backend)
    for number in range(BLOCKS):
        widths = {1: (8,), 2: (3, 3, 3, 4)}.get(number, (3, 4, 5, 6, 8)[: number % 4 + 2])
        blocks.append(quantize_linears(ReluBlock(), 100 * number, widths, group_size=128))
    plain = copy.deepcopy(blocks)
    assert len(repack(blocks, force=True).repacked) == 2 * BLOCKS
    assert len({block.up.weight.tiles.numel() for block in blocks}) >= 6, (
        "the blocks of this test must differ"
    )
    assert len({block.up.weight.row_index.numel() for block in blocks}) >= 3
    compile_blocks(blocks, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in (5, 3, 17):
            x = torch.randn(tokens, 128)
            assert torch.equal(blocks(x), eager(plain, x))
    assert counter.count == 1


def test_a_whole_model_needs_no_help() -> None:
    """In one graph every layer is an input of its own; its lengths never change."""
    blocks, counter = mixed_blocks(4), GraphCounter()
    compiled = torch.compile(blocks, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for tokens in (5, 3, 17):
            x = torch.randn(tokens, 128)
            assert torch.equal(compiled(x), eager(blocks, x))
    assert counter.count == 1
