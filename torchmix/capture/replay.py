"""Replay of a model block by block (L2), so that a layer can be looked at without running all layers before it.

A transformer is a list of blocks, each fed with the output of the one before and with arguments that are the same
for all samples of one length (positions, masks). Whether that is true of a model is checked, not assumed.

Shapes: S samples of L tokens, B samples of a chunk, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_HIDDEN = "hidden_states"
Run = Callable[[Tensor], object]


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
        in_tuple: whether the block returns its hidden states as the first of a tuple.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_tuple: bool = False

    def run(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``module`` (the block, or a copy with other weights) on hidden states (B, L, D)."""
        return _first(module(hidden, *self.args, **self.kwargs))


def chunk_samples(device: torch.device, sequence_length: int) -> int:
    """Samples to send through a block together: what keeps a GPU busy, or stays in a CPU's caches; at least one."""
    tokens = 2048 if device.type == "cpu" else 8192
    return max(1, tokens // sequence_length)


def hidden_states_device(device: torch.device, num_bytes: int) -> torch.device:
    """Where to keep hidden states of so many bytes in all: on a GPU if they fill at most a quarter of its memory.

    Main memory is the other choice; moving them there and back takes longer than the blocks that compute them.
    """
    if device.type == "cuda" and 4 * num_bytes <= torch.cuda.get_device_properties(device).total_memory:
        return device
    return torch.device("cpu")


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
    blocks: Mapping[str, nn.Module], run: Run, samples: Tensor, chunk: int = 1
) -> tuple[list[Block], list[Tensor]]:
    """Run the model once to learn how its blocks are called, and collect what enters the first one.

    Args:
        blocks: name -> module, in order.
        run: runs the whole model on token ids (B, L).
        samples: int64 (S, L).
        chunk: samples to replay together; one by one where the blocks' arguments do not allow it.

    Returns:
        the blocks, and the hidden states (B, L, D) of every chunk of samples at the first block.

    Raises:
        NotReplayableError: a block is not called with the hidden states first, not exactly once, or its output is
            not the next block's input.
    """
    with torch.no_grad():
        recorded, inputs = _observe(blocks, run, samples[:1])
        for block, hidden, following in zip(recorded, inputs, inputs[1:], strict=False):
            if not _close(block.run(block.module, hidden), following):
                raise NotReplayableError(f"the output of {block.name} is not the input of the next block")
        first = recorded[0].module
        if chunk > 1 and not _works_in_chunks(recorded, inputs, _entering(first, run, samples[:2])):
            chunk = 1
        return recorded, [_entering(first, run, ids) for ids in samples.split(chunk)]


def _observe(blocks: Mapping[str, nn.Module], run: Run, ids: Tensor) -> tuple[list[Block], list[Tensor]]:
    """Each block's arguments, and the hidden states that enter it."""
    calls: list[tuple[str, Tensor, tuple[Any, ...], dict[str, Any]]] = []
    in_tuple: dict[str, bool] = {}

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.append((name, *_split(name, args, kwargs)))

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, output: in_tuple.update({name: isinstance(output, tuple)})

    handles = [m.register_forward_pre_hook(before(name), with_kwargs=True) for name, m in blocks.items()]
    handles += [m.register_forward_hook(after(name)) for name, m in blocks.items()]
    try:
        run(ids)
    finally:
        for handle in handles:
            handle.remove()
    if [call[0] for call in calls] != list(blocks):
        raise NotReplayableError(f"the blocks ran in the order {[call[0] for call in calls]}")
    recorded = [Block(name, blocks[name], args, kwargs, in_tuple[name]) for name, _, args, kwargs in calls]
    return recorded, [hidden for _, hidden, _, _ in calls]


def _works_in_chunks(blocks: Sequence[Block], inputs: Sequence[Tensor], pair: Tensor) -> bool:
    """Whether two samples at once go through the blocks as the first of them does alone."""
    try:
        for block, alone in zip(blocks, inputs, strict=True):
            if not _close(pair[:1], alone):
                return False
            pair = block.run(block.module, pair)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
    ):  # a mask or position of one sample does not fit two
        return False
    return True


def _close(found: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of float sums, which a batch may change."""
    tolerance = 1e-3 if expected.dtype == torch.float32 else 3e-2
    scale = expected.abs().max().float()
    return found.shape == expected.shape and bool((found - expected).abs().max().float() <= tolerance * scale)


class _Entered(Exception):
    """Stops the model at its first block."""


def _entering(block: nn.Module, run: Run, ids: Tensor) -> Tensor:
    """Hidden states that enter a block; the rest of the model does not run."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split("the first block", args, kwargs)[0])
        raise _Entered

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run(ids)
    except _Entered:
        pass
    finally:
        handle.remove()
    return found[0]


@contextmanager
def short_circuit(blocks: Sequence[Block], hidden: Tensor) -> Iterator[None]:
    """Inside, the model computes as if ``hidden`` (B, L, D) had come out of its last block; no block runs."""
    before = [vars(block.module).get("forward") for block in blocks]
    for block in blocks:
        output = (hidden,) if block.in_tuple else hidden
        block.module.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.module.forward
            else:
                block.module.forward = forward


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
