"""Files of a checkpoint (L7): writing them completely or not at all, and reading them with care.

Nothing here knows about quantization; :mod:`torchmix.checkpoint_format` says which tensors there are.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchmix.checkpoint_format import METADATA, TensorSpec, file_bytes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_WEIGHT_SUFFIXES = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ckpt",
    ".npz",
}
_OWN_FILES = {"config.json", INDEX_NAME, "README.md", "pytorch_model.bin.index.json", "torchmix_plan.json"}
_COPIED_DIRECTORIES = ("additional_chat_templates",)


def parse_size(size: int | str) -> int:
    """Bytes from a number or a text such as "5GB" (decimal units) or "512MiB" (binary units).

    Raises:
        ValueError: not a positive size.
    """
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    text = str(size).strip().upper()
    digits = text.rstrip("KMGIB")
    try:
        value = int(float(digits) * units[text[len(digits) :].strip() or "B"])
    except (KeyError, ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ValueError(f"{size!r} is not a size; write for example 5GB or 512MiB")
    return value


def check_target(directory: Path, overwrite: bool, num_bytes: int) -> None:
    """Find out before the work starts whether a checkpoint can be written.

    Args:
        directory: where it will appear.
        overwrite: whether something there may be replaced.
        num_bytes: size of what will be written.

    Raises:
        ValueError: the target exists and may not be replaced.
        OSError: no permission, or not enough space.
    """
    if directory.is_file():
        raise ValueError(f"{directory} is a file; give a directory that does not exist yet")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ValueError(
            f"{directory} exists and is not empty; choose another directory, or pass overwrite=True "
            "(on the command line --overwrite)"
        )
    parent = next(path for path in directory.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, so {directory} cannot be made in it; choose another directory")
    if not os.access(parent, os.W_OK):
        raise PermissionError(
            errno.EACCES, f"no permission to write; choose another place than {directory}", str(parent)
        )
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        message = f"{num_bytes} bytes are needed and {free} are free; make room, or choose another disk"
        raise OSError(errno.ENOSPC, message, str(parent))


@contextmanager
def completed_directory(target: Path, overwrite: bool, num_bytes: int) -> Iterator[Path]:
    """A hidden directory beside ``target`` that takes its place when the block ends without an error.

    Raises:
        ValueError, OSError: as :func:`check_target`.
    """
    check_target(target, overwrite, num_bytes)
    target = target.resolve()  # a link stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.is_dir() and any(target.iterdir()):
            _swap(temporary, target)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put a directory in the place of another, which stays there if that fails and is removed otherwise."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(old, target)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def copy_other_files(source: Path | None, target: Path) -> None:
    """Copy a model's files that hold no weights: tokenizer, chat template, generation configuration, code."""
    if source is None:
        return
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        hidden = path.name.startswith(".")
        if path.is_file() and not (weights or hidden or path.name in _OWN_FILES):
            shutil.copyfile(path, target / path.name)
    for name in _COPIED_DIRECTORIES:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)


def write_shards(
    tensors: Mapping[str, Tensor], shards: Mapping[str, Sequence[TensorSpec]], directory: Path
) -> dict[str, str]:
    """Write the safetensors files; returns file name -> sha256.

    Raises:
        OSError: no space or no permission.
        RuntimeError: a file has another size than was computed (a change in the safetensors library).
    """
    digests = {}
    for name, specs in shards.items():
        parts = {spec.name: tensors[spec.name].detach().cpu().contiguous() for spec in specs}
        try:
            save_file(_without_shared_memory(parts), directory / name, METADATA)
        except SafetensorError as error:
            raise OSError(f"{directory / name}: {error}; make room, or choose another disk") from error
        (directory / name).chmod(0o666 & ~_umask())  # safetensors leaves files that only their owner can read
        size = (directory / name).stat().st_size
        if size != file_bytes(specs):
            raise RuntimeError(
                f"{name} has {size} bytes instead of the {file_bytes(specs)} that were computed; the installed "
                "safetensors writes another header than torchmix knows, please report it"
            )
        digests[name] = sha256_of(directory / name)
    return digests


def _without_shared_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors that look into the memory of another one: safetensors refuses these."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return result


def write_index(
    shards: Mapping[str, Sequence[TensorSpec]], digests: Mapping[str, str], directory: Path
) -> None:
    """Write the index file: which tensor is in which file, and the sha256 of every file."""
    total = sum(spec.num_bytes for specs in shards.values() for spec in specs)
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    index = {"metadata": {"total_size": total, "sha256": dict(digests)}, "weight_map": weight_map}
    write_json(directory / INDEX_NAME, index)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON with a final newline."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: not JSON, or not an object; names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); get the checkpoint again") from error
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: holds a {type(data).__name__} instead of an object; get the checkpoint again"
        )
    return data


def shard_digests(directory: Path) -> dict[str, str]:
    """Files of a checkpoint with their recorded sha256 ("" where none was recorded).

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the index is damaged, or names a file outside the directory.
    """
    index_path = directory / INDEX_NAME
    if index_path.is_file():
        index = read_json(index_path)
        weight_map, metadata = index.get("weight_map"), index.get("metadata")
        if not isinstance(weight_map, dict) or not isinstance(metadata, dict) or not weight_map:
            raise ValueError(f"{index_path}: has no weight_map or no metadata; get the checkpoint again")
        recorded = metadata.get("sha256")
        recorded = recorded if isinstance(recorded, dict) else {}
        names = {name: str(recorded.get(name, "")) for name in map(str, weight_map.values())}
    else:
        names = {SINGLE_NAME: ""}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index_path}: {name!r} is not the name of a safetensors file beside it")
    for name in names:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name}: a file of the checkpoint is missing; get it again")
    return names


def verify_shards(directory: Path) -> None:
    """Compare every file's sha256 with the one recorded when it was written.

    Raises:
        FileNotFoundError, ValueError: as :func:`shard_digests`; or a file was changed, or no hash was recorded.
    """
    for name, recorded in shard_digests(directory).items():
        found = sha256_of(directory / name)
        if found != recorded:
            raise ValueError(
                f"{directory / name}: sha256 {found} instead of {recorded or '(none recorded)'}; the file was changed "
                "or damaged after it was written, get it again"
            )


def sha256_of(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: truncated or damaged; names the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); get the checkpoint again") from error
