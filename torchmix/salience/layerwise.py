"""Importance of whole blocks (L3): the two scores of layer-wise mixed precision, as baselines.

LIM and ZD of "Layer-wise quantization beyond integer bit levels", arXiv 2406.17415. Both are made so that larger
means more important, as everywhere in this package; :func:`torchmix.allocation.promote_blocks` gives the important
blocks more bits.

Shapes: S samples of L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.evaluation import evaluation_mode


def lim_score(block_input: Tensor, block_output: Tensor) -> float:
    """Layer Input Modification of one sample: -cos(input, output), both flattened (LIM, arXiv 2406.17415).

    A block that changes its input much scores high. In [-1, 1]; the score of a block is the mean over samples.

    Args:
        block_input, block_output: float, equal shapes, hidden states of the whole sample.

    Raises:
        ValueError: the shapes differ, or one of the two is zero or not finite.
    """
    if block_input.shape != block_output.shape:
        raise ValueError(
            f"shapes {tuple(block_input.shape)} and {tuple(block_output.shape)} of a block differ"
        )
    x, y = block_input.double().flatten(), block_output.double().flatten()
    cosine = float(x @ y / (x.norm() * y.norm()))
    if not -1.001 < cosine < 1.001:
        raise ValueError("hidden states of a block are all zero or not finite; run the model in float32")
    return -cosine


@torch.no_grad()
def lim_scores(model: nn.Module, blocks: Mapping[str, nn.Module], samples: Tensor) -> dict[str, float]:
    """Mean :func:`lim_score` of every block, from one run of the model per sample.

    Args:
        model: called with int64 (1, L).
        blocks: name -> module, see :func:`torchmix.capture.find_blocks`; hidden states come first among what each
            is called with and what it returns.
        samples: int64 (S, L).

    Returns:
        block name -> score, larger = more important.

    Raises:
        ValueError: there are no samples, or a block was not run exactly once per sample.
    """
    found: dict[str, list[float]] = {name: [] for name in blocks}

    def hook(name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            found[name].append(lim_score(hidden, output[0] if isinstance(output, tuple) else output))

        return after

    handles = [block.register_forward_hook(hook(name), with_kwargs=True) for name, block in blocks.items()]
    device = next(model.parameters()).device
    try:
        with evaluation_mode([model]):
            for sample in samples:
                model(sample[None].to(device))
    finally:
        for handle in handles:
            handle.remove()
    for name, scores in found.items():
        if not scores or len(scores) != len(samples):
            raise ValueError(
                f"{name} ran {len(scores)} times on {len(samples)} samples, it should once on each"
            )
    return {name: sum(scores) / len(scores) for name, scores in found.items()}


def zd_score(weights: Iterable[Tensor]) -> float:
    """Z-score Distribution of a block's weights, negated: -|{i: z_i > 1}| / number of weights.

    z_i = (w_i - mean) / std over all weights of the block together (ZD, arXiv 2406.17415); few weights far above
    the mean mean an important block, hence the sign. Needs no data.

    Args:
        weights: float tensors of any shape, all weights of one block.

    Returns:
        a number in [-1, 0], larger = more important; 0 where all weights are equal.

    Raises:
        ValueError: there are no weights.
    """
    tensors = [weight.detach() for weight in weights]
    count = sum(tensor.numel() for tensor in tensors)
    if not count:
        raise ValueError("a block without weights has no score; leave it out")
    mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in tensors) / count
    variance = sum(float((tensor.double() - mean).square().sum()) for tensor in tensors) / count
    threshold = mean + variance**0.5
    return -sum(int((tensor.double() > threshold).sum()) for tensor in tensors) / count
