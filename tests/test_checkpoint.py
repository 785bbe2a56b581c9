"""Saving: sizes planned to the byte, files that are complete or not there, and what they say about the model."""

from __future__ import annotations

import errno
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import quantize_

from tests.models.tiny_models import (
    WIDTHS,
    apply_plan,
    error_of,
    logits,
    quantized_model,
    random_ids,
    random_plan,
    sequential,
    tiny_model,
)
from torchmix import checkpoint, checkpoint_files
from torchmix.allocation import BitPlan
from torchmix.checkpoint import load_pretrained, planned_checkpoint_bytes, save_pretrained
from torchmix.checkpoint_inspection import inspect_checkpoint
from torchmix.config import mixllm_config
from torchmix.tensor import MixedPrecisionTensor
from torchmix.workflow import calibrate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def disk_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def everything_in(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def model() -> nn.Module:
    return apply_plan(sequential(), random_plan(sequential()))


def linears(
    layers: list[tuple[str, tuple[int, int]]], dtype: torch.dtype, bias: bool, tied: bool
) -> nn.Module:
    """Named linears of the given shapes (N, K); with ``tied`` one more that shares the first weight."""
    model = nn.Module()
    for name, (out_features, in_features) in layers:
        if not hasattr(model, name):
            model.add_module(name, nn.Linear(in_features, out_features, bias, dtype=dtype))
    if tied and not hasattr(model, "again"):
        model.add_module("again", nn.Linear(1, 1, bias))
        model.again.weight = next(model.children()).weight
    return model


@settings(max_examples=40)
@given(
    names=st.lists(
        st.text(min_size=1, max_size=60).filter(lambda s: "." not in s), min_size=1, max_size=4, unique=True
    ),
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 300)), min_size=4, max_size=4),
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4, unique=True),
    group_size=st.sampled_from([8, 64, 128, 512]),
    limit=st.integers(1, 20_000),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    tied=st.booleans(),
)
def test_planned_bytes_are_those_on_disk(
    tmp_path_factory, names, shapes, widths, group_size, limit, dtype, bias, tied
):
    arguments = (list(zip(names, shapes, strict=False)), dtype, bias, tied)
    model = linears(*arguments)
    plan = random_plan(model, widths, group_size, min_in_features=1)
    planned = planned_checkpoint_bytes(model, plan, limit)
    with torch.device("meta"):
        assert planned_checkpoint_bytes(linears(*arguments), plan, limit) == planned
    quantize_(model, mixllm_config(plan, model=model, rounding="rtn"))
    directory = tmp_path_factory.mktemp("checkpoint") / "out"
    info = save_pretrained(model, directory, max_shard_size=limit)
    assert info.checkpoint_bytes == disk_bytes(directory) == planned
    assert info.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("limit", ["5GB", "200KB", 1])
def test_planned_bytes_of_language_models(tmp_path, family, limit):
    model = tiny_model(family, tie_word_embeddings=family == "llama")
    plan = random_plan(model, [8] if limit == 1 else WIDTHS)  # without any zero point
    planned = planned_checkpoint_bytes(model, plan, limit)
    skeleton = tiny_model(family, device="meta", tie_word_embeddings=family == "llama")
    assert planned == planned_checkpoint_bytes(skeleton, plan, limit)
    info = save_pretrained(apply_plan(model, plan), tmp_path / "out", max_shard_size=limit)
    assert planned == info.checkpoint_bytes == disk_bytes(tmp_path / "out")
    assert info.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=1e-12)
    assert (len(info.shards) > 1) == (limit != "5GB")


def test_a_head_that_the_plan_unties_is_counted_twice(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = random_plan(model, include=["lm_head"])
    planned = planned_checkpoint_bytes(model, plan)
    save_pretrained(apply_plan(model, plan), tmp_path / "out")
    assert planned == disk_bytes(tmp_path / "out")


def test_all_tensors_of_a_layer_are_in_one_file(tmp_path, model):
    save_pretrained(model, tmp_path / "out", max_shard_size=1)
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    by_module: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        by_module.setdefault(name.split(".")[0], set()).add(shard)
    assert all(len(shards) == 1 for shards in by_module.values())
    assert len(set(weight_map.values())) == 3


def test_saving_twice_writes_the_same_bytes(tmp_path, model):
    plan = random_plan(sequential())
    for name in ("a", "b"):
        save_pretrained(model, tmp_path / name / "out", plan=plan, max_shard_size=30_000)
    first = everything_in(tmp_path / "a" / "out")
    assert first == everything_in(tmp_path / "b" / "out")
    assert set(first) == {
        "README.md",
        "config.json",
        "torchmix_plan.json",
        "model.safetensors.index.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    }
    assert BitPlan.load(tmp_path / "a" / "out" / "torchmix_plan.json") == plan
    language_model, _ = quantized_model("llama")
    save_pretrained(language_model, tmp_path / "c")
    save_pretrained(language_model, tmp_path / "d")
    first, second = everything_in(tmp_path / "c"), everything_in(tmp_path / "d")
    assert first.pop("README.md").replace(b"# c\n", b"# d\n").replace(b'("c")', b'("d")') == second.pop(
        "README.md"
    )
    assert first == second


def test_save_load_save_gives_the_same_weights_and_description(tmp_path):
    model, plan = quantized_model("mixtral", torch.bfloat16)
    save_pretrained(model, tmp_path / "a", plan=plan)
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b")
    first, second = everything_in(tmp_path / "a"), everything_in(tmp_path / "b")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        assert first[name] == second[name], name
    for name in ("config.json", "generation_config.json"):
        assert json.loads(first[name]) == json.loads(second[name]), name


@pytest.mark.parametrize("with_plan", [True, False])
def test_what_the_plan_said_survives_saving_a_reloaded_model(tmp_path, with_plan):
    model = tiny_model("llama")
    plan = random_plan(model, [4], exclude=["*down_proj"], row_multiple=16, tensor_parallel=2)
    save_pretrained(apply_plan(model, plan), tmp_path / "a", plan=plan if with_plan else None)
    save_pretrained(load_pretrained(tmp_path / "a"), tmp_path / "b")
    first, second = (inspect_checkpoint(tmp_path / name).config for name in "ab")
    assert first == second
    assert (first.row_multiple, first.tensor_parallel) == ((16, 2) if with_plan else (1, 1))
    assert first.coverage == 1.0
    reasons = dict(first.excluded)
    assert reasons["model.layers.0.mlp.down_proj.weight"] == (
        "excluded by the user" if with_plan else "left as it is"
    )
    assert reasons["lm_head.weight"] == ("output head" if with_plan else "left as it is")
    assert ("model.embed_tokens.weight" in reasons) == with_plan


def test_weights_that_quantize_never_shows_count_against_coverage(tmp_path):
    model = tiny_model("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        quantize_(model, mixllm_config())
    save_pretrained(model, tmp_path / "out")
    config = inspect_checkpoint(tmp_path / "out").config
    experts = {name for name, _ in config.excluded if "experts" in name}
    assert len(experts) == 4
    assert dict(config.excluded)[min(experts)].startswith("quantize_ without a plan")
    missed = sum(model.get_parameter(name).numel() for name in experts)
    done = sum(math.prod(layer.shape) for layer in config.layers.values())
    assert config.coverage == done / (done + missed)


def test_description_of_a_model(tmp_path):
    model = tiny_model("gpt2")
    plan = random_plan(model)
    save_pretrained(apply_plan(model, plan, per_token=True), tmp_path / "out", plan=plan)
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["architectures"] == ["GPT2LMHeadModel"]
    assert data["model_type"] == "gpt2"
    quantization = data["quantization_config"]
    assert quantization["activation"]["group"] == "token"
    assert quantization["bits_per_weight"] == plan.bits_per_weight
    assert quantization["layers"]["transformer.h.0.attn.c_attn.weight"] == {
        "shape": [128, 384],
        "transposed": True,
    }
    assert {"name": "lm_head.weight", "reason": "tied to an embedding"} in quantization["excluded"] or {
        "name": "transformer.wte.weight",
        "reason": "embedding",
    } in quantization["excluded"]


def test_layers_that_differ_in_what_is_stored_once_are_refused(tmp_path, model):
    weight = MixedPrecisionTensor.from_hp(torch.randn(5, 320), 4, 64)
    model[3].weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(
        ValueError, match=r"3\.weight: group_size=64, per_token=False differ from 0\.weight \(128, F"
    ):
        save_pretrained(model, tmp_path / "out")


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="Sequential holds no quantized weight; call quantize_"):
        save_pretrained(sequential(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tensor_with_the_name_of_a_part_is_refused(tmp_path, model):
    model[0].register_parameter("weight_scale", nn.Parameter(torch.ones(1)))
    message = error_of(lambda: save_pretrained(model, tmp_path / "out"))
    assert message.startswith("ValueError: 0.weight_scale: the model has a tensor of its own with the name")
    assert message.endswith("exclude that layer")
    assert not list(tmp_path.iterdir())


def test_tensors_without_values_or_in_a_foreign_dtype_are_refused(tmp_path, model):
    model[1].register_buffer("table", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"1\.table: safetensors files cannot hold torch.complex128"):
        save_pretrained(model, tmp_path / "out")
    model[1].table = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match=r"1\.table is on the meta device and has no values to store"):
        save_pretrained(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_replaced_only_when_asked_and_at_the_end(tmp_path, model, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(ValueError, match="exists and is not empty"):
        save_pretrained(model, target)
    seen = []
    inspect = checkpoint.inspect_checkpoint

    def spy(directory: Path) -> Any:
        seen.append(sorted(path.name for path in target.iterdir()))
        return inspect(directory)

    monkeypatch.setattr(checkpoint, "inspect_checkpoint", spy)
    info = save_pretrained(model, target, overwrite=True)
    assert seen == [["old.txt"]]
    assert info.directory == target
    assert not (target / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_can_be_saved_over_the_files_that_it_was_loaded_from(tmp_path):
    model, _ = quantized_model("llama")
    save_pretrained(model, tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    save_pretrained(load_pretrained(tmp_path / "out"), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    ids = random_ids(1, 4)
    assert torch.equal(logits(load_pretrained(tmp_path / "out"), ids), logits(model, ids))


@pytest.mark.parametrize("exists", [False, True])
def test_a_disk_that_fills_up_midway_leaves_nothing_behind(tmp_path, model, monkeypatch, exists):
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "old.txt").write_text("old")
    written = []
    save_file = checkpoint_files.save_file

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if written:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_pretrained(model, target, max_shard_size=1, overwrite=True)
    assert written
    assert everything_in(tmp_path) == ({"out/old.txt": b"old"} if exists else {})


def test_the_files_beside_the_weights_come_along(tmp_path):
    source = tmp_path / "source"
    tiny_model("llama").save_pretrained(source)
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_custom.py"):
        (source / name).write_text(name)
    model = load_model_with_files(source)
    plan = random_plan(model)
    save_pretrained(apply_plan(model, plan), tmp_path / "out", plan=plan)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "modeling_custom.py",
        "tokenizer.json",
        "torchmix_plan.json",
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "vocab.txt").write_text("other")
    save_pretrained(model, tmp_path / "given", source=str(tmp_path / "other"))
    assert (tmp_path / "given" / "vocab.txt").exists()
    assert not (tmp_path / "given" / "tokenizer.json").exists()
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory; source must be"):
        save_pretrained(model, tmp_path / "b", source=tmp_path / "nowhere")


def load_model_with_files(source: Path) -> Any:
    from torchmix.huggingface import load_model

    return load_model(source)


def test_the_card_is_made_or_given(tmp_path, model):
    save_pretrained(model, tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert text.count('load_pretrained("a", model=skeleton)') == 1
    assert f"{inspect_checkpoint(tmp_path / 'a').checkpoint_bytes:,} bytes" in text
    save_pretrained(model, tmp_path / "b", card="mine")
    assert (tmp_path / "b" / "README.md").read_text() == "mine"


def test_a_compiled_model_is_saved_as_the_model_inside(tmp_path, model):
    save_pretrained(torch.compile(model, backend="eager"), tmp_path / "out")
    other = load_pretrained(tmp_path / "out", model=sequential())
    x = torch.randn(2, 172)
    assert torch.equal(other(x), model(x))


def test_a_quantized_head_beside_its_embedding_stays_quantized_after_loading(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = random_plan(model, include=["lm_head", "*mlp*"])
    save_pretrained(apply_plan(model, plan), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded: Any = load_pretrained(tmp_path / "out")
    assert isinstance(loaded.lm_head.weight, MixedPrecisionTensor)
    ids = random_ids(2, 8)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_a_dtype_that_weights_cannot_have_is_refused(tmp_path, model, dtype):
    save_pretrained(model, tmp_path / "out")
    with pytest.raises(TypeError, match=f"dtype={dtype} is not one that quantized weights can have"):
        load_pretrained(tmp_path / "out", model=sequential(), dtype=dtype)


def test_a_module_needs_a_skeleton(tmp_path, model):
    save_pretrained(model, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"out: this checkpoint is not of a transformers model, .* model=skeleton"
    ):
        load_pretrained(tmp_path / "out")


def test_a_planned_layer_that_was_not_quantized_is_not_hidden(tmp_path):
    model = nn.Sequential(nn.Linear(128, 16), nn.Linear(128, 8))
    plan = calibrate(model).plan(5.0)
    quantize_(model, mixllm_config(plan), filter_fn=lambda module, name: name == "0")
    with pytest.raises(ValueError, match=r"1\.weight: planned but not quantized, as 1 of 2 layers"):
        save_pretrained(model, tmp_path / "out", plan=plan)
    assert not (tmp_path / "out").exists()
    assert save_pretrained(model, tmp_path / "out").config.excluded == (("1.weight", "left as it is"),)
