"""Precision of large float32 products on CUDA (L0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def token_sums(dtype: torch.dtype) -> Iterator[None]:
    """Inside, products that sum over the tokens of a bfloat16 or float16 model run on CUDA's tensor cores.

    They take float32 operands as TF32 (10 bits of mantissa, as float16 has and three more than bfloat16), add up in
    float32, and need an eighth of the time. The sums of a float32 model stay float32. The setting from before is
    restored; on other devices nothing changes.

    Args:
        dtype: of the model whose activations are summed.
    """
    if dtype == torch.float32:
        yield
        return
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before
