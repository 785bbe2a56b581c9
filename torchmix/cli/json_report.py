"""``--json FILE``: the command's result as JSON, written whole or not at all."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STDOUT = "-"


def check_json_target(target: str | None, flag: str = "--json") -> None:
    """Find out before the work starts whether the file that a flag names can be written.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a directory.
    """
    if target in (None, STDOUT):
        return
    path = Path(str(target))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; give the name of a file after {flag}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.absolute().parent}; make it first")


def write_json_report(target: str | None, report: Mapping[str, Any]) -> None:
    """Write the report to a file, to stdout for "-", or nowhere for None.

    NaN and infinite numbers, which JSON does not have, become null.
    """
    if target is None:
        return
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        return
    from torchmix.allocation.json_values import write_whole

    write_whole(Path(target), text)


def _finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
