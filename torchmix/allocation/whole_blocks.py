"""Two widths for whole blocks (L3): the allocation of layer-wise mixed precision, as a baseline.

"Layer-wise quantization beyond integer bit levels", arXiv 2406.17415: blocks are ranked by one score, the first ones
get the high width, all others the low one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torchmix.allocation.rules import check_widths


def promote_blocks(
    block_scores: Mapping[str, float],
    block_bits: Mapping[str, Mapping[int, int]],
    budget_bits: int,
    low: int = 4,
    high: int = 8,
) -> dict[str, int]:
    """Give blocks the high width in falling order of their scores, as long as the budget lasts.

    As in the paper the ranking alone decides: the first block that does not fit ends the search, and no less
    important one is squeezed in behind it. Of equal scores the block that is named first goes first. The result
    fits ``Calibration.plan(fixed={f"{block}.*": width, ...})``.

    Args:
        block_scores: block -> importance, larger = more important (:func:`torchmix.salience.lim_scores`,
            :func:`torchmix.salience.zd_score`).
        block_bits: block -> width -> stored bits of the whole block at that width, all metadata included.
        budget_bits: stored bits that all blocks may have together.
        low, high: the two widths.

    Returns:
        block -> width, in the order of ``block_scores``.

    Raises:
        ValueError: the widths are not rising from 2 to 8, scores and bits name other blocks, a score is NaN, a width
            has no bits, or all blocks at the low width exceed the budget.
    """
    check_widths((low, high))
    _check_blocks(block_scores, block_bits, (low, high))
    spent = sum(bits[low] for bits in block_bits.values())
    if spent > budget_bits:
        raise ValueError(
            f"budget_bits={budget_bits} does not hold the blocks at {low} bits, which take {spent}; raise the budget "
            "or lower the low width"
        )
    widths = dict.fromkeys(block_scores, low)
    for block in sorted(block_scores, key=lambda name: -block_scores[name]):
        spent += block_bits[block][high] - block_bits[block][low]
        if spent > budget_bits:
            break
        widths[block] = high
    return widths


def _check_blocks(
    block_scores: Mapping[str, float], block_bits: Mapping[str, Mapping[int, int]], widths: tuple[int, int]
) -> None:
    """Raise ``ValueError`` unless every block has a score, and bits at both widths."""
    if block_scores.keys() != block_bits.keys():
        lone = sorted(block_scores.keys() ^ block_bits.keys())
        raise ValueError(
            f"{', '.join(lone[:6])}: blocks need both a score and stored bits; give or leave out both"
        )
    for block, score in block_scores.items():
        if math.isnan(score):
            raise ValueError(f"the score of {block} is NaN; look for NaN in its weights or hidden states")
        missing = [bits for bits in widths if bits not in block_bits[block]]
        if missing:
            raise ValueError(f"block_bits of {block} lacks {missing}; it has {sorted(block_bits[block])}")
