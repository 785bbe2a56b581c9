"""--json: checked early, written whole, valid JSON always."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchmix.cli.json_report import check_json_target, write_json_report


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json_report(str(path), {"a": float("inf"), "b": [1.5, float("nan")], "c": {4: (1, 2)}, "d": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": None,
        "b": [1.5, None],
        "c": {"4": [1, 2]},
        "d": "é",
    }
    assert list(tmp_path.iterdir()) == [path]


def test_a_dash_is_stdout_and_none_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    write_json_report("-", {"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    write_json_report(None, {"a": 1})
    assert capsys.readouterr().out == ""


def test_targets_that_cannot_be_written_are_refused_early(tmp_path: Path) -> None:
    check_json_target(None)
    check_json_target("-")
    check_json_target(str(tmp_path / "new.json"))
    with pytest.raises(IsADirectoryError, match="name of a file"):
        check_json_target(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="make it first"):
        check_json_target(str(tmp_path / "missing" / "r.json"))
