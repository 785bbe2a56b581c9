"""``inspect_checkpoint``: its numbers, and every kind of damage that it must name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny_models import apply_plan, error_of, quantized_model, random_plan, sequential
from torchmix.allocation import BitPlan
from torchmix.checkpoint import load_pretrained, save_pretrained
from torchmix.checkpoint_inspection import inspect_checkpoint

LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[Path, BitPlan]:
    """A saved language model and its plan."""
    directory = tmp_path_factory.mktemp("original") / "llama"
    model, plan = quantized_model("llama")
    save_pretrained(model, directory, plan=plan, max_shard_size="150KB")
    return directory, plan


@pytest.fixture
def directory(original, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original[0], tmp_path / "llama"))


def test_numbers_of_a_checkpoint(original):
    directory, plan = original
    info = inspect_checkpoint(str(directory), verify=True)
    assert [layer.name for layer in info.layers] == list(plan.layers)
    for layer in info.layers:
        assert layer.rows_per_bits == plan.rows_per_bits(layer.name)
        assert layer.bits_per_weight == plan.bits_per_weight_of(layer.name)
        assert layer.shape == plan.layers[layer.name].shape
    assert info.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-12)
    assert info.checkpoint_bytes == sum(p.stat().st_size for p in directory.glob("*.safetensors"))
    assert len(info.shards) > 1
    data = json.loads(json.dumps(info.to_dict()))
    assert set(data) == {
        "bits_per_weight",
        "checkpoint_bytes",
        "coverage",
        "format_version",
        "producer",
        "group_size",
        "row_multiple",
        "tensor_parallel",
        "activation_group",
        "layers",
        "excluded",
        "shards",
    }
    assert data["layers"][0] == {
        "name": info.layers[0].name,
        "shape": list(info.layers[0].shape),
        "rows_per_bits": {str(bits): rows for bits, rows in info.layers[0].rows_per_bits.items()},
        "bits_per_weight": info.layers[0].bits_per_weight,
    }
    assert data["shards"][0]["name"] == "model-00001-of-00003.safetensors"
    assert len(data["shards"][0]["sha256"]) == 64


def test_experts_and_transposed_layers(tmp_path):
    for family in ("mixtral", "gpt2"):
        model, plan = quantized_model(family)
        save_pretrained(model, tmp_path / family)
        info = inspect_checkpoint(tmp_path / family)
        assert {layer.name: layer.rows_per_bits for layer in info.layers} == {
            name: plan.rows_per_bits(name) for name in plan.layers
        }


def test_bits_come_from_the_files_and_not_from_what_config_json_says(directory):
    before = inspect_checkpoint(directory).bits_per_weight
    edit_config(directory, lambda data: data.update(bits_per_weight=1.0))
    assert inspect_checkpoint(directory).bits_per_weight == before


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change quantization_config."""
    path = directory / "config.json"
    data = json.loads(path.read_text())
    change(data["quantization_config"])
    path.write_text(json.dumps(data))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of the shard that holds LAYER."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    path = directory / index["weight_map"][LAYER]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refused(directory: Path) -> str:
    """The message, which inspecting and loading must share."""
    message = error_of(lambda: inspect_checkpoint(directory))
    assert message == error_of(lambda: load_pretrained(directory))
    return message


def test_places_that_are_no_checkpoint(directory):
    assert refused(directory / "nowhere") == (
        f"FileNotFoundError: {directory}/nowhere is not a directory; give the directory of a saved model"
    )
    assert "config.json is not a directory" in refused(directory / "config.json")
    (directory / "config.json").unlink()
    assert "llama has no config.json; give the directory" in refused(directory)
    (directory / "config.json").write_text("{'a': 1}")
    assert "config.json: not valid JSON" in refused(directory)
    (directory / "config.json").write_text("[]")
    assert "config.json: holds a list instead of an object" in refused(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    assert "config.json: has no quantization_config, so this model is not quantized" in refused(directory)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format_version": 99}, "format_version=99 is not known to this torchmix, which reads (1,)"),
        ({"quant_method": "awq"}, "quant_method='awq' is not known"),
        ({"scale_format": "block"}, "scale_format='block' is not known"),
        ({"activation": {"bits": 4, "symmetric": True, "group": 128}}, "activation.bits=4 is not known"),
        ({"layers": {LAYER: {"shape": "x"}}}, f"{LAYER}: shape='x'"),
    ],
)
def test_descriptions_that_are_refused(directory, changes, text):
    edit_config(directory, lambda data: data.update(changes))
    message = refused(directory)
    assert message.startswith(f"ValueError: {directory}/config.json: ")
    assert text in message


@pytest.mark.parametrize("part", ["", "_scale", "_zero_point", "_row_bits"])
def test_a_missing_part_is_named(directory, part):
    edit_tensors(directory, lambda tensors: tensors.pop(LAYER + part))
    assert f"{directory}: {LAYER}{part} is missing in the files; get" in refused(directory)


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("", lambda t: t[:-1].clone(),
         "is U8 of shape ({n-1},), but its layer of shape (192, 128) needs U8 of shape ({n},)"),
        ("", lambda t: t.to(torch.int8), "is I8 of shape ({n},), but"),
        ("", lambda t: t[None], "is U8 of shape (1, {n}), but"),
        ("_scale", lambda t: t.float(), "is F32 of shape (192, 1), but its layer of shape (192, 128) needs BF16"),
        ("_scale", lambda t: t[:-1].clone(), "is BF16 of shape (191, 1), but"),
        ("_zero_point", lambda t: t[:-1].clone(), "is U8 of shape ({n-1},), but"),
        ("_row_bits", lambda t: t.long(), "is I64 of shape (192,), but its layer of shape (192, 128) needs U8"),
        ("_row_bits", lambda t: t[:5].clone(), "is U8 of shape (5,), but"),
    ],
)  # fmt: skip
def test_a_part_of_another_dtype_or_shape_is_named(directory, part, change, text):
    numbers = {}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        before = tensors[LAYER + part]
        numbers.update({"{n}": str(len(before)), "{n-1}": str(len(before) - 1)})
        tensors[LAYER + part] = change(before)

    edit_tensors(directory, edit)
    for key, value in numbers.items():
        text = text.replace(key, value)
    message = refused(directory)
    assert f"{LAYER}{part} {text}" in message
    assert message.endswith("it is damaged, get the checkpoint again")


@pytest.mark.parametrize("bits", [0, 1, 9, 255])
def test_row_widths_that_do_not_exist_are_named(directory, bits):
    edit_tensors(directory, lambda tensors: tensors[LAYER + "_row_bits"].fill_(bits))
    assert f"{LAYER}_row_bits holds widths [{bits}] where 2 to 8 are possible" in refused(directory)


def test_a_layer_that_is_wider_than_described_is_named(directory):
    edit_config(directory, lambda data: data["layers"][LAYER].update(shape=[192, 136]))
    assert f"{LAYER}_zero_point is" in refused(directory) or f"{LAYER}_scale is" in refused(directory)


def test_a_truncated_shard_is_named(directory):
    path = directory / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: truncated or damaged" in refused(directory)


def test_an_edited_byte_is_found_when_asked(directory):
    path = directory / "model-00002-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)
    inspect_checkpoint(directory)
    message = error_of(lambda: inspect_checkpoint(directory, verify=True))
    assert message == error_of(lambda: load_pretrained(directory, verify=True))
    assert message.startswith(f"ValueError: {path}: sha256 ")


def test_a_missing_shard_and_a_foreign_file_are_named(directory):
    index = directory / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    path = directory / data["weight_map"][LAYER]
    path.rename(directory.parent / "evil.safetensors")
    assert refused(directory).startswith(f"FileNotFoundError: {path}: a file of the checkpoint is missing")
    for name in ("../evil.safetensors", str(directory.parent / "evil.safetensors")):
        data["weight_map"][LAYER] = name
        index.write_text(json.dumps(data))
        assert f"{name!r} is not the name of a safetensors file beside it" in refused(directory)


def test_a_module_that_is_no_language_model(tmp_path):
    model = sequential()
    save_pretrained(apply_plan(model, random_plan(model), per_token=True), tmp_path / "out")
    assert inspect_checkpoint(tmp_path / "out").to_dict()["activation_group"] == "token"
