"""Precision of large float32 products on CUDA (L0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_products() -> Iterator[None]:
    """Inside, float32 products on CUDA take their operands as TF32 (10 bits of mantissa) and add up in float32.

    For sums over many tokens, Hessians and output errors, where operands rounded to 2^-11 of themselves change nothing
    that the number of tokens does not change more; on tensor cores they take an eighth of the time. bfloat16 inputs
    are exact in TF32. The setting from before is restored, on other devices nothing changes.
    """
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before
