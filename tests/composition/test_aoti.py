"""AOTInductor: a package is compiled, loaded and run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.export import Dim

from tests.composition.mixed_models import ReluBlock, quantize_linears


@pytest.mark.slow  # compiles C++
def test_package_runs(tmp_path: Path) -> None:
    """The package calls the registered op, so it gives the same bits; the batch is dynamic."""
    module = quantize_linears(ReluBlock())
    with torch.no_grad():
        shapes = ({0: Dim("batch", min=1, max=4096)},)
        program = torch.export.export(module, (torch.randn(3, 128),), dynamic_shapes=shapes)
        package = str(tmp_path / "block.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        runner = torch._inductor.aoti_load_package(package)
        for batch in (1, 2, 5, 64):
            x = torch.randn(batch, 128)
            assert torch.equal(runner(x), module(x))
