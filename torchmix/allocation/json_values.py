"""Reading JSON that people may have edited, and writing files whole or not at all (L3).

Errors are ``ValueError`` and say where, which key, the rule and the value.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Types = tuple[type, ...]


def typed(where: str, key: str, value: object, types: Types) -> Any:
    """``value``, if it is one of ``types``; a bool is not an int here.

    Raises:
        ValueError: it is not.
    """
    if (isinstance(value, bool) and bool not in types) or not isinstance(value, types):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise ValueError(f"{where}: {key}={value!r} must be {names}, not {type(value).__name__}")
    return value


def typed_values(where: str, data: object, keys: Mapping[str, Types]) -> dict[str, Any]:
    """The values of ``data``, which must have exactly these keys with these types.

    Raises:
        ValueError: not an object, a missing or unknown key, or a value of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(
            f"{where}: expected an object with the keys {', '.join(keys)}, got {type(data).__name__}"
        )
    if missing := [key for key in keys if key not in data]:
        raise ValueError(f"{where}: missing {', '.join(map(repr, missing))}; write the file again")
    if unknown := [key for key in data if key not in keys]:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(keys)}")
    return {key: typed(where, key, data[key], types) for key, types in keys.items()}


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` for :func:`json.loads` that refuses a key given twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} is given twice in one object; keep one")
    return values


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears under its name only when it is complete.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: no space or no permission; a file that was there before stays as it was.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
