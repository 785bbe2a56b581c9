"""What every test shares: the device to run on, a fixed seed, and hypothesis settings."""

from __future__ import annotations

import os

# Read when torch loads its OpenMP library: spinning threads lose whole scheduler slices on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# Examples are the same on every run, and slow machines do not fail a test.
hypothesis.settings.register_profile("torchmix", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("torchmix")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device this machine has."""
    return torch.device(request.param)
