"""Models through transformers: loaded, saved and reloaded, each time the same bits; refused loudly otherwise."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.tiny_models import (
    apply_plan,
    error_of,
    generated,
    logits,
    quantized_model,
    random_ids,
    random_plan,
    sequential,
    tiny_model,
)
from torchmix import huggingface
from torchmix.checkpoint import load_pretrained, save_pretrained
from torchmix.huggingface import (
    is_transformers_config,
    load_model,
    load_tokenizer,
    model_directory,
    register,
)
from torchmix.tensor import MixedPrecisionTensor

ROOT = Path(__file__).parents[1]
LAYER = "model.layers.1.mlp.up_proj.weight"
IDS = random_ids(2, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Any, Path]:
    """A quantized language model and where it was saved, in several files."""
    directory = tmp_path_factory.mktemp("saved") / "llama"
    model, plan = quantized_model("llama")
    save_pretrained(model, directory, plan=plan, max_shard_size="150KB")
    return model, directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved[1], tmp_path / "llama"))


def same_parameters(model: Any, other: Any) -> bool:
    """Equal in names, dtypes and bits."""
    first, second = model.state_dict(), other.state_dict()
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def test_loading_gives_the_same_bits(saved):
    model, directory = saved
    for loaded in (
        load_pretrained(directory, verify=True),
        transformers.AutoModelForCausalLM.from_pretrained(directory),
        transformers.LlamaForCausalLM.from_pretrained(directory),
        load_model(str(directory)),
    ):
        assert same_parameters(loaded, model)
        assert torch.equal(logits(loaded, IDS), logits(model, IDS))
        assert not loaded.training
        assert repr(loaded) == repr(model)
        assert (
            "up_proj): Linear(in_features=128, out_features=192, bias=False, weight=MixedPrecisionTensor("
            in repr(loaded)
        )


@pytest.mark.parametrize("use_cache", [True, False])
def test_generating_gives_the_same_tokens(saved, use_cache):
    model, directory = saved
    loaded = load_pretrained(directory)
    assert torch.equal(generated(loaded, use_cache=use_cache), generated(model, use_cache=use_cache))


def test_a_skeleton_on_the_meta_device(saved):
    model, directory = saved
    skeleton = tiny_model("llama", device="meta")
    skeleton.model.rotary_emb = tiny_model("llama").model.rotary_emb  # its buffers are in no checkpoint
    loaded = load_pretrained(directory, model=skeleton)
    assert same_parameters(loaded, model)
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


@pytest.mark.parametrize("as_skeleton", [False, True])
def test_tied_weights_stay_tied(tmp_path, as_skeleton):
    model, _ = quantized_model("llama", tie_word_embeddings=True)
    save_pretrained(model, tmp_path / "out")
    skeleton = tiny_model("llama", tie_word_embeddings=True) if as_skeleton else None
    loaded: Any = load_pretrained(tmp_path / "out", model=skeleton)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_as_saved_and_on_request(tmp_path, saved, dtype):
    model, directory = saved
    loaded: Any = load_pretrained(directory, dtype=dtype)
    auto = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    assert same_parameters(loaded, auto)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    weight = loaded.get_parameter(LAYER)
    assert torch.equal(weight.dequantize(torch.float32), model.get_parameter(LAYER).dequantize())
    narrow = apply_plan(
        tiny_model("llama").to(dtype), random_plan(tiny_model("llama"))
    )  # config.dtype is outdated
    save_pretrained(narrow, tmp_path / "narrow")
    assert same_parameters(load_pretrained(tmp_path / "narrow"), narrow)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(saved, device_map):
    pytest.importorskip("accelerate")
    model, directory = saved
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, device_map=device_map)
    assert torch.equal(logits(loaded, IDS.to(loaded.device)).cpu(), logits(model, IDS))


def test_saving_with_transformers_and_loading_again(saved, tmp_path):
    model, directory = saved
    load_pretrained(directory).save_pretrained(tmp_path / "one")
    load_pretrained(directory).save_pretrained(tmp_path / "many", max_shard_size="150KB")
    for name in ("one", "many"):
        loaded = load_pretrained(tmp_path / name)
        assert same_parameters(loaded, model)
        assert torch.equal(logits(loaded, IDS), logits(model, IDS))
    config = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((directory / "config.json").read_text())["quantization_config"]
    ours, theirs = load_file(tmp_path / "one" / "model.safetensors"), {}
    for path in directory.glob("*.safetensors"):
        theirs |= load_file(path)
    assert {name: tensor.tolist() for name, tensor in ours.items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }


def test_saving_with_transformers_refuses_an_outdated_description(saved, tmp_path):
    loaded: Any = load_pretrained(saved[1])
    loaded.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(192, 128))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight.* use torchmix\.save_pretrained"):
        loaded.save_pretrained(tmp_path / "out")
    save_pretrained(loaded, tmp_path / "out")
    assert same_parameters(load_pretrained(tmp_path / "out"), loaded)


def test_saving_a_fresh_model_with_transformers_fails_loudly(tmp_path):
    model, _ = quantized_model("llama")
    assert error_of(lambda: model.save_pretrained(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_loaded_model_can_be_pickled(saved):
    loaded = load_pretrained(saved[1])
    assert same_parameters(pickle.loads(pickle.dumps(loaded)), loaded)


def run_without_torchmix(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_loading_without_torchmix_fails_loudly(family, tmp_path):
    model, _ = quantized_model(family)
    save_pretrained(model, tmp_path / "out")
    code = (
        "import sys, transformers\n"
        f"transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        "print('loaded')"
    )
    result = run_without_torchmix(code)
    assert result.returncode != 0
    assert "loaded" not in result.stdout
    assert "Error" in result.stderr.splitlines()[-1]


def drop(directory: Path, *names: str) -> None:
    """Remove tensors from the files and the index."""
    index = directory / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    for name in names:
        path = directory / data["weight_map"].pop(name)
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, {"format": "pt"})
    index.write_text(json.dumps(data))


def test_a_layer_without_its_tensors_is_an_error_in_transformers_too(directory):
    drop(directory, *(LAYER + suffix for suffix in ("", "_scale", "_zero_point", "_row_bits")))
    message = error_of(lambda: transformers.AutoModelForCausalLM.from_pretrained(directory))
    assert message.startswith(f"ValueError: {LAYER}: the files do not hold this quantized weight")
    assert f"{LAYER}" in error_of(lambda: load_pretrained(directory))


@pytest.mark.parametrize("suffix", ["", "_scale", "_zero_point", "_row_bits"])
def test_a_layer_without_one_of_its_tensors_is_an_error_in_transformers_too(directory, suffix, caplog):
    drop(directory, LAYER + suffix)
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="transformers"):
        message = error_of(lambda: transformers.AutoModelForCausalLM.from_pretrained(directory))
    assert message.startswith("RuntimeError: ")
    assert f"{LAYER}: the checkpoint lacks" in caplog.text


def test_a_missing_plain_tensor_is_an_error_for_us(directory):
    drop(directory, "model.norm.weight")
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight.*not in the files, and LlamaForCausalLM would run"
    ):
        load_pretrained(directory)


def test_a_description_of_another_model_is_refused(directory):
    path = directory / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"num_hidden_layers": 1}))
    for load in (transformers.AutoModelForCausalLM.from_pretrained, load_pretrained):
        message = error_of(lambda load=load: load(directory))
        assert "model.layers.1.self_attn.q_proj.weight: the checkpoint has shape (128, 128)" in message
        assert "LlamaForCausalLM has no such parameter" in message
    path.write_text(json.dumps(data | {"intermediate_size": 136}))
    assert "the checkpoint has shape (192, 128), LlamaForCausalLM has (136, 128)" in error_of(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(directory)
    )


def test_original_models_are_loaded_too(tmp_path):
    model = tiny_model("gpt2", torch.bfloat16)
    model.save_pretrained(tmp_path / "gpt2")
    loaded = load_model(tmp_path / "gpt2")
    assert same_parameters(loaded, model)
    assert next(load_model(tmp_path / "gpt2", dtype=torch.float32).parameters()).dtype == torch.float32


def test_places_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not the directory of a model: it has no config.json"):
        load_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"nowhere: the model cannot be loaded"):
        load_model(str(tmp_path / "nowhere"))
    (tmp_path / "empty" / "config.json").write_text(json.dumps(tiny_model("llama").config.to_dict()))
    with pytest.raises(ValueError, match=r"empty: the model cannot be loaded"):
        load_model(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty: no tokenizer can be loaded"):
        load_tokenizer(tmp_path / "empty")


@pytest.fixture
def offline(monkeypatch) -> None:
    """No hub, and no waiting for it."""
    monkeypatch.setattr(huggingface, "why_unreachable", lambda name: "https://hub.example: no route")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} s for the hub"))


@pytest.mark.usefixtures("offline")
def test_a_mistyped_name_fails_at_once():
    expected = (
        r"no/such-model: .*no such directory.*does not answer \(https://hub\.example: no route\); check"
    )
    for load in (load_model, load_tokenizer):
        with pytest.raises(FileNotFoundError, match=expected):
            load("no/such-model")
    assert model_directory("no/such-model") is None


def test_without_the_hub_only_downloaded_files_are_looked_through(monkeypatch):
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name, **options: asked.append(options)
    )
    for reason in ("no route", ""):
        monkeypatch.setattr(huggingface, "why_unreachable", lambda name, reason=reason: reason)
        load_tokenizer("some/model")
    assert asked == [{"local_files_only": True}, {}]


def test_directories_of_models(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "why_unreachable", lambda name: "")
    assert model_directory(tmp_path) == tmp_path
    assert model_directory("no/such-model", local_files_only=True) is None
    asked = {}

    def snapshot(name: str, file: str, **options: Any) -> str:
        asked.update(options)
        return str(tmp_path / "snapshot" / file)

    monkeypatch.setattr(transformers.utils, "cached_file", snapshot)
    assert model_directory("some/model", local_files_only=True) == tmp_path / "snapshot"
    assert asked["local_files_only"]
    assert is_transformers_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    assert not is_transformers_config({"model_type": "llama", "architectures": []})
    assert not is_transformers_config({"dtype": "float32"})


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'torchmix\[transformers\]'"):
        load_model(tmp_path)
    model = apply_plan(sequential(), random_plan(sequential()))
    save_pretrained(model, tmp_path / "out")
    assert isinstance(load_pretrained(tmp_path / "out", model=sequential())[0].weight, MixedPrecisionTensor)  # type: ignore[index]


def test_registering_twice_and_with_an_old_transformers(monkeypatch, caplog):
    assert register()
    assert register()
    monkeypatch.setattr(huggingface, "version", lambda name: "5.17.2.dev0")
    assert not register()
    assert (
        "transformers 5.17.2.dev0 cannot load torchmix checkpoints, which need 5.23 or newer" in caplog.text
    )
