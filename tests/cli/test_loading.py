"""The model of a command: found, in the dtype of the arithmetic, and back in the dtype of its files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from torchmix.cli.loading import check_model_name, load_model_for, restore_dtypes, tensor_dtypes


class Mixed(nn.Module):
    """Tied weights in bfloat16, a bias in float32, a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 8, dtype=torch.bfloat16)
        self.head = nn.Linear(8, 4, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.head.bias = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


def test_dtypes_come_back_and_ties_stay() -> None:
    model = Mixed()
    before, dtypes = model.embed.weight.detach().clone(), tensor_dtypes(model)
    model.float()
    restore_dtypes(model, dtypes)
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.head.bias.dtype == torch.float32
    assert model.count.dtype == torch.int64
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, before)


@pytest.mark.parametrize(
    ("dtype", "arithmetic", "written"),
    [(None, torch.float32, torch.bfloat16), ("float16", torch.float16, torch.float16)],
)
def test_arithmetic_on_a_cpu_is_float32_and_files_keep_their_dtype(
    tiny_model: Path, dtype: str | None, arithmetic: torch.dtype, written: torch.dtype
) -> None:
    loaded = load_model_for(Namespace(model=str(tiny_model), dtype=dtype, device="cpu"))
    assert {p.dtype for p in loaded.model.parameters()} == {arithmetic}
    assert {loaded.dtypes[name] for name, _ in loaded.model.named_parameters()} == {written}
    assert loaded.directory == tiny_model
    assert loaded.original_bytes == (tiny_model / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", ["/no/such/model", "./missing", "a/b/c", "missing/"])
def test_names_that_can_only_be_directories_are_not_looked_up_on_a_hub(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        check_model_name(name)


def test_hub_ids_and_directories_pass(tmp_path: Path) -> None:
    for name in ("gpt2", "org/model", str(tmp_path)):
        check_model_name(name)
