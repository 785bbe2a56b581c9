"""Bit widths of rows (L3): the plan, the rules it keeps, and the search that makes it.

``plan`` and ``layer_plan`` hold the result and its JSON file; ``problem`` and ``solve`` the search under a
budget of stored bits; ``row_tiles`` lets rows move together; ``rules`` is what all of them check;
``whole_blocks`` is the baseline that gives all rows of a block one width.
"""

from __future__ import annotations

from torchmix.allocation.plan import BitPlan, Exclusion, LayerPlan
from torchmix.allocation.problem import Allocation, AllocationProblem, LayerChoices
from torchmix.allocation.solve import allocate, top_rows
from torchmix.allocation.whole_blocks import promote_blocks

__all__ = [
    "Allocation",
    "AllocationProblem",
    "BitPlan",
    "Exclusion",
    "LayerChoices",
    "LayerPlan",
    "allocate",
    "promote_blocks",
    "top_rows",
]
