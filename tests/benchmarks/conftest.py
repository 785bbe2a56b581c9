"""The kernel benchmark's modules import each other by name, as scripts of one folder do."""

from __future__ import annotations

import sys
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "benchmarks" / "kernels"
if str(KERNELS) not in sys.path:
    sys.path.insert(0, str(KERNELS))
