"""Checked JSON values, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os

import pytest

from torchmix.allocation import json_values

KEYS = {"size": (int,), "name": (str,), "loss": (float, type(None))}


def test_values_of_the_right_types_pass():
    data = {"size": 3, "name": "a", "loss": None}
    assert json_values.typed_values("here", data, KEYS) == data


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "here: expected an object"),
        ({"size": 3, "name": "a"}, "here: missing 'loss'"),
        ({"size": 3, "name": "a", "loss": None, "extra": 1}, "here: unknown key 'extra'"),
        ({"size": True, "name": "a", "loss": None}, "here: size=True must be int, not bool"),
        ({"size": 3, "name": 1, "loss": None}, "here: name=1 must be str"),
        ({"size": 3, "name": "a", "loss": "x"}, "here: loss='x' must be float or null"),
    ],
)
def test_wrong_values_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        json_values.typed_values("here", data, KEYS)


def test_a_key_given_twice_is_refused():
    with pytest.raises(ValueError, match="'a' is given twice"):
        json.loads('{"a": 1, "b": 2, "a": 3}', object_pairs_hook=json_values.unique_keys)


def test_write_whole_replaces_the_file(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    json_values.write_whole(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    path.write_text("old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        json_values.write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        json_values.write_whole(tmp_path / "missing" / "file.json", "text")
