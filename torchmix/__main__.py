"""``python -m torchmix``: the same as the command ``torchmix``."""

from __future__ import annotations

import sys

from torchmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
