"""Small random models of several transformers families, and quick ways to quantize any model; no download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.allocation import BitPlan, LayerPlan
from torchmix.selection import select_parameters, weight_fingerprint
from torchmix.tensor import MixedPrecisionTensor
from torchmix.tensor.module_repr import show_quantized_weights

VOCABULARY = 256
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", _SIZES | {"head_dim": 32}),
    "mistral": ("MistralConfig", _SIZES),
    "phi3": ("Phi3Config", _SIZES),
    "gpt2": ("GPT2Config", _GPT2 | {"vocab_size": VOCABULARY}),
    "mixtral": ("MixtralConfig", _SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", _SIZES | _EXPERTS | {"head_dim": 32}),
    # a plain down_proj beside experts of that name
    "qwen2_moe": ("Qwen2MoeConfig", _SIZES | _EXPERTS | {"shared_expert_intermediate_size": 136}),
}
EXPERT_FAMILIES = ("mixtral", "qwen3_moe")


def tiny_model(family: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any) -> Any:
    """A random causal language model of a family, the same on every call; on the meta device without values."""
    import transformers

    class_name, values = CONFIGS[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, class_name)(**(values | changes))
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_ids(samples: int, length: int, seed: int = 0) -> Tensor:
    """Token ids without structure, int64 (samples, length)."""
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor) -> Tensor:
    """Output of a language model, without gradients."""
    with torch.no_grad():
        return model(ids).logits


def generated(model: Any, *, use_cache: bool, new_tokens: int = 6) -> Tensor:
    """Greedy continuation of three prompt tokens, int64 (1, 3 + new_tokens)."""
    ids = random_ids(1, 3, seed=7)
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **options)


def random_plan(
    model: nn.Module,
    widths: Sequence[int] = WIDTHS,
    group_size: int = 128,
    seed: int = 0,
    **changes: Any,
) -> BitPlan:
    """A plan that gives every row a width at random; for a model on any device, meta included.

    ``changes``: include, exclude, min_in_features of the selection, or fields of the plan.
    """
    options = {key: changes.pop(key) for key in ("include", "exclude", "min_in_features") if key in changes}
    selection = select_parameters(model, **options)
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for target in selection.targets:
        shape = tuple(target.weight.shape)
        rows = (*shape[:-2], shape[-1] if target.transposed else shape[-2])
        bits = torch.tensor(widths, dtype=torch.uint8)[torch.randint(len(widths), rows, generator=generator)]
        fingerprint = weight_fingerprint(target.weight)
        layers[target.name] = LayerPlan(target.name, shape, bits, target.transposed, fingerprint)
    values = {"salience": "none", "predicted_kl": None, "predicted_loss": None, **changes}
    return BitPlan(layers, selection.excluded, group_size, tuple(sorted(widths)), **values)


def apply_plan(model: nn.Module, plan: BitPlan, per_token: bool = False) -> nn.Module:
    """Round to nearest at the plan's widths, without quantize_; parameters that share a weight share the new one."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in plan.layers}
    done: dict[str, nn.Parameter] = {}
    kept = dict(model.named_parameters(remove_duplicate=False))  # keeps the ids alive
    for name, parameter in kept.items():
        layer = plan.layers.get(names.get(id(parameter), name))
        module = model.get_submodule(name.rpartition(".")[0])
        if layer is None or isinstance(module, nn.Embedding):
            continue
        if layer.name not in done:
            weight = MixedPrecisionTensor.from_hp(
                parameter.detach(),
                layer.row_bits,
                plan.group_size,
                per_token=per_token,
                transposed=layer.transposed,
            )
            done[layer.name] = nn.Parameter(weight, requires_grad=False)
        setattr(module, name.rpartition(".")[2], done[layer.name])
        show_quantized_weights(module)
    return model


def quantized_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, BitPlan]:
    """A tiny model whose rows have random widths, and the plan behind it."""
    model = tiny_model(family, dtype, **changes)
    plan = random_plan(model)
    return apply_plan(model, plan), plan


def sequential(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    """Plain linears with ordinary and odd sizes, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(172, 136, bias), nn.ReLU(), nn.Linear(136, 320, bias), nn.Linear(320, 5, bias)]
    return nn.Sequential(*layers).to(dtype)


def error_of(call: Callable[[], Any]) -> str:
    """Type and text of what ``call`` raises, for messages of several parts."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 (the test asserts on it)
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")
