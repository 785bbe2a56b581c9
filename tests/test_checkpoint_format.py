"""Sizes of files to the byte, the description in config.json, and what of it is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn

from tests.models.tiny_models import error_of, random_plan, sequential, tiny_model
from torchmix import checkpoint_format
from torchmix.checkpoint_format import (
    METADATA,
    PARTS,
    SAFETENSORS_DTYPES,
    CheckpointConfig,
    LayerFormat,
    TensorSpec,
    file_bytes,
    model_specs,
    producer_name,
    quantized_specs,
    quantized_tensors,
    split_shards,
    stored_tensors,
    tensor_from_parts,
)
from torchmix.tensor import MixedPrecisionTensor

LONG = "layer." * 300 + "weight"
NAMES = st.one_of(
    st.text(min_size=1, max_size=20), st.sampled_from([LONG, "schön.Gewicht", '"\\\n\t\x01\x7f', "层.0.权重"])
)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def encodable(name: str) -> bool:
    return name != "__metadata__" and not any("\ud800" <= letter <= "\udfff" for letter in name)


@given(
    st.dictionaries(
        NAMES.filter(encodable), st.tuples(st.sampled_from(list(SAFETENSORS_DTYPES)), SHAPES), max_size=8
    )
)
def test_file_bytes_is_the_length_that_safetensors_writes(tensors):
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    written = save({spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs}, METADATA)
    assert file_bytes(specs) == len(written)


def test_every_listed_dtype_is_written_in_this_order_and_read_back(tmp_path):
    tensors = {str(dtype): torch.zeros(8, dtype=torch.uint8).view(dtype) for dtype in SAFETENSORS_DTYPES}
    save_file(tensors, tmp_path / "x.safetensors", METADATA)
    content = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del header["__metadata__"]
    by_offset = sorted(header, key=lambda name: header[name]["data_offsets"])
    assert by_offset == [str(dtype) for dtype in reversed(SAFETENSORS_DTYPES)]
    assert [header[str(dtype)]["dtype"] for dtype in SAFETENSORS_DTYPES] == list(SAFETENSORS_DTYPES.values())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert {name: file.get_tensor(name).dtype for name in tensors} == {
            name: tensor.dtype for name, tensor in tensors.items()
        }


@pytest.mark.parametrize("dtype", [torch.complex128, torch.float4_e2m1fn_x2, torch.quint8])
def test_a_dtype_that_files_cannot_hold_is_refused_by_name(dtype):
    specs = [TensorSpec("a", torch.float32, (2,)), TensorSpec("blocks.3.table", dtype, (2,))]
    with pytest.raises(ValueError, match=rf"blocks\.3\.table: .*{dtype}.*float32.*convert") as caught:
        file_bytes(specs)
    assert "uint16" in str(caught.value)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 300)), min_size=1, max_size=30, unique=True),
    st.integers(1, 2000),
)
def test_shards_keep_order_and_modules_and_obey_the_limit(tensors, limit):
    specs = [TensorSpec(f"module{m}.t{size}", torch.uint8, (size,)) for m, size in tensors]
    shards = split_shards(specs, limit)
    stored = [spec for shard in shards.values() for spec in shard]
    assert sorted(stored, key=repr) == sorted(specs, key=repr)
    modules = [list(dict.fromkeys(spec.name.split(".")[0] for spec in shard)) for shard in shards.values()]
    flat = [module for shard in modules for module in shard]
    assert len(flat) == len(set(flat))  # no module in two files
    assert flat == list(dict.fromkeys(spec.name.split(".")[0] for spec in specs))
    for shard, names in zip(shards.values(), modules, strict=True):
        assert len(names) == 1 or sum(spec.num_bytes for spec in shard) <= limit
    if len(shards) == 1:
        assert list(shards) == ["model.safetensors"]
    else:
        assert next(iter(shards)) == f"model-00001-of-{len(shards):05d}.safetensors"


@pytest.mark.parametrize("bits", [2, 3, 7, 8])
def test_specs_of_a_weight_are_those_of_its_tensors(bits):
    weight = MixedPrecisionTensor.from_hp(torch.randn(5, 172), bits, 128)
    tensors = quantized_tensors("w", weight)
    specs = quantized_specs("w", weight.row_bits, 172, 128)
    assert [(s.name, s.dtype, s.shape) for s in specs] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    ]
    assert specs[2].shape == ((5,) if bits == 2 else (5 * math.ceil(2 * bits / 8),) if bits < 8 else (0,))


def make_config(**changes: Any) -> CheckpointConfig:
    layers = {
        "a.weight": LayerFormat((8, 64)),
        "experts.down": LayerFormat((2, 64, 16), True),
    }
    values = {
        "group_size": 128,
        "per_token": False,
        "layers": layers,
        "excluded": (("lm_head.weight", "output head"),),
        "bits_per_weight": 4.5,
        "coverage": 0.75,
        "row_multiple": 16,
        "tensor_parallel": 2,
        "producer": "torchmix 0.1",
    }
    return CheckpointConfig(**{**values, **changes})


@pytest.mark.parametrize("per_token", [False, True])
def test_description_round_trip_through_json(per_token):
    config = make_config(per_token=per_token)
    data = json.loads(json.dumps(config.to_dict()))
    assert CheckpointConfig.from_dict(data) == config
    assert data["quant_method"] == "torchmix"
    assert data["format_version"] == 1
    assert data["scale_format"] == "group"
    assert data["activation"] == {"bits": 8, "symmetric": True, "group": "token" if per_token else 128}
    assert data["layers"] == {
        "a.weight": {"shape": [8, 64]},
        "experts.down": {"shape": [2, 64, 16], "transposed": True},
    }
    assert data["excluded"] == [{"name": "lm_head.weight", "reason": "output head"}]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("quant_method",), "gptq"),
        (("quant_method",), None),
        (("format_version",), 2),
        (("format_version",), "1"),
        (("format_version",), True),
        (("format_version",), None),
        (("scale_format",), "block"),
        (("activation", "bits"), 4),
        (("activation", "symmetric"), False),
        (("activation", "symmetric"), 1),
        (("activation", "group"), 64),
        (("activation", "group"), "channel"),
    ],
)
def test_an_unknown_value_is_refused_by_name_with_the_way_out(path, value):
    data = make_config().to_dict()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    message = error_of(lambda: CheckpointConfig.from_dict(data, "out/config.json"))
    assert message.startswith(
        f"ValueError: out/config.json: {'.'.join(path)}={value!r} is not known to this torchmix"
    )
    assert "written by torchmix 0.1: use that or a newer torchmix" in message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layers": None}, "damaged"),
        ({"layers": {"w": {}}}, "KeyError: 'shape'"),
        ({"layers": {"w": {"shape": "12"}}}, "config.json: w: shape='12'"),
        ({"layers": {"w": {"shape": [8, 64.0]}}}, "w: shape="),
        ({"layers": {"w": {"shape": [8, 0]}}}, "w: shape="),
        ({"layers": {"w": {"shape": [64]}}}, "w: shape="),
        ({"layers": {"w": {"shape": [8, 64], "transposed": 1}}}, "transposed=1"),
        ({"activation": []}, "activation.bits=None"),
        ({"activation": "int8"}, "damaged"),
        ({"group_size": 100, "activation": {"bits": 8, "symmetric": True, "group": 100}}, "group_size=100"),
        (
            {"group_size": "token", "activation": {"bits": 8, "symmetric": True, "group": "token"}},
            "group_size",
        ),
        ({"excluded": [["a", "b"]]}, "damaged"),
    ],
)
def test_a_damaged_description_is_refused(changes, text):
    data = make_config().to_dict() | changes
    message = error_of(lambda: CheckpointConfig.from_dict(data, "config.json"))
    assert message.startswith("ValueError: ")
    assert text in message


@pytest.mark.parametrize("key", list(make_config().to_dict()))
def test_a_missing_entry_is_refused(key):
    data = make_config().to_dict()
    del data[key]
    assert error_of(lambda: CheckpointConfig.from_dict(data)).startswith("ValueError: quantization_config: ")


def parts_of(weight: MixedPrecisionTensor) -> dict[str, torch.Tensor]:
    return {part: getattr(weight, part) for part in PARTS}


@pytest.fixture
def weight() -> MixedPrecisionTensor:
    bits = torch.tensor([2, 3, 4, 5, 6, 7, 8, 8], dtype=torch.uint8)
    return MixedPrecisionTensor.from_hp(torch.randn(8, 64), bits, 128)


def test_tensor_from_parts_is_the_inverse(weight):
    again = tensor_from_parts("a.weight", parts_of(weight), make_config(), torch.bfloat16)
    assert torch.equal(again.dequantize(torch.float32), weight.dequantize())
    assert (again.dtype, again.per_token, again.transposed) == (torch.bfloat16, False, False)


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("qdata", lambda t: t[:-1], "a.weight: bytes of codes"),
        (
            "qdata",
            lambda t: t.to(torch.int8),
            r"a.weight: torch.int8 with 1 dimensions instead of torch.uint8",
        ),
        ("qdata", lambda t: t.view(2, -1), "a.weight: torch.uint8 with 2 dimensions"),
        ("scale", lambda t: t.half(), "a.weight_scale: torch.float16 .* instead of torch.bfloat16"),
        ("scale", lambda t: t.repeat(1, 2), "shape of scales"),
        ("zero_point", lambda t: t[1:], "bytes of zero points"),
        ("row_bits", lambda t: t.int(), "a.weight_row_bits: torch.int32"),
        ("row_bits", lambda t: t.clone().fill_(0), r"row widths \[0\] must lie in 2..8"),
        ("row_bits", lambda t: t.clone().fill_(9), r"row widths \[9\] must lie in 2..8"),
        ("row_bits", lambda t: t[:-1], "row widths"),
    ],
)
def test_parts_that_do_not_fit_are_refused(weight, part, change, text):
    parts = parts_of(weight)
    parts[part] = change(parts[part])
    with pytest.raises(ValueError, match=text):
        tensor_from_parts("a.weight", parts, make_config(), torch.float32)


def test_missing_parts_unknown_names_and_dtypes_are_refused(weight):
    parts = parts_of(weight)
    del parts["scale"]
    with pytest.raises(ValueError, match=r"a\.weight: the checkpoint lacks \['scale'\]"):
        tensor_from_parts("a.weight", parts, make_config(), torch.float32)
    with pytest.raises(ValueError, match="b: the checkpoint lacks its description"):
        tensor_from_parts("b", parts_of(weight), make_config(), torch.float32)
    with pytest.raises(TypeError, match=r"a\.weight: dtype torch.float64"):
        tensor_from_parts("a.weight", parts_of(weight), make_config(), torch.float64)


def test_specs_of_a_model_follow_the_state_dict_and_leave_out_tied_tensors():
    model = tiny_model("llama", tie_word_embeddings=True)
    specs = model_specs(model)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    assert [spec.name for spec in specs] == names


def test_a_planned_head_is_no_longer_tied_to_its_embedding():
    model = tiny_model("llama", tie_word_embeddings=True)
    plan = random_plan(model, include=["lm_head"])
    names = [spec.name for spec in model_specs(model, plan)]
    assert "model.embed_tokens.weight" in names
    assert names[-4:] == ["lm_head.weight" + suffix for suffix in PARTS.values()]


def test_a_plan_of_another_model_has_no_size():
    plan = random_plan(sequential())
    with pytest.raises(ValueError, match=r"0\.weight of shape \(136, 172\) is in the plan but not in Linear"):
        model_specs(nn.Linear(8, 8), plan)
    with pytest.raises(
        ValueError, match=r"0\.weight of shape \(136, 172\) is in the plan but not in Sequential"
    ):
        model_specs(nn.Sequential(nn.Linear(172, 8)), plan)


class Counting(nn.Linear):
    """Keeps state that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


def test_state_that_is_no_tensor_is_refused_instead_of_lost():
    with pytest.raises(ValueError, match=r"1\._extra_state: a dict cannot be stored"):
        list(stored_tensors(nn.Sequential(nn.Linear(2, 2), Counting(2, 2))))


def test_producer_without_installation(monkeypatch):
    def missing(name: str) -> str:
        raise checkpoint_format.PackageNotFoundError(name)

    monkeypatch.setattr(checkpoint_format, "version", missing)
    assert producer_name() == "torchmix (not installed)"
