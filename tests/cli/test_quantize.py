"""``torchmix quantize``: a directory that loads, as large as was planned, or nothing at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.models.tiny_models import tiny_model
from tests.saved_model import save_tiny_model
from torchmix import MixedPrecisionTensor, load_pretrained
from torchmix.allocation import BitPlan
from torchmix.cli.layer_report import REPORT_NAME
from torchmix.huggingface import load_model, load_tokenizer
from torchmix.selection import weight_fingerprint

Run = Callable[..., tuple[int, str, str]]


def weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_plan_and_directory_agree_and_the_model_runs(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    output, kept = tmp_path / "small", tmp_path / "model.calibration"
    calibration = ("--data", text_file, "--samples", 3, "--sequence-length", 64)
    code, out, err = run(
        *(
            "quantize",
            tiny_model,
            "--bits",
            4.5,
            "--output",
            output,
            "--save-calibration",
            kept,
            *calibration,
        ),
        *("--json", tmp_path / "r.json", "--max-shard-size", "200kB"),
    )
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert report["checkpoint_bytes"] == weight_bytes(output)
    assert len(list(output.glob("*.safetensors"))) > 1
    planned = run(
        "plan", tiny_model, "--bits", 4.5, "--calibration", kept, "--json", "-", "--max-shard-size", "200kB"
    )
    assert json.loads(planned[1])["checkpoint_bytes"] == report["checkpoint_bytes"]
    assert report["rounding"] == ["sequential"]
    assert report["predicted_kl"] > 0
    assert report["peak_host_bytes"] > 0
    assert "torchmix evaluate" in out
    assert [line.partition(":")[0] for line in err.splitlines()] == ["calibrating", "rounding"]

    model = load_pretrained(output)
    original = dict(load_model(tiny_model).named_parameters())
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, MixedPrecisionTensor):
            assert parameter.dtype == torch.bfloat16, f"{name} was stored in bfloat16"
            assert torch.equal(parameter, original[name])
    assert sum(isinstance(p, MixedPrecisionTensor) for p in model.parameters()) == 14
    assert load_tokenizer(output)("a")["input_ids"] == load_tokenizer(tiny_model)("a")["input_ids"]
    logits = model(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()

    card = (output / "README.md").read_text(encoding="utf-8")
    assert "predicted KL divergence" in card
    assert "| rounded with | sequential |" in card
    assert "notes.txt" in card
    assert str(tmp_path) not in card, "a card holds no path of the machine it was made on"
    layers = json.loads((output / REPORT_NAME).read_text(encoding="utf-8"))["layers"]
    assert set(layers) == {layer["name"] for layer in report["layers"]}
    assert all(layer["rounding"] == "sequential" and layer["scores"] for layer in layers.values())


def test_without_data_it_works_and_is_quiet_when_asked(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = run(
        "quantize", tiny_model, "--widths", 4, "--output", tmp_path / "a", "--quiet", "--json", "-"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["rounding"] == ["clip"]
    assert report["predicted_kl"] is None
    assert all(set(layer["rows_per_bits"]) == {"4"} for layer in report["layers"])


def test_an_edited_plan_is_followed(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    assert run("plan", tiny_model, "--widths", 4, "--output", plan_file)[0] == 0
    text = plan_file.read_text(encoding="utf-8")
    edited = json.loads(text)
    name = "model.layers.0.mlp.up_proj.weight"
    edited["widths"] = [4, 8]
    edited["layers"][name]["row_bits"] = "8" + edited["layers"][name]["row_bits"][1:]
    plan_file.write_text(json.dumps(edited), encoding="utf-8")
    code, _, err = run(
        "quantize", tiny_model, "--plan", plan_file, "--rounding", "rtn", "--output", tmp_path / "o"
    )
    assert code == 0, err
    weight = dict(load_pretrained(tmp_path / "o").named_parameters())[name]
    assert weight.row_bits.tolist() == [8] + [4] * 191
    assert BitPlan.load(tmp_path / "o" / "torchmix_plan.json").rows_per_bits(name) == {4: 191, 8: 1}


def test_a_plan_with_data_measures_only_its_layers(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    plan_file = tmp_path / "plan.json"
    run("plan", tiny_model, "--widths", 4, "--include", "*down_proj*", "--output", plan_file)
    arguments = ("--plan", plan_file, "--data", text_file, "--samples", 1, "--sequence-length", 64)
    code, out, err = run("quantize", tiny_model, *arguments, "--output", tmp_path / "o", "--json", "-")
    assert code == 0, err
    report = json.loads(out)
    assert report["rounding"] == ["sequential"]
    assert len(report["layers"]) == 2


def test_a_plan_of_another_model_is_refused(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    run("plan", tiny_model, "--widths", 4, "--output", plan_file)
    name = "model.layers.0.mlp.up_proj.weight"
    fingerprint = weight_fingerprint(dict(load_model(tiny_model).named_parameters())[name])
    plan_file.write_text(
        plan_file.read_text(encoding="utf-8").replace(fingerprint, "0" * 16), encoding="utf-8"
    )
    code, _, err = run("quantize", tiny_model, "--plan", plan_file, "--output", tmp_path / "o")
    assert code == 2
    assert name in err
    assert "other values" in err


def test_output_is_checked_before_the_model_is_loaded(
    run: Run, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torchmix.huggingface.load_model", lambda *a, **k: pytest.fail("the model was loaded")
    )
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("kept", encoding="utf-8")
    for output, message in (
        (full, "--overwrite"),
        (full / "file", "is a file"),
        (tiny_model, "the model itself"),
    ):
        code, _, err = run("quantize", tiny_model, "--bits", 4.5, "--output", output)
        assert code == 2
        assert message in err
    assert (full / "file").read_text(encoding="utf-8") == "kept"


def test_no_space_is_found_out_before_calibration(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "900 bytes are free", str(tmp_path))

    monkeypatch.setattr("torchmix.checkpoint_files.check_target", full)
    monkeypatch.setattr("torchmix.workflow.calibrate", lambda *a, **k: pytest.fail("calibration was started"))
    code, _, err = run("quantize", tiny_model, "--bits", 4.5, "--data", text_file, "--output", tmp_path / "o")
    assert code == 1
    assert "900 bytes are free" in err
    assert not list(tmp_path.iterdir())


def test_infeasible_budget_is_found_out_before_calibration(
    run: Run, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchmix.workflow.calibrate", lambda *a, **k: pytest.fail("calibration was started"))
    code, _, err = run("quantize", tiny_model, "--bits", 2.5, "--data", text_file, "--output", tmp_path / "o")
    assert code == 2
    assert "feasible range" in err


def test_overwrite_replaces_what_was_there(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    for bits in (4, 8):
        code, _, err = run(
            "quantize", tiny_model, "--widths", bits, "--output", output, "--overwrite", "--quiet"
        )
        assert code == 0, err
    plan = BitPlan.load(output / "torchmix_plan.json")
    assert plan.widths == (8,)
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_an_already_quantized_model_is_refused(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    run("quantize", tiny_model, "--widths", 4, "--output", tmp_path / "o", "--quiet")
    code, _, err = run("quantize", tmp_path / "o", "--widths", 4, "--output", tmp_path / "p")
    assert code == 2
    assert "already quantized" in err
    assert not (tmp_path / "p").exists()


def test_rows_cut_for_several_devices_are_recorded(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    flags = (
        "--bits",
        4.5,
        "--tensor-parallel",
        2,
        "--rounding",
        "rtn",
        "--output",
        tmp_path / "o",
        "--quiet",
    )
    assert run("quantize", tiny_model, *flags)[0] == 0
    plan = BitPlan.load(tmp_path / "o" / "torchmix_plan.json")
    assert plan.tensor_parallel == 2
    assert "| tensor parallelism | 2 equal blocks" in (tmp_path / "o" / "README.md").read_text(
        encoding="utf-8"
    )
    for layer in plan.layers.values():
        first, second = layer.row_bits.chunk(2)
        assert first.bincount(minlength=9).tolist() == second.bincount(minlength=9).tolist()


def test_sequential_rounding(run: Run, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    data = ("--data", text_file, "--samples", 3, "--sequence-length", 64)
    flags = ("--bits", 4.5, "--rounding", "sequential", "--output", tmp_path / "small")
    code, out, err = run("quantize", tiny_model, *data, *flags)
    assert code == 0, err
    assert "sequential" in out
    assert "rounding: done" in err


@pytest.mark.parametrize(("family", "layers"), [("gpt2", 8), ("qwen3_moe", 12)])
def test_layers_that_are_no_linear_modules_are_quantized_too(
    run: Run, text_file: Path, tmp_path: Path, family: str, layers: int
) -> None:
    source = tmp_path / family
    save_tiny_model(source)  # for the tokenizer
    tiny_model(family, vocab_size=257).save_pretrained(source)  # type: ignore[operator]
    arguments = ("--data", text_file, "--samples", 1, "--sequence-length", 64, "--bits", 4.8, "--quiet")
    code, out, err = run("quantize", source, *arguments, "--output", tmp_path / "o", "--json", "-")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert len(report["layers"]) == layers
    assert report["coverage"] == 1.0
    assert report["checkpoint_bytes"] == weight_bytes(tmp_path / "o")
