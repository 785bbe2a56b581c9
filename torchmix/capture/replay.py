"""Replay of a model block by block (L2), so that a layer can be looked at without running all layers before it.

A transformer is a list of blocks, each fed with the output of the one before and with arguments that are the same
for all samples of one length (positions, masks). Whether that is true of a model is checked, not assumed.

Shapes: S samples of L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HIDDEN = "hidden_states"


class NotReplayableError(ValueError):
    """The model is not a chain of blocks; the message says what differs."""


@dataclass(frozen=True)
class Block:
    """One block and the arguments it is called with besides the hidden states.

    Attributes:
        name: fully qualified name of the module.
        module: the block.
        args: further positional arguments.
        kwargs: keyword arguments without the hidden states.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``module`` (the block, or a copy with other weights) on hidden states (1, L, D)."""
        return _first(module(hidden, *self.args, **self.kwargs))


def find_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The ``nn.ModuleList`` whose modules own most of the named parameters, by fully qualified name.

    Raises:
        NotReplayableError: there is none.
    """
    best: tuple[int, dict[str, nn.Module]] = (0, {})
    for list_name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            prefix = f"{list_name}." if list_name else ""
            owned = sum(name.startswith(prefix) for name in names)
            if owned > best[0]:
                best = (owned, {f"{prefix}{index}": block for index, block in enumerate(module)})
    if not best[1]:
        raise NotReplayableError("no ModuleList holds the layers to quantize")
    return best[1]


def record_blocks(
    blocks: dict[str, nn.Module], run: Callable[[int], object], num_samples: int
) -> tuple[list[Block], list[Tensor]]:
    """Run the model once to learn how its blocks are called, and collect what enters the first one.

    Args:
        blocks: name -> module, in order.
        run: runs the whole model on sample i.
        num_samples: S.

    Returns:
        the blocks, and the hidden states (1, L, D) of every sample at the first block.

    Raises:
        NotReplayableError: a block is not called with the hidden states first, not exactly once, or its output is
            not the next block's input.
    """
    inputs: list[tuple[str, Tensor]] = []
    recorded: list[Block] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = _split(name, args, kwargs)
            inputs.append((name, hidden))
            recorded.append(Block(name, module, rest, named))

        return hook

    handles = [m.register_forward_pre_hook(record(name), with_kwargs=True) for name, m in blocks.items()]
    try:
        run(0)
    finally:
        for handle in handles:
            handle.remove()
    if [name for name, _ in inputs] != list(blocks):
        raise NotReplayableError(f"the blocks ran in the order {[name for name, _ in inputs]}")
    for block, (_, hidden), (_, following) in zip(recorded, inputs, inputs[1:], strict=False):
        if not torch.allclose(block.run(block.module, hidden), following, rtol=1e-3, atol=1e-5):
            raise NotReplayableError(f"the output of {block.name} is not the input of the next block")
    first = next(iter(blocks.values()))
    return recorded, [inputs[0][1], *(_entering(first, run, i) for i in range(1, num_samples))]


class _Entered(Exception):
    """Stops the model at its first block."""


def _entering(block: nn.Module, run: Callable[[int], object], sample: int) -> Tensor:
    """Hidden states that enter a block; the rest of the model does not run."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split("the first block", args, kwargs)[0])
        raise _Entered

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run(sample)
    except _Entered:
        pass
    finally:
        handle.remove()
    return found[0]


def _split(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, further positional arguments, keyword arguments."""
    hidden = args[0] if args else kwargs.get(_HIDDEN)
    if not isinstance(hidden, Tensor):
        raise NotReplayableError(f"{name} is not called with hidden states first, but with {list(kwargs)}")
    return hidden.detach(), args[1:], {key: value for key, value in kwargs.items() if key != _HIDDEN}


def _first(output: Any) -> Tensor:
    """Hidden states in a block's output."""
    return output[0] if isinstance(output, tuple) else output
