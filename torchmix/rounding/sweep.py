"""The inner loops of rounding (L3): one group of inputs, column after column.

GPTQ and coordinate descent both decide one column of a group at a time and let the later ones know. The loops are
written here once for any device, a few columns at a time; on CUDA, where a launch for each column takes longer than the
arithmetic, one kernel does a whole group (:mod:`torchmix.rounding.sweep_triton`).

Shapes: N rows, g inputs of the group.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor

from torchmix.rounding.grid import Grid

logger = logging.getLogger(__name__)
INNER_COLUMNS = 16  # columns that are kept up to date one by one; memory traffic falls with it


def gptq_group(W_Ng: Tensor, U_gg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """GPTQ on one group (arXiv 2210.17323, Algorithm 1, inner loop): each column passes its error on to later ones.

    Args:
        W_Ng: float32 (N, g), overwritten.
        U_gg: float32 (g, g), the group's block of the upper Cholesky factor of the inverse Hessian.
        grid: the group's grid.

    Returns:
        codes and errors (w - its value) / U_kk, float32 (N, g) each.
    """
    if has_kernel(W_Ng):
        from torchmix.rounding import sweep_triton

        return sweep_triton.gptq_group(W_Ng, U_gg, grid)
    codes_Ng, error_Ng, size = torch.empty_like(W_Ng), torch.empty_like(W_Ng), W_Ng.shape[1]
    for first in range(0, size, INNER_COLUMNS):
        end = min(first + INNER_COLUMNS, size)
        for k in range(first, end):
            w_N1 = W_Ng[:, k : k + 1]
            codes_Ng[:, k : k + 1] = code_N1 = grid.nearest(w_N1)
            error_Ng[:, k : k + 1] = (w_N1 - grid.values(code_N1)) / U_gg[k, k]
            # the next few columns now, the others once per few
            W_Ng[:, k + 1 : end].addr_(error_Ng[:, k], U_gg[k, k + 1 : end], alpha=-1)
        W_Ng[:, end:].addmm_(error_Ng[:, first:end], U_gg[first:end, end:], alpha=-1)
    return codes_Ng, error_Ng


def descend_group(pull_Ng: Tensor, H_gg: Tensor, q_Ng: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Coordinate descent over one group: the best code of each input, all others as they are by then.

    Args:
        pull_Ng: float32 (N, g), e H of the group's inputs, e the error of the whole row; overwritten.
        H_gg: float32 (g, g), the group's block of the Hessian.
        q_Ng: float32 (N, g), the values that the codes have now.
        grid: the group's grid.

    Returns:
        codes, and the new minus the old values, float32 (N, g) each.
    """
    if has_kernel(pull_Ng):
        from torchmix.rounding import sweep_triton

        return sweep_triton.descend_group(pull_Ng, H_gg, q_Ng, grid)
    codes_Ng, step_Ng, size = torch.empty_like(q_Ng), torch.empty_like(q_Ng), q_Ng.shape[1]
    for first in range(0, size, INNER_COLUMNS):
        end = min(first + INNER_COLUMNS, size)
        for k in range(first, end):
            q_N1 = q_Ng[:, k : k + 1]
            codes_Ng[:, k : k + 1] = code_N1 = grid.nearest(q_N1 + pull_Ng[:, k : k + 1] / H_gg[k, k])
            step_Ng[:, k : k + 1] = grid.values(code_N1) - q_N1
            pull_Ng[:, k + 1 : end].addr_(step_Ng[:, k], H_gg[k, k + 1 : end], alpha=-1)
        pull_Ng[:, end:].addmm_(step_Ng[:, first:end], H_gg[first:end, end:], alpha=-1)
    return codes_Ng, step_Ng


def has_kernel(tensor: Tensor) -> bool:
    """Whether the kernel can be used: on CUDA, where torch brings Triton along and it finds a compiler."""
    return tensor.is_cuda and _triton_works(tensor.device)


@lru_cache
def _triton_works(device: torch.device) -> bool:
    """Round a weight of one value; says why where that fails."""
    try:
        from torchmix.rounding import sweep_triton

        one = torch.ones(1, 1, device=device)
        sweep_triton.gptq_group(one, one, Grid(one, one, one, one))
    except Exception as error:  # noqa: BLE001 - fails in many ways: missing, no C compiler, unknown GPU
        logger.warning("rounding on %s goes column by column, as Triton does not work: %s", device, error)
        return False
    return True
