"""Which weights are quantized; every linear weight that is not is listed with its reason."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.generators import TinyLM, tiny_gpt2, tiny_mixtral
from tests.models.tiny_models import tiny_model
from torchmix.selection import Selection, linear_weights, matches, select_parameters, weight_fingerprint
from torchmix.tensor import MixedPrecisionTensor


def selected(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    return [target.name for target in select_parameters(model, include, exclude).targets]


def reasons(selection: Selection) -> dict[str, str]:
    return {exclusion.name: exclusion.reason for exclusion in selection.excluded}


BLOCK = ["gate.weight", "up.weight", "down.weight"]
ALL = [f"blocks.{i}.{name}" for i in range(2) for name in BLOCK]


def test_defaults_on_a_language_model() -> None:
    selection = select_parameters(TinyLM())
    assert [target.name for target in selection.targets] == ALL
    assert reasons(selection) == {"lm_head.weight": "output head", "embed.weight": "embedding"}
    model = TinyLM()
    target = select_parameters(model).targets[2]
    assert target.weight is model.blocks[0].down.weight
    assert target.rows is target.weight
    assert (target.parameter_name, target.transposed, target.num_experts) == ("weight", False, None)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.1.up.weight", ["blocks.1.up.weight"]),
        ("blocks.1.up", ["blocks.1.up.weight"]),
        ("blocks.0.*", ALL[:3]),
        ("*.down*", [ALL[2], ALL[5]]),
        ("blocks.?.[gu]*", [name for name in ALL if "down" not in name]),
        (r"re:blocks\.\d\.(gate|up)", [name for name in ALL if "down" not in name]),
        (r"re:.*\.weight", [*ALL, "lm_head.weight"]),
    ],
)
def test_patterns(pattern: str, names: list[str]) -> None:
    model = TinyLM()
    assert selected(model, include=[pattern]) == names
    if set(names) < set(ALL):
        assert selected(model, exclude=[pattern]) == [name for name in ALL if name not in names]


def test_a_regular_expression_must_match_fully() -> None:
    assert not matches("blocks.1.up.weight", "re:blocks")
    assert not matches("blocks.1.up.weight", "re:up")
    assert matches("blocks.1.up.weight", "re:.*up")
    assert not matches("blocks.11.up.weight", "blocks.1.up")
    assert not matches("blocks.1.up.weight", "Blocks.1.up")


def test_include_overrides_the_defaults_and_exclude_wins() -> None:
    model = TinyLM()
    assert selected(model, include=["lm_head"]) == ["lm_head.weight"]
    selection = select_parameters(model, include=["lm_head", "blocks.0.*"], exclude=["*.up"])
    assert [target.name for target in selection.targets] == [ALL[0], ALL[2], "lm_head.weight"]
    assert reasons(selection) == {
        ALL[1]: "excluded by the user",
        ALL[3]: "not matched by include",
        ALL[4]: "excluded by the user",
        ALL[5]: "not matched by include",
        "embed.weight": "embedding",
    }


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.2.*", r"'blocks\.2\.\*' matches no linear layer.*blocks\.0\.gate\.weight"),
        ("embed", "matches no linear layer"),
        ("re:up", "matches fully"),
        ("re:(", r"'re:\(' is not a regular expression"),
        ("", "matches no linear layer"),
    ],
)
def test_patterns_that_match_nothing_are_errors(argument: str, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_parameters(TinyLM(), **{argument: [pattern]})


def test_nothing_left() -> None:
    with pytest.raises(ValueError, match=r"TinyLM is left.*blocks\.0\.gate\.weight: excluded by the user"):
        select_parameters(TinyLM(), exclude=["*"])
    with pytest.raises(ValueError, match="it has no linear layers"):
        select_parameters(nn.Sequential(nn.ReLU()))


def test_short_rows() -> None:
    model = nn.Sequential(nn.Linear(127, 200), nn.Linear(128, 4))
    selection = select_parameters(model)
    assert [target.name for target in selection.targets] == ["1.weight"]
    assert reasons(selection) == {"0.weight": "rows of 127 inputs, fewer than 128"}
    assert selected(model, include=["*"]) == ["0.weight", "1.weight"]
    assert [t.name for t in select_parameters(model, min_in_features=1).targets] == ["0.weight", "1.weight"]


def test_a_single_layer_is_a_model() -> None:
    assert selected(nn.Linear(128, 4)) == ["weight"]
    assert selected(nn.Linear(128, 4), include=["weight"]) == ["weight"]


def test_a_tied_head_is_listed_once() -> None:
    model = TinyLM()
    model.lm_head.weight = model.embed.weight
    selection = select_parameters(model)
    assert [target.name for target in selection.targets] == ALL
    assert reasons(selection) == {"lm_head.weight": "tied to an embedding"}
    model.output = model.lm_head  # the name is no head's, the tie is still seen
    assert reasons(select_parameters(model))["lm_head.weight"] == "tied to an embedding"


def test_layers_tied_to_each_other_are_one_target() -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[1].weight = model[0].weight
    assert selected(model) == ["0.weight"]
    shared = nn.Linear(128, 128)
    assert selected(nn.Sequential(shared, nn.ReLU(), shared)) == ["0.weight"]
    assert linear_weights(model) == ["0.weight"]


@pytest.mark.parametrize("name", ["lm_head", "embed_out", "output_projection"])
def test_heads_by_name(name: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(128, 128), name: nn.Linear(128, 9)})
    assert reasons(select_parameters(model)) == {f"{name}.weight": "output head"}


def test_routers_by_name() -> None:
    """A gate beside experts is a router, a gate of a gated MLP is not."""
    moe = nn.ModuleDict({"gate": nn.Linear(128, 4), "experts": nn.ModuleList([nn.Linear(128, 128)])})
    model = nn.ModuleDict({"moe": moe, "mlp": nn.ModuleDict({"gate": nn.Linear(128, 128)})})
    model["router"] = nn.Linear(128, 4)
    selection = select_parameters(model)
    assert [target.name for target in selection.targets] == ["moe.experts.0.weight", "mlp.gate.weight"]
    assert reasons(selection) == {
        "moe.gate.weight": "router of experts",
        "router.weight": "router of experts",
    }


def router_block(**children: nn.Module) -> nn.Module:
    """A block with experts and something beside them."""
    return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(128, 128)]), **children})


@pytest.mark.parametrize(
    ("beside", "names", "reason"),
    [
        ({"router": nn.ModuleDict({"gate": nn.Linear(128, 4)})}, ["router.gate"], "router of experts"),
        (
            {"router": nn.ModuleDict({"classifier": nn.Linear(128, 4)})},
            ["router.classifier"],
            "router of experts",
        ),
        ({"gate": nn.ModuleDict({"wg": nn.Linear(128, 4)})}, ["gate.wg"], "router of experts"),
        (
            {"gate": nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 4))})},
            ["gate.mlp.0", "gate.mlp.1"],
            "router of experts",
        ),
        ({"router_gate": nn.Linear(128, 4)}, ["router_gate"], "router of experts"),
        ({"shared_expert_gate": nn.Linear(128, 1)}, ["shared_expert_gate"], "gate of a shared expert"),
    ],
)
def test_routers_that_hold_layers_and_gates_of_shared_experts(
    beside: dict[str, nn.Module], names: list[str], reason: str
) -> None:
    model = nn.ModuleDict({"moe": router_block(**beside)})
    selection = select_parameters(model)
    assert [target.name for target in selection.targets] == ["moe.experts.0.weight"]
    assert reasons(selection) == {f"moe.{name}.weight": reason for name in names}
    assert not any(exclusion.counts_against_coverage for exclusion in selection.excluded)
    assert len(selected(model, include=["*"])) == 1 + len(names)


def test_a_router_that_holds_the_experts_is_none() -> None:
    assert selected(nn.ModuleDict({"router": router_block()})) == ["router.experts.0.weight"]


def test_gates_of_shared_experts_in_transformers() -> None:
    found = reasons(select_parameters(tiny_model("qwen2_moe")))
    for layer in range(2):
        assert found[f"model.layers.{layer}.mlp.shared_expert_gate.weight"] == "gate of a shared expert"
        assert found[f"model.layers.{layer}.mlp.gate.weight"] == "router of experts"


def test_experts_of_an_unknown_form_are_listed_and_count_against_the_coverage() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(128, 128), "conv": nn.Conv1d(128, 128, 2), "moe": nn.Module()})
    model["moe"].weight = nn.Parameter(torch.zeros(4, 128, 256))
    model["moe"].bias = nn.Parameter(torch.zeros(4, 1, 256))
    model["moe"].positions = nn.Parameter(torch.zeros(1, 128, 256))
    selection = select_parameters(model)
    assert [target.name for target in selection.targets] == ["fc.weight"]
    [exclusion] = selection.excluded
    assert (exclusion.name, exclusion.weights) == ("moe.weight", 4 * 128 * 256)
    assert "experts interface" in exclusion.reason
    assert exclusion.counts_against_coverage


def test_experts_of_transformers() -> None:
    model = tiny_mixtral()
    selection = select_parameters(model)
    experts = [target for target in selection.targets if target.num_experts]
    prefix = "model.layers.0.mlp.experts"
    assert [target.name for target in experts] == [f"{prefix}.gate_up_proj", f"{prefix}.down_proj"]
    assert [tuple(target.rows.shape) for target in experts] == [(4, 272, 128), (4, 128, 136)]
    assert not any(target.transposed for target in experts)
    assert [target.num_experts for target in experts] == [4, 4]
    assert len(selection.targets) == 4 + 2  # attention
    assert reasons(selection) == {
        "lm_head.weight": "output head",
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.mlp.gate.weight": "router of experts",
    }


def test_conv1d_of_gpt2() -> None:
    """Stored as (K, N); the tied head is listed."""
    selection = select_parameters(tiny_gpt2())
    assert all(target.transposed for target in selection.targets)
    shapes = {target.name.split(".h.0.")[1]: tuple(target.rows.shape) for target in selection.targets}
    assert shapes == {
        "attn.c_attn.weight": (384, 128),
        "attn.c_proj.weight": (128, 128),
        "mlp.c_fc.weight": (512, 128),
        "mlp.c_proj.weight": (128, 512),
    }
    assert reasons(selection)["lm_head.weight"] == "tied to an embedding"


@pytest.mark.parametrize("options", [{}, {"kdim": 130, "vdim": 130}])
def test_attention_of_torch_is_listed(options: dict[str, int]) -> None:
    """It reads its weights itself instead of calling a layer, so they stay, and count against the coverage."""
    model = nn.ModuleDict({"fc": nn.Linear(128, 128), "attention": nn.MultiheadAttention(128, 2, **options)})
    for include in ((), ("*",)):
        selection = select_parameters(model, include)
        assert [target.name for target in selection.targets] == ["fc.weight"]
        names = {name for name, p in model.named_parameters() if name.startswith("att") and p.dim() == 2}
        excluded = {e.name: e for e in selection.excluded}
        assert set(excluded) == names - {"attention.bias_k", "attention.bias_v"}
        assert all(
            "nn.MultiheadAttention" in e.reason and e.counts_against_coverage for e in excluded.values()
        )


def with_weight(weight: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(128, 8))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_cannot_be_quantized(dtype: torch.dtype) -> None:
    model = with_weight(torch.zeros(8, 128).to(dtype))
    with pytest.raises(TypeError, match=rf"1\.weight has dtype {dtype}.*exclude this layer"):
        select_parameters(model)
    assert selected(model, exclude=["1"]) == ["0.weight"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = torch.zeros(8, 128)
    weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"1\.weight holds NaN or infinite weights"):
        select_parameters(with_weight(weight))


def test_already_quantized_weights() -> None:
    model = with_weight(MixedPrecisionTensor.from_hp(torch.randn(8, 128), 4))
    with pytest.raises(TypeError, match=r"1\.weight is already quantized \(MixedPrecisionTensor\)"):
        select_parameters(model)


def test_meta_weights_are_selected_without_values() -> None:
    with torch.device("meta"):
        model = TinyLM()
    selection = select_parameters(model)
    assert [target.name for target in selection.targets] == ALL
    assert weight_fingerprint(selection.targets[0].weight) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fingerprint_does_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 16).bfloat16().half().to(dtype)
    assert weight_fingerprint(weight) == weight_fingerprint(weight.float())


def test_fingerprint_sees_shape_and_values() -> None:
    weight = torch.randn(8, 16)
    found = {weight_fingerprint(w) for w in (weight, weight.t(), weight.view(16, 8), weight.view(2, 4, 16))}
    assert len(found) == 4
    other = weight.clone()
    other[7, 15] += 1e-6
    assert weight_fingerprint(other) != weight_fingerprint(weight)
    assert weight_fingerprint(weight.t().contiguous().t()) == weight_fingerprint(weight)


def test_fingerprint_of_an_excluded_layer_is_kept() -> None:
    model = TinyLM()
    head = next(e for e in select_parameters(model).excluded if e.name == "lm_head.weight")
    assert head.fingerprint == weight_fingerprint(model.lm_head.weight)
    assert head.weights == model.lm_head.weight.numel()
    assert not head.counts_against_coverage
