"""The kernels' arithmetic in Triton's interpreter, where Triton is installed; on CUDA ``test_sweep.py`` runs them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from tests.rounding.test_sweep import problem
from torchmix.rounding import sweep, sweep_triton
for rows, size in ((3, 5), (20, 16), (17, 40)):
    block, grid, hessian = problem(rows, size)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    expected = sweep.gptq_group(block.clone(), upper, grid)
    found = sweep_triton.gptq_group(block.clone(), upper, grid)
    equal = (found[0] == expected[0]).all(1)
    assert equal.float().mean() >= 0.9, equal
    torch.testing.assert_close(found[1][equal], expected[1][equal], rtol=1e-3, atol=1e-4)
    values = grid.values(grid.nearest(block))
    pull = (block - values) @ hessian
    expected = sweep.descend_group(pull.clone(), hessian, values, grid)
    found = sweep_triton.descend_group(pull.clone(), hessian, values, grid)
    equal = (found[0] == expected[0]).all(1)
    assert equal.float().mean() >= 0.9, equal
    torch.testing.assert_close(found[1][equal], expected[1][equal], rtol=1e-4, atol=1e-5)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter():
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
