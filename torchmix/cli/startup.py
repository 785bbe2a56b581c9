"""What happens before a command works: versions, and importing torch without other packages' noise.

torchmix's own warnings are shown, one line each; those of the packages below it are not, because a user of the
command line can do nothing about them.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

from torchmix.cli.formatting import one_line

THIRD_PARTIES = ("torch", "torchao", "transformers", "huggingface_hub", "datasets", "tokenizers")


def package_version(name: str) -> str | None:
    """Version of an installed package, None where it is not installed. Imports nothing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def torchmix_version() -> str:
    """Version of torchmix itself."""
    return package_version("torchmix") or "(not installed)"


def start(*, quiet: bool = False, progress_bars: bool = False) -> None:
    """Import torch and torchao quietly, and show torchmix's own warnings; once per process.

    Args:
        quiet: show no warnings either.
        progress_bars: leave the bars of transformers and huggingface_hub alone, for downloads.
    """
    _show_own_warnings(quiet)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # OpenMP threads that spin while they wait lose whole scheduler slices on a machine that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not progress_bars:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in THIRD_PARTIES:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    import_module("torch")  # sets up its own loggers, so their levels come after
    for name in (*THIRD_PARTIES, "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import_module("torchao")


def _show_own_warnings(quiet: bool) -> None:
    """Warnings and log records of torchmix become lines on stderr."""
    logger = logging.getLogger("torchmix")
    for handler in [handler for handler in logger.handlers if isinstance(handler, OneLineHandler)]:
        logger.removeHandler(handler)
    if not quiet:
        logger.addHandler(OneLineHandler())
    logger.setLevel(logging.CRITICAL if quiet else logging.WARNING)
    logger.propagate = False
    warnings.showwarning = _ignore_warning if quiet else _print_warning


class OneLineHandler(logging.Handler):
    """Prints a record as ``torchmix: warning: text`` on the current stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(f"torchmix: {record.levelname.lower()}: {one_line(record.getMessage())}", file=sys.stderr)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"torchmix: warning: {one_line(str(message))}", file=file or sys.stderr)


def _ignore_warning(*arguments: object, **options: object) -> None:
    return
