"""Rows of data sets, local or on the hub (L7): the only module that imports ``datasets``, where one is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchmix.hub import why_unreachable


def dataset_rows(name: str, path: Path | None) -> Iterator[Any]:
    """Rows of the train split of a local file, a local directory, or a data set on the hub ("name:config").

    Hub data sets are streamed, so that only what is read is downloaded; offline they come from the cache.

    Args:
        name: what the user wrote, "name" or "name:config".
        path: the file or directory of that name, None where there is none.

    Raises:
        ImportError: ``datasets`` is not installed.
        FileNotFoundError: the hub does not answer, or has no such data set.
        ValueError: it cannot be read.
    """
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            f'data set {name!r} needs a package: pip install "torchmix[data]"; or give a .txt or .jsonl file'
        ) from error
    try:
        if path is None:
            repository, _, config = name.partition(":")
            streaming = not datasets.config.HF_HUB_OFFLINE
            if streaming and (reason := why_unreachable(repository)):
                raise ConnectionError(f"there is no such file, and the hub does not answer ({reason})")
            yield from datasets.load_dataset(repository, config or None, split="train", streaming=streaming)
        elif path.is_file():
            yield from datasets.load_dataset("parquet", data_files=str(path), split="train")
        elif (path / "dataset_dict.json").exists():
            yield from datasets.load_from_disk(str(path))["train"]
        elif (path / "state.json").exists():
            yield from datasets.load_from_disk(str(path))
        else:
            yield from datasets.load_dataset(str(path), split="train")
    except Exception as error:
        kind = FileNotFoundError if path is None and isinstance(error, OSError) else ValueError
        raise kind(
            f"data set {name!r} (split train) cannot be read: {type(error).__name__}: {error}; give a local "
            f".txt or .jsonl file, or set HF_HUB_OFFLINE=1 where the data set is in the local cache"
        ) from error
