"""``torchmix inspect``: what a checkpoint holds, and why a layer has its widths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from torchmix.calibration import Calibration
from torchmix.cli.layer_report import REPORT_NAME

Run = Callable[..., tuple[int, str, str]]
LAYER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def quantized(
    call: Callable[..., int], tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the checkpoint "small" and the calibration "model.calibration"."""
    folder = tmp_path_factory.mktemp("quantized")
    arguments = [
        "quantize",
        tiny_model,
        "--data",
        text_file,
        "--samples",
        2,
        "--sequence-length",
        64,
        "--bits",
        4.5,
    ]
    arguments += ["--output", folder / "small", "--save-calibration", folder / "model.calibration", "--quiet"]
    assert call(*arguments) == 0
    return folder


def test_summary_accounts_for_every_file_and_layer(run: Run, quantized: Path, tmp_path: Path) -> None:
    code, out, err = run("inspect", quantized / "small", "--verify", "--json", tmp_path / "r.json")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["checkpoint_bytes"] == (quantized / "small" / "model.safetensors").stat().st_size
    assert report["format_version"] == 1
    assert report["verified"] is True
    assert len(report["layers"]) == 14
    for text in ("sha256 is right", "lm_head.weight: output head", f"{report['checkpoint_bytes']:,} bytes"):
        assert text in out
    each = run("inspect", quantized / "small", "--layers")[1]
    assert LAYER in each
    assert LAYER not in out


def test_a_layer_shows_rows_per_width_and_the_scores_behind(run: Run, quantized: Path) -> None:
    code, out, _ = run(
        "inspect", quantized / "small", "--layer", LAYER.removesuffix(".weight"), "--json", "-"
    )
    assert code == 0
    (detail,) = json.loads(out)["details"]
    scores = Calibration.load(quantized / "model.calibration").layers[LAYER].scores["fisher_token"]
    assert sum(detail["rows_per_bits"].values()) == len(scores) == 128
    entries = detail["scores"]["widths"]
    assert detail["rows_per_bits"] == {bits: entry["rows"] for bits, entry in entries.items()}
    assert min(entry["if_narrowest"][0] for entry in entries.values()) == float(scores[:, 0].min())
    assert max(entry["if_narrowest"][2] for entry in entries.values()) == float(scores[:, 0].max())
    text = run("inspect", quantized / "small", "--layer", LAYER)[1]
    assert "median at 3" in text
    assert "sequential, signal to noise" in text


def test_scores_come_from_the_calibration_file_where_one_is_given(
    run: Run, quantized: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(quantized / "small", bare)
    (bare / REPORT_NAME).unlink()
    assert "scores: not known here" in run("inspect", bare, "--layer", LAYER)[1]
    given = run(
        "inspect", bare, "--layer", LAYER, "--calibration", quantized / "model.calibration", "--json", "-"
    )
    stored = run("inspect", quantized / "small", "--layer", LAYER, "--json", "-")
    assert json.loads(given[1])["details"][0]["scores"] == json.loads(stored[1])["details"][0]["scores"]


def test_a_pattern_may_name_several_layers(run: Run, quantized: Path) -> None:
    out = run("inspect", quantized / "small", "--layer", "*.down_proj", "--json", "-")[1]
    assert [detail["name"] for detail in json.loads(out)["details"]] == [LAYER.replace(".1.", ".0."), LAYER]


@pytest.mark.parametrize(
    ("layer", "message"),
    [("lm_head", "lm_head.weight is not quantized: output head"), ("zz", "names look like")],
)
def test_unknown_layers_say_why(run: Run, quantized: Path, layer: str, message: str) -> None:
    code, _, err = run("inspect", quantized / "small", "--layer", layer)
    assert code == 2
    assert message in err


def test_damage_and_wrong_directories_are_code_2(
    run: Run, quantized: Path, tiny_model: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(quantized / "small", damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    for directory, flags, message in (
        (damaged, ["--verify"], "sha256"),
        (tiny_model, [], "not quantized"),
        (tmp_path / "missing", [], "not a directory"),
    ):
        code, out, err = run("inspect", directory, *flags)
        assert (code, out) == (2, "")
        assert message in err
