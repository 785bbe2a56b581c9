"""Compile repeated blocks one by one with shared graphs (L2).

A transformer's blocks are equal but for their weights, so ``torch.compile`` can compile one block and use its
graph for all of them ("regional compilation"). The packed codes of a :class:`PackedTensor` have one
length in one block and another in the next, because each block has its own mix of row widths. PyTorch takes
the shapes of parameters as constants, so every block would get a graph of its own until the recompilation limit
(8) is reached. No code of a graph depends on these lengths: the ops read them from the tensors.

PyTorch has a documented list of inputs whose lengths are not constants (``torch.compiler.config.dynamic_sources``
and ``unbacked_sources``; "unbacked" also covers lengths 0 and 1, which weights without zero points have).
:func:`compile_blocks` puts the packed tensors of the given blocks on it, and only while these blocks run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from torchmix.tensor.packed_tensor import PackedTensor

SOURCE_LISTS = ("dynamic_sources", "unbacked_sources")


def compile_blocks(blocks: Iterable[nn.Module], **kwargs: Any) -> None:
    """Compile each block in place so that equal blocks share one graph, whatever their row widths are.

    Like ``block.compile(**kwargs)`` for every block; the blocks are afterwards called as before. A call of a block
    takes some ten microseconds longer, for setting the list.

    Args:
        blocks: modules of one structure, for example ``model.model.layers``. Compile them after quantization.
        kwargs: arguments of ``torch.compile``, for example ``fullgraph=True``.

    Raises:
        TypeError: if ``blocks`` holds something that is not a module, for example when it is a module itself.

    Example::

        compile_blocks(model.model.layers, fullgraph=True)
        model(tokens)
    """
    for block in blocks:
        if not isinstance(block, nn.Module):
            raise TypeError(
                f"compile_blocks takes a list of modules, but found {type(block)} in it; "
                "pass [module] for a single one"
            )
        # As nn.Module.compile does; nn.Module.__call__ goes to this attribute.
        compiled = torch.compile(block._call_impl, **kwargs)
        block._compiled_call_impl = _with_free_lengths(compiled, _packed_sources(block))


def _packed_sources(block: nn.Module) -> str:
    """Pattern list for the compiler's names of the packed tensors of ``block``.

    The compiler calls them ``L['self']._modules['mlp']._parameters['weight'].qdata`` and similar.
    """
    patterns = []
    for name, parameter in block.named_parameters():
        if isinstance(parameter, PackedTensor):
            path = r".*\W".join(re.escape(part) for part in name.split("."))
            patterns.append(rf".*\W{path}\W.*\.({'|'.join(parameter.length_names)})$")
    return ",".join(patterns)


def _with_free_lengths(compiled: Callable[..., Any], sources: str) -> Callable[..., Any]:
    """``compiled`` in a scope where the lengths of ``sources`` are not constants; recompilation needs it too."""
    config: Any = torch.compiler.config
    listed = {name: getattr(config, name) for name in SOURCE_LISTS if hasattr(config, name)}
    changes = {name: f"{before},{sources}" if before else sources for name, before in listed.items()}
    # torch.compile(dynamic=...) itself sets its options per call this way; config.patch() costs four times more.
    set_sources = config._make_closure_patcher(**changes)

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        restore = set_sources()
        try:
            return compiled(*args, **kwargs)
        finally:
            restore()

    return call
