"""Which parameters are quantized, and why others are not (L4).

Every ``nn.Linear`` weight, every ``Conv1D`` weight (GPT-2) and every 3-D expert parameter of a model is either a
target or is listed with a reason; nothing is left out silently. No architecture is known by name: modules are
recognised by their type or by the attributes that transformers' experts interface gives them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from torchmix.allocation.plan import Exclusion

MIN_IN_FEATURES = 128
_INSIDE_ATTENTION = "used inside nn.MultiheadAttention, which needs dense weights"
_UNKNOWN_EXPERTS = "3-D weight of a module without the experts interface of transformers"
_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")
_ROUTER_NAMES = ("router", "router_gate")
_GATE_NAMES = ("gate", "wg")  # routers where they stand beside experts
_SHARED_GATE_NAMES = ("shared_expert_gate",)
FINGERPRINT_ROWS = 256


@dataclass(frozen=True)
class Target:
    """A weight to quantize.

    Attributes:
        name: fully qualified name of the parameter.
        module: the module that owns it.
        parameter_name: its name there.
        transposed: stored as (K, N) or (E, K, N).
    """

    name: str
    module: nn.Module
    parameter_name: str
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The parameter itself."""
        return getattr(self.module, self.parameter_name)

    @property
    def rows(self) -> Tensor:
        """The weight as (N, K) or (E, N, K), a view."""
        return self.weight.transpose(-1, -2) if self.transposed else self.weight

    @property
    def num_experts(self) -> int | None:
        """E for expert weights, else None."""
        return self.weight.shape[0] if self.weight.dim() == 3 else None


@dataclass(frozen=True)
class Selection:
    """Result of :func:`select_parameters`, in the order of ``model.named_parameters()``."""

    targets: tuple[Target, ...]
    excluded: tuple[Exclusion, ...]


def select_parameters(
    model: nn.Module,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    *,
    min_in_features: int = MIN_IN_FEATURES,
) -> Selection:
    """Find the weights to quantize.

    Args:
        model: any module.
        include: patterns; when given, only matching weights are quantized, and a match overrides the default
            exclusions below. A pattern is an exact name, a glob, or ``re:`` and a regular expression that must
            match fully; it is compared with the parameter's and with its module's name.
        exclude: patterns of weights to leave alone.
        min_in_features: rows shorter than this are left alone (their scales would cost more than they save).

    Excluded by default, and listed with the reason: output heads, weights tied to an embedding, routers of
    experts and gates of shared experts, rows with fewer than ``min_in_features`` inputs. The weights of
    ``nn.MultiheadAttention``, and experts of a form that is not known, cannot be quantized and are listed too.

    Raises:
        ValueError: for a pattern that matches nothing, or a model without any weight to quantize.
        TypeError: for an already quantized weight, or a dtype that is not a supported float.
    """
    candidates = list(_candidates(model))
    _check_patterns((*include, *exclude), [target.name for target in candidates])
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    targets, excluded, seen = [], [], set[int]()
    for target in candidates:
        if id(target.weight) in seen:
            continue
        seen.add(id(target.weight))
        unsupported = isinstance(target.module, NonDynamicallyQuantizableLinear)
        if unsupported:
            reason = _INSIDE_ATTENTION
        elif _matches_any(target.name, exclude):
            reason = "excluded by the user"
        elif include:
            reason = "" if _matches_any(target.name, include) else "not matched by include"
        else:
            reason = _default_exclusion(model, target, tied, min_in_features)
        if reason:
            excluded.append(
                Exclusion(
                    target.name, reason, target.weight.numel(), unsupported, weight_fingerprint(target.weight)
                )
            )
        else:
            check_target(target)
            targets.append(target)
    excluded += _other_weights(model, seen)
    if not targets:
        reasons = "; ".join(f"{e.name}: {e.reason}" for e in excluded[:10]) or "it has no linear layers"
        raise ValueError(
            f"no weight of {type(model).__name__} is left to quantize ({reasons}); widen include/exclude"
        )
    return Selection(tuple(targets), tuple(excluded))


def linear_weights(model: nn.Module) -> list[str]:
    """Names of all linear, Conv1D and expert weights, quantized or not; tied ones once."""
    names = {id(target.weight): target.name for target in reversed(list(_candidates(model)))}
    return [target.name for target in _candidates(model) if names[id(target.weight)] == target.name]


def weight_fingerprint(weight: Tensor) -> str:
    """Short hash of a weight's shape and of evenly spaced rows (all, or at least 256 of them) in float32.

    The same for every dtype that holds the values exactly. Recognises a weight without its name, and refuses a
    calibration of another model.

    Args:
        weight: float, two or three dimensions as stored; meta tensors give "".
    """
    if weight.device.type == "meta":
        return ""
    rows = weight.detach().reshape(-1, weight.shape[-1])
    step = max(1, len(rows) // FINGERPRINT_ROWS)
    sample = rows[::step].to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _candidates(model: nn.Module) -> Iterator[Target]:
    """Every linear weight, in module order; tied weights appear more than once."""
    for module_name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{module_name}." if module_name else ""
        if isinstance(module, nn.Linear):
            yield Target(f"{prefix}weight", module, "weight", transposed=False)
        elif type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).dim() == 2:
            yield Target(f"{prefix}weight", module, "weight", transposed=True)
        elif hasattr(module, "is_transposed") and hasattr(module, "num_experts"):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    yield Target(f"{prefix}{name}", module, name, transposed=bool(module.is_transposed))


def _default_exclusion(model: nn.Module, target: Target, tied: set[int], min_in_features: int) -> str:
    """Reason for which a weight is left alone unless the user includes it, or ""."""
    module_name = target.name.rpartition(".")[0]
    if id(target.weight) in tied:
        return "tied to an embedding"
    if module_name.rpartition(".")[2] in _HEAD_NAMES:
        return "output head"
    if module_name.rpartition(".")[2] in _SHARED_GATE_NAMES:
        return "gate of a shared expert"
    if _is_router(model, module_name):
        return "router of experts"
    in_features = target.rows.shape[-1]
    if in_features < min_in_features:
        return f"rows of {in_features} inputs, fewer than {min_in_features}"
    return ""


def _is_router(model: nn.Module, module_name: str) -> bool:
    """A module called router, a gate that stands beside experts, or a layer inside either of them.

    A router may be a layer (Mixtral's ``gate``), hold one (``router.layer``, ``router.classifier``, ``gate.wg``), or
    be a small network (Zaya's ``gate.router_mlp.fc1``).
    """
    module = model
    for name in filter(None, module_name.split(".")):
        parent, module = module, getattr(module, name)
        beside_experts = name in _GATE_NAMES and hasattr(parent, "experts")
        if (name in _ROUTER_NAMES or beside_experts) and not hasattr(module, "experts"):
            return True
    return False


def _other_weights(model: nn.Module, seen: set[int]) -> Iterator[Exclusion]:
    """Embeddings, routers that are no ``nn.Linear``, weights that cannot be quantized: not chosen, but listed."""
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        yield from _unsupported_weights(prefix, module, seen)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or id(weight) in seen or weight.dim() != 2:
            continue
        if isinstance(module, nn.Embedding):
            yield Exclusion(f"{prefix}weight", "embedding", weight.numel(), False)
        elif "Router" in type(module).__name__:
            yield Exclusion(f"{prefix}weight", "router of experts", weight.numel(), False)


def _unsupported_weights(prefix: str, module: nn.Module, seen: set[int]) -> Iterator[Exclusion]:
    """Linear weights of one module that a target cannot stand for; they count against the coverage."""
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, nn.MultiheadAttention) and parameter.dim() == 2:
            # in_proj_weight, or q_proj_weight, k_proj_weight, v_proj_weight
            yield Exclusion(f"{prefix}{name}", _INSIDE_ATTENTION, parameter.numel(), True)
        # of shape (1, ...) are learned positions and the like
        is_stack = parameter.dim() == 3 and len(parameter) > 1 and min(parameter.shape[1:]) >= MIN_IN_FEATURES
        if is_stack and id(parameter) not in seen and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            yield Exclusion(f"{prefix}{name}", _UNKNOWN_EXPERTS, parameter.numel(), True)


def check_target(target: Target) -> None:
    """Raise for a weight that cannot be quantized."""
    weight = target.weight
    if hasattr(weight, "qdata") or hasattr(weight, "tensor_data_names"):
        raise TypeError(
            f"{target.name} is already quantized ({type(weight).__name__}); start from the original model"
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{target.name} has dtype {weight.dtype}; quantization needs float32, bfloat16 or float16 weights, so "
            "convert the model first or exclude this layer"
        )
    if weight.device.type != "meta" and not torch.isfinite(weight).all():
        raise ValueError(
            f"{target.name} holds NaN or infinite weights; repair the checkpoint or exclude this layer"
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this parameter, directly or through its module's name."""
    names = (name, name.rpartition(".")[0])
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], n) for n in names)
    return any(n == pattern or fnmatch.fnmatchcase(n, pattern) for n in names)


def _matches_any(name: str, patterns: Iterable[str]) -> bool:
    return any(matches(name, pattern) for pattern in patterns)


def _check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raise for a pattern that is not valid or matches nothing."""
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
        if not any(matches(name, pattern) for name in names):
            known = ", ".join(names[:3])
            raise ValueError(
                f"the pattern {pattern!r} matches no linear layer; patterns are exact names, globs, or re: and a "
                f"regular expression that matches fully, for example one of: {known}"
            )
