"""Files appear completely or not at all, and are read with care."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from torchmix import checkpoint_files
from torchmix.checkpoint_files import (
    INDEX_NAME,
    check_target,
    completed_directory,
    copy_other_files,
    open_shard,
    parse_size,
    read_json,
    sha256_of,
    shard_digests,
    verify_shards,
    write_index,
    write_json,
    write_shards,
)
from torchmix.checkpoint_format import TensorSpec

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5kB", 1500),
        ("2KIB", 2048),
        ("7B", 7),
        ("1000", 1000),
        ("1e3", 1000),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", [0, -1, 0.5, "", "GB", "5 apples", "-5GB", "nan", "inf", None, "5GBB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is not a size; write for example 5GB"):
        parse_size(text)


def everything_in(directory: Path) -> dict[str, bytes]:
    """Files below a directory, hidden ones included; directories end with a slash."""
    return {
        str(path.relative_to(directory)) + "/" * path.is_dir(): b"" if path.is_dir() else path.read_bytes()
        for path in directory.rglob("*")
    }


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory with something in it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    return tmp_path / "out"


def test_a_new_directory_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with completed_directory(target, False, 10) as temporary:
        (temporary / "a").write_text("a")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert everything_in(tmp_path) == {"deep/": b"", "deep/out/": b"", "deep/out/a": b"a"}
    umask = checkpoint_files._umask()
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~umask


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with completed_directory(tmp_path / "out", False, 10) as temporary:
        (temporary / "a").write_text("a")
    assert everything_in(tmp_path) == {"out/": b"", "out/a": b"a"}


def test_old_content_is_replaced_only_at_the_end(old):
    with completed_directory(old, True, 10) as temporary:
        (temporary / "new.txt").write_text("new")
        assert everything_in(old) == {"old.txt": b"old"}
    assert everything_in(old.parent) == {"out/": b"", "out/new.txt": b"new"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_after_an_error(old, error, exists):
    target = old if exists else old.parent / "new"

    def fail() -> None:
        with completed_directory(target, True, 10) as temporary:
            (temporary / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert everything_in(old.parent) == {"out/": b"", "out/old.txt": b"old"}


def test_the_old_content_comes_back_when_the_swap_fails(old, monkeypatch):
    replace = os.replace
    calls = []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken disk")
        replace(source, target)

    monkeypatch.setattr(checkpoint_files.os, "replace", failing)
    with pytest.raises(OSError, match="broken disk"), completed_directory(old, True, 10):
        pass
    assert everything_in(old.parent) == {"out/": b"", "out/old.txt": b"old"}


def test_a_link_to_a_directory_stays_a_link(old):
    link = old.parent / "link"
    link.symlink_to(old)
    with completed_directory(link, True, 10) as temporary:
        (temporary / "new").write_text("new")
    assert link.is_symlink()
    assert everything_in(old) == {"new": b"new"}


def test_targets_that_are_refused(old, monkeypatch):
    with pytest.raises(ValueError, match=r"out exists and is not empty; choose .* overwrite=True"):
        check_target(old, False, 10)
    check_target(old, True, 10)
    with pytest.raises(ValueError, match=r"old.txt is a file; give a directory"):
        check_target(old / "old.txt", True, 10)
    with pytest.raises(ValueError, match=r"old.txt is a file, so .*/x cannot be made"):
        check_target(old / "old.txt" / "x", True, 10)
    monkeypatch.setattr(checkpoint_files.os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=rf"no permission to write; choose .*deep/x: '{old.parent}'"):
        check_target(old.parent / "deep" / "x", False, 10)


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda path: Usage(100, 91, 9))
    check_target(tmp_path / "x", False, 9)
    with pytest.raises(OSError, match="10 bytes are needed and 9 are free; make room") as caught:
        check_target(tmp_path / "x", False, 10)
    assert caught.value.errno == errno.ENOSPC
    assert everything_in(tmp_path) == {}


def test_other_files_are_copied_and_weights_are_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (source / "onnx").mkdir()
    kept = {
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_x.py",
        "LICENSE",
    }
    weights = {"model.safetensors", "pytorch_model.bin", "x.gguf", "consolidated.00.pth", "tf_model.h5"}
    own = {"config.json", "README.md", INDEX_NAME, "pytorch_model.bin.index.json", ".gitattributes"}
    for name in kept | weights | own:
        (source / name).write_text(name)
    copy_other_files(source, target)
    expected = {name: name.encode() for name in kept}
    templates = {"additional_chat_templates/": b"", "additional_chat_templates/tool.jinja": b"tool"}
    assert everything_in(target) == expected | templates
    copy_other_files(None, target)


def write(directory: Path, tensors: dict[str, torch.Tensor], *names: str) -> dict[str, str]:
    """One shard per name with all tensors in the first; returns the hashes."""
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    shards = {name: specs if i == 0 else [] for i, name in enumerate(names or ("model.safetensors",))}
    digests = write_shards(tensors, shards, directory)
    write_index(shards, digests, directory)
    return digests


def test_tensors_come_back_and_hashes_are_those_of_the_files(tmp_path):
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.arange(5), "c": torch.randn(())}
    digests = write(tmp_path, tensors)
    with open_shard(tmp_path / "model.safetensors") as file:
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert digests == {"model.safetensors": sha256_of(tmp_path / "model.safetensors")}
    assert shard_digests(tmp_path) == digests
    verify_shards(tmp_path)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["weight_map"] == dict.fromkeys("abc", "model.safetensors")
    assert index["metadata"] == {"total_size": 48 + 40 + 4, "sha256": digests}


def test_tensors_that_share_memory_are_written_as_copies(tmp_path):
    whole = torch.arange(6.0)
    write(tmp_path, {"whole": whole, "part": whole[:2], "same": whole.view(2, 3), "empty": whole[:0]})
    with open_shard(tmp_path / "model.safetensors") as file:
        assert torch.equal(file.get_tensor("part"), whole[:2])
        assert torch.equal(file.get_tensor("same"), whole.view(2, 3))
        assert file.get_tensor("empty").shape == (0,)


def test_an_unexpected_file_size_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "file_bytes", lambda specs: 7)
    with pytest.raises(RuntimeError, match=r"model.safetensors has \d+ bytes instead of the 7 .* report"):
        write(tmp_path, {"a": torch.zeros(2)})


def test_an_error_of_safetensors_while_writing_is_an_os_error(tmp_path, monkeypatch):
    def full(*arguments: object) -> None:
        raise checkpoint_files.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(OSError, match=r"model.safetensors: I/O error: No space left on device; make room"):
        write(tmp_path, {"a": torch.zeros(2)})


def test_json_is_read_with_care(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"schön": [1, None]})
    assert path.read_text(encoding="utf-8") == '{\n  "schön": [\n    1,\n    null\n  ]\n}\n'
    assert read_json(path) == {"schön": [1, None]}
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path}: not valid JSON .*; get the checkpoint again"):
            read_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=rf"{path}: holds a list instead of an object"):
        read_json(path)


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_a_truncated_file_is_named(tmp_path, cut):
    write(tmp_path, {"a": torch.zeros(8)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    message = rf"{path}: truncated or damaged .*; get the checkpoint again"
    with pytest.raises(ValueError, match=message), open_shard(path):
        pass


def test_an_edited_byte_is_found_by_its_hash(tmp_path):
    (digest,) = write(tmp_path, {"a": torch.zeros(8)}).values()
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{path}: sha256 [0-9a-f]{{64}} instead of {digest}; .* get it again"
    ):
        verify_shards(tmp_path)


def test_without_recorded_hashes_nothing_can_be_verified(tmp_path):
    write(tmp_path, {"a": torch.zeros(8)})
    (tmp_path / INDEX_NAME).unlink()
    assert shard_digests(tmp_path) == {"model.safetensors": ""}
    with pytest.raises(ValueError, match=r"model.safetensors: sha256 \w+ instead of \(none recorded\)"):
        verify_shards(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.safetensors: a file of the checkpoint is missing"):
        shard_digests(tmp_path)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    write_index({names[0]: [TensorSpec("a", torch.uint8, (1,))]}, {}, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors: a file .* is missing"):
        shard_digests(tmp_path)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/x.safetensors", "a/b.safetensors", "", ".", "..", "weights.bin", 3]
)
def test_an_index_that_names_other_files_is_refused(tmp_path, name):
    (tmp_path.parent / "evil.safetensors").write_bytes(b"")
    index = {"metadata": {"sha256": {}}, "weight_map": {"a": name}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"{INDEX_NAME}: '.*' is not the name of a safetensors file beside it"
    ):
        shard_digests(tmp_path)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": {}, "metadata": {}}, {"weight_map": [], "metadata": {}}, {"weight_map": {"a": "b"}}],
)
def test_a_damaged_index_is_refused(tmp_path, index):
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=rf"{INDEX_NAME}: has no weight_map or no metadata; get the checkpoint"
    ):
        shard_digests(tmp_path)
