"""Figures are built from rows without pyplot, readable in any colours, and written whole or not at all."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchmix.plots import check_matplotlib, quality_curve, write_figure

pytest.importorskip("matplotlib")
ROWS: list[dict[str, Any]] = [
    {"bits_per_weight": 5.0, "predicted_kl": 0.01, "measured_kl": 0.012},
    {"bits_per_weight": 4.0, "predicted_kl": 0.05, "measured_kl": None},
    {"bits_per_weight": 3.2, "predicted_kl": 0.2, "measured_kl": 0.25},
]


def test_curves_are_drawn_over_rising_bits() -> None:
    [axes] = quality_curve(ROWS, "model").axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines) == ["predicted", "measured"]
    assert lines["predicted"].get_xydata().tolist() == [[3.2, 0.2], [4.0, 0.05], [5.0, 0.01]]
    assert lines["measured"].get_xydata().tolist() == [[3.2, 0.25], [5.0, 0.012]]
    assert axes.get_yscale() == "log"
    assert "nats per token" in axes.get_ylabel()
    assert "bits per weight" in axes.get_xlabel()
    assert axes.get_title() == "model"


def test_lines_differ_in_more_than_colour() -> None:
    [axes] = quality_curve(ROWS).axes
    looks = {(line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}
    assert len(looks) == 2


def test_only_what_was_found_is_drawn() -> None:
    predicted = [{**row, "measured_kl": None} for row in ROWS]
    [axes] = quality_curve(predicted).axes
    assert [line.get_label() for line in axes.get_lines()] == ["predicted"]
    [axes] = quality_curve([*ROWS, {"bits_per_weight": 6.0, "measured_kl": 0.0}]).axes
    assert len(axes.get_lines()[1].get_xydata()) == 2, "zero has no place on a logarithmic axis"
    with pytest.raises(ValueError, match="1 rows and no KL divergence"):
        quality_curve([{"bits_per_weight": 4.0, "predicted_kl": None, "measured_kl": None}])


@pytest.mark.parametrize(("name", "start"), [("c.png", b"\x89PNG"), ("c.PDF", b"%PDF"), ("c.svg", b"<?xml")])
def test_files_by_their_ending(tmp_path: Path, name: str, start: bytes) -> None:
    write_figure(quality_curve(ROWS), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_that_was_there_stays_where_drawing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.png"
    path.write_text("old", encoding="utf-8")
    figure = quality_curve(ROWS)

    def fail(target: Path, format: str) -> None:
        target.write_text("half", encoding="utf-8")
        raise OSError("no space")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        write_figure(figure, path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.png"]
    with pytest.raises(ValueError, match=r"must end in one of \.png"):
        write_figure(figure, tmp_path / "c.gif")


def test_pyplot_is_not_touched() -> None:
    code = (
        "import sys\n"
        "from torchmix.plots import quality_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        "quality_curve([{'bits_per_weight': 4.0, 'predicted_kl': 0.1}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    check_matplotlib()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (check_matplotlib, lambda: quality_curve(ROWS)):
        with pytest.raises(ImportError, match=r'pip install "torchmix\[plots\]"'):
            call()
