"""``torchmix plan``: sizes to the byte, every layer accounted for, nothing written unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from torchmix import calibrate
from torchmix.allocation import BitPlan
from torchmix.calibration import Calibration
from torchmix.checkpoint import planned_checkpoint_bytes
from torchmix.huggingface import load_model

Run = Callable[..., tuple[int, str, str]]


def test_plan_without_data_says_size_layers_and_reasons(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    report_file, plan_file = tmp_path / "report.json", tmp_path / "plan.json"
    code, out, err = run("plan", tiny_model, "--bits", 4.5, "--json", report_file, "--output", plan_file)
    assert (code, err) == (0, "")
    report = json.loads(report_file.read_text(encoding="utf-8"))
    plan = BitPlan.load(plan_file)
    model = load_model(tiny_model)
    assert report["checkpoint_bytes"] == planned_checkpoint_bytes(model, plan)
    assert report["original_bytes"] == (tiny_model / "model.safetensors").stat().st_size
    assert report["bits_per_weight"] == plan.bits_per_weight
    assert 4.4 < report["bits_per_weight"] <= 4.5
    assert report["predicted_kl"] is None
    assert report["coverage"] == 1.0
    assert len(report["layers"]) == 14
    assert {entry["name"]: entry["reason"] for entry in report["excluded"]} == {
        "lm_head.weight": "output head",
        "model.embed_tokens.weight": "embedding",
    }
    assert report["peak_host_bytes"] > 10**8
    assert report["peak_device_bytes"] == 0
    assert report["seconds"] > 0
    for text in (f"{report['checkpoint_bytes']:,} bytes", "lm_head.weight: output head", "coverage 100.0%"):
        assert text in out


def test_plan_with_data_predicts_kl_and_keeps_the_calibration(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "model.calibration"
    shared = ("--data", text_file, "--samples", 2, "--sequence-length", 64, "--quiet", "--json", "-")
    code, out, err = run("plan", tiny_model, "--bits", 4.5, "--save-calibration", kept, *shared)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["predicted_kl"] > 0
    assert report["calibration"]["tokens"] == 128
    assert len(Calibration.load(kept).hessians) > 0

    unkept = json.loads(run("plan", tiny_model, "--bits", 4.5, *shared)[1])
    assert unkept["predicted_kl"] == report["predicted_kl"]  # scored with the same rounding, kept or not
    again = json.loads(run("plan", tiny_model, "--bits", 4.5, "--calibration", kept, "--json", "-")[1])
    assert again["predicted_kl"] == report["predicted_kl"]
    assert again["checkpoint_bytes"] == report["checkpoint_bytes"]
    smaller = json.loads(run("plan", tiny_model, "--bits", 3.9, "--calibration", kept, "--json", "-")[1])
    assert smaller["checkpoint_bytes"] < report["checkpoint_bytes"]
    assert smaller["predicted_kl"] > report["predicted_kl"]


def test_one_width_needs_no_budget_and_layers_can_be_chosen(run: Run, tiny_model: Path) -> None:
    arguments = ("--widths", 4, "--include", "*.mlp.*", "--exclude", "re:.*layers\\.0\\..*", "--json", "-")
    report = json.loads(run("plan", tiny_model, *arguments)[1])
    assert [layer["name"].split(".")[2] for layer in report["layers"]] == ["1", "1", "1"]
    assert all(set(layer["rows_per_bits"]) == {"4"} for layer in report["layers"])
    reasons = {entry["reason"] for entry in report["excluded"]}
    assert {"excluded by the user", "not matched by include"} <= reasons


def test_the_papers_setting_reports_its_true_bits(run: Run, tiny_model: Path) -> None:
    report = json.loads(run("plan", tiny_model, "--rows-at-8-bits", 0.25, "--json", "-")[1])
    rows = [sum(layer["rows_per_bits"].get(bits, 0) for layer in report["layers"]) for bits in ("4", "8")]
    assert rows[1] == pytest.approx(0.25 * sum(rows), abs=1)
    assert report["bits_per_weight"] > 4.25


def test_a_curve_instead_of_a_size(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = run("plan", tiny_model, "--curve", "--points", 4, "--json", tmp_path / "r.json")
    assert (code, err.partition(":")[0]) == (0, "planning")
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    curve = report["curve"]
    assert len(curve) == 4
    assert set(curve[0]) == {
        *(
            "bits_per_weight",
            "checkpoint_bytes",
            "predicted_kl",
            "measured_kl",
            "measured_perplexity",
            "ratio",
        )
    }
    for key in ("bits_per_weight", "checkpoint_bytes"):
        assert [row[key] for row in curve] == sorted(row[key] for row in curve)
    assert {row["measured_kl"] for row in curve} == {None}
    assert not {"bits_per_weight", "layers", "checkpoint_bytes"} & set(report)
    assert report["estimated_seconds"] > 0
    assert "predicted KL" in out
    assert "size on disk  " not in out.partition("bits per weight")[0]


def test_a_measured_curve_beside_a_size(run: Run, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kept, plot = tmp_path / "m.cal", tmp_path / "curve.png"
    data = ("--data", text_file, "--samples", 2, "--sequence-length", 64, "--save-calibration", kept)
    assert run("plan", tiny_model, "--bits", 4.5, *data)[0] == 0
    flags = ("--curve", "--points", 2, "--measure", text_file, "--measure-tokens", 1025, "--plot", plot)
    code, out, err = run(
        *("plan", tiny_model, "--calibration", kept, "--bits", 4.5, *flags),
        *("--rounding", "rtn", "--json", tmp_path / "r.json"),
    )
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["measured_on"]["rounding"] == ["rtn"]
    narrow, wide = report["curve"]
    assert wide["measured_kl"] < report["measured_kl"] < narrow["measured_kl"]
    assert narrow["ratio"] == narrow["measured_kl"] / narrow["predicted_kl"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    for text in (
        "measured KL divergence",
        "times the prediction",
        "over the curve",
        f"curve written to {plot}",
    ):
        assert text in out
    assert "size 2 of 3, 3." in err


def test_a_plot_without_matplotlib_is_found_out_before_the_work(
    run: Run, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchmix.plots.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("torchmix.huggingface.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    code, _, err = run("plan", tiny_model, "--curve", "--plot", "c.png", "--measure", "python-docs")
    assert code == 2
    assert 'pip install "torchmix[plots]"' in err


def test_rows_are_cut_for_several_devices(run: Run, tiny_model: Path) -> None:
    report = json.loads(
        run("plan", tiny_model, "--bits", 4.5, "--tensor-parallel", 4, "--row-multiple", 2, "--json", "-")[1]
    )
    assert (report["tensor_parallel"], report["row_multiple"]) == (4, 2)
    for layer in report["layers"]:
        assert all(rows % 8 == 0 for rows in layer["rows_per_bits"].values())
    code, _, err = run("plan", tiny_model, "--bits", 4.5, "--tensor-parallel", 5)
    assert code == 2
    assert "5" in err


def test_the_time_is_an_estimate_and_says_so(run: Run, tiny_model: Path, text_file: Path) -> None:
    out = run("plan", tiny_model, "--bits", 4.5)[1]
    assert "without calibration, about" in out.partition("time to quantize")[2].splitlines()[0]
    data = ("--data", text_file, "--samples", 1, "--sequence-length", 64)
    assert "of it calibration" in run("plan", tiny_model, "--bits", 4.5, *data)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 2), "feasible range"),
        (("--bits", 12), "feasible range"),
        (("--bits", 4, "--include", "nothing*"), "matches no linear layer"),
        (("--bits", 4, "--data", "missing.txt"), "no such file"),
        (("--bits", 4, "--calibration", "missing.cal"), "no such calibration file"),
        (("--bits", 4, "--group-size", 100), "multiple of 8"),
        (("--bits", 4, "--json", "missing/r.json"), "make it first"),
        (("--bits", 4, "--max-shard-size", "huge"), "5GB"),
        (("--curve", "--curve-from", 2), "--curve-from 2 is outside the feasible range"),
        (("--curve", "--plot", "missing/c.png", "--measure", "python-docs"), "make it first"),
    ],
)
def test_what_cannot_be_planned_is_code_2_and_one_line(
    run: Run,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("plan", tiny_model, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_no_model_is_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("plan", tmp_path, "--bits", 4)
    assert code == 2
    assert "config.json" in err


def test_a_calibration_of_another_model_is_refused(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.cal"
    calibrate(nn.Sequential(nn.Linear(128, 8)), None).save(other)
    code, _, err = run("plan", tiny_model, "--bits", 4.5, "--calibration", other)
    assert code == 2
    assert "0.weight" in err
    assert "does not exist" in err
    code, _, err = run("plan", tiny_model, "--bits", 4.5, "--calibration", other, "--group-size", 64)
    assert code == 2
    assert "--group-size 128" in err
