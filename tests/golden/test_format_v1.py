"""Checkpoints of format version 1, written once: every later torchmix must read the same weights from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.golden.make_format_v1 import GOLDEN, Module, decoded_layers
from torchmix.checkpoint import load_pretrained, save_pretrained
from torchmix.checkpoint_inspection import inspect_checkpoint
from torchmix.evaluation import sqnr_db
from torchmix.tensor import MixedPrecisionTensor

NAMES = ("module", "llama")


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected.safetensors")


def load(name: str) -> nn.Module:
    return load_pretrained(GOLDEN / name, model=Module() if name == "module" else None, verify=True)


def run(model: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_those_that_were_saved(name: str, expected: dict[str, Tensor]) -> None:
    model = load(name)
    prefix = f"{name}/weights/"
    names = {key.removeprefix(prefix) for key in expected if key.startswith(prefix)}
    quantized = {key for key, p in model.named_parameters() if isinstance(p, MixedPrecisionTensor)}
    assert quantized == names
    widths: set[int] = set()
    for key in names:
        weight: Any = model.get_parameter(key)
        assert torch.equal(weight.dequantize(torch.float32), expected[prefix + key]), key
        widths |= set(weight.row_bits.unique().tolist())
    assert widths == {2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_made_from_the_description_agrees(name: str, expected: dict[str, Tensor]) -> None:
    config = json.loads((GOLDEN / name / "config.json").read_text())["quantization_config"]
    for key, rows in decoded_layers(GOLDEN / name, config).items():
        assert torch.equal(rows, expected[f"{name}/weights/{key}"])


def test_outputs_of_single_layers(expected: dict[str, Tensor]) -> None:
    output = run(load("module"), expected["module/input"])
    # the input is the same to the bit, so are its 8-bit codes; only float sums may be ordered differently
    torch.testing.assert_close(output, expected["module/output"], rtol=1e-5, atol=1e-4)


def test_outputs_of_a_language_model(expected: dict[str, Tensor]) -> None:
    output = run(load("llama"), expected["llama/input"])
    # a last bit that differs in a norm can move single activations to the next of 255 codes, 48 dB below them
    assert sqnr_db(expected["llama/output"], output) > 48


@pytest.mark.parametrize("name", NAMES)
def test_description(name: str) -> None:
    info = inspect_checkpoint(GOLDEN / name, verify=True)
    assert (info.config.format_version, info.config.group_size) == (1, 16)
    assert info.config.per_token == (name == "module")
    assert len(info.shards) == (1 if name == "module" else 3)
    assert math.isclose(info.bits_per_weight, info.config.bits_per_weight)


@pytest.mark.parametrize("name", NAMES)
def test_saving_it_again_writes_the_same_tensors(name: str, tmp_path: Path) -> None:
    save_pretrained(load(name), tmp_path / "out", max_shard_size="8KB")
    for path in (GOLDEN / name).glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
