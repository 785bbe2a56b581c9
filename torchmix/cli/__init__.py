"""Layer 10: the command line, one file per command.

``entry`` parses arguments and turns errors into exit codes; ``options`` holds the flags that commands share;
``formatting``, ``progress`` and ``json_report`` are the three ways of talking to the user; ``startup`` loads torch
and silences what other packages print on the way. Only ``startup`` and the commands' ``run`` functions import torch
or the rest of torchmix, inside functions, so that ``torchmix --help`` answers at once.
"""

from __future__ import annotations

from torchmix.cli.entry import main

__all__ = ["main"]
