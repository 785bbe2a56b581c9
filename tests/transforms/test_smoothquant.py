"""Folding leaves the model's outputs as they are and gives activations and weights the magnitudes of the paper."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.tiny_models import logits, random_ids, sequential, tiny_model
from torchmix.transforms import fold_smoothquant
from torchmix.transforms.norm_readers import find_readers
from torchmix.transforms.smoothquant import smoothing_factors

IDS = random_ids(3, 16)


def model_with_outliers(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Norm weights and biases of different sizes, so that there is something to smooth."""
    model = tiny_model(family, dtype, **changes)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += torch.randn_like(parameter) * 0.3
            parameter.data[3] *= 20.0
    return model


def change(model: nn.Module, folded: nn.Module) -> float:
    """Largest difference of the logits over their largest magnitude."""
    before, after = logits(model, IDS), logits(folded, IDS)
    return float((before - after).abs().max() / before.abs().max())


def test_factors_by_hand() -> None:
    """sqrt(16 / 4), 4^(3/4) / 16^(1/4); a feature or column of zeros keeps 1."""
    x, w = torch.tensor([16.0, 4.0, 0.0, 3.0]), torch.tensor([4.0, 16.0, 5.0, 0.0])
    assert smoothing_factors(x, w, 0.5).tolist() == [2.0, 0.5, 1.0, 1.0]
    assert smoothing_factors(x, w, 0.75)[1].item() == pytest.approx(4**0.75 / 2)
    assert smoothing_factors(x, w, 1.0).tolist() == [16.0, 4.0, 1.0, 1.0]
    assert smoothing_factors(torch.full((1,), 1e38), torch.full((1,), 1e-30), 0.5).tolist() == [
        pytest.approx(1e34)
    ]
    assert smoothing_factors(torch.full((1,), 1e38), torch.full((1,), 1e-40), 0.1).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85])
def test_logits_stay(family: str, alpha: float) -> None:
    """float32: two roundings of 2^-24 per product, sums of up to 192 products in a few layers: 1e-5 is ample."""
    model = model_with_outliers(family)
    folded = copy.deepcopy(model)
    result = fold_smoothquant(folded, IDS, alpha)
    assert len(result.folded) == (4 if family == "gpt2" else 5)
    assert change(model, folded) < 1e-5
    assert any(float((s - 1).abs().max()) > 0.5 for s in result.factors.values())


def test_logits_stay_in_float64() -> None:
    """GPT-2 keeps float64 throughout; the factors are float32 numbers, used alike on both sides."""
    model = model_with_outliers("gpt2", torch.float64)
    folded = copy.deepcopy(model)
    fold_smoothquant(folded, IDS)
    assert change(model, folded) < 1e-13


def test_bfloat16_stays_bfloat16() -> None:
    model = tiny_model("llama", torch.bfloat16)
    folded = copy.deepcopy(model)
    fold_smoothquant(folded, IDS)
    assert {parameter.dtype for parameter in folded.parameters()} == {torch.bfloat16}
    assert change(model, folded) < 0.05  # weights are rounded again, to 2^-8


def test_magnitudes_meet() -> None:
    """alpha = 1/2: afterwards max|X_j| = max|W_j| = sqrt of their product, for every feature (rounding: 1e-5)."""
    model = model_with_outliers("llama")
    before, before_weights = find_readers(model, IDS)
    result = fold_smoothquant(model, IDS)
    after, weights = find_readers(model, IDS)
    for name, readers in result.folded.items():
        old, new = before[name].largest, after[name].largest
        assert old is not None
        assert new is not None
        columns = torch.stack([weights[reader].rows.detach().abs().amax(0) for reader in readers]).amax(0)
        assert torch.allclose(new, old / result.factors[name], rtol=1e-5)
        assert torch.allclose(new, columns, rtol=1e-5)
    assert before_weights.keys() == weights.keys()


def test_llama_report() -> None:
    result = fold_smoothquant(tiny_model("llama"), IDS)
    assert result.folded["model.layers.1.input_layernorm"] == tuple(
        f"model.layers.1.self_attn.{name}_proj.weight" for name in "kqv"
    )
    assert result.folded["model.norm"] == ("lm_head.weight",)
    assert result.factors["model.norm"].shape == (128,)
    assert result.kept == {}


def test_what_is_left_alone_and_why() -> None:
    """A tied head, norms inside the heads, and a norm in front of a router and experts."""
    model = tiny_model("llama", tie_word_embeddings=True)
    kept = copy.deepcopy(model)
    result = fold_smoothquant(kept, IDS)
    assert result.kept == {"model.norm": "lm_head.weight is also used by or for embedding"}
    assert torch.equal(kept.lm_head.weight, model.lm_head.weight)
    assert change(model, kept) < 1e-5
    for family, name, reason in (
        ("qwen3", "model.layers.0.self_attn.q_norm", "its output is read by cat, mul, neg"),
        ("mixtral", "model.layers.0.post_attention_layernorm", "its output is read by __getitem__, linear"),
    ):
        model = model_with_outliers(family)
        folded = copy.deepcopy(model)
        assert fold_smoothquant(folded, IDS).kept[name] == reason
        assert change(model, folded) < 1e-5


class Shared(nn.Module):
    """Two norms with one weight, or one linear behind two norms; a plain third pair so that something is folded."""

    def __init__(self, share: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        if share == "norm":
            self.norms[1].weight = self.norms[0].weight
        if share == "linear":
            self.linears[1].weight = self.linears[0].weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x)).tanh()
        return x


@pytest.mark.parametrize(
    ("share", "reason"),
    [
        ("norm", "its parameters belong to another module too"),
        ("linear", "linears.0.weight is also used by or for norms.1"),
    ],
)
def test_shared_weights(share: str, reason: str) -> None:
    model = Shared(share)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = fold_smoothquant(model, IDS)
    assert result.kept["norms.0"] == reason
    assert result.kept.keys() == {"norms.0", "norms.1"}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norms.2.weight", "linears.2.weight"}  # its bias is zero


def test_norms_that_are_not_proportional_to_their_weight() -> None:
    """Gemma multiplies by 1 + weight."""
    import transformers

    config = transformers.GemmaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GemmaForCausalLM(config)
    before = logits(model, IDS)
    with pytest.raises(
        ValueError, match=r"no normalization of GemmaForCausalLM .*not proportional to its weight"
    ):
        fold_smoothquant(model, IDS)
    assert torch.equal(logits(model, IDS), before)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"alpha=1.5 must lie between 0 and 1"):
        fold_smoothquant(tiny_model("llama"), IDS, 1.5)
    no_norms = nn.Sequential(nn.Embedding(256, 172), *sequential())
    with pytest.raises(ValueError, match=r"no normalization of Sequential .*it has none with a weight"):
        fold_smoothquant(no_norms, IDS)
