"""The parts of a model that a rotation must know (L3), for models built like Llama.

Llama, Mistral, Qwen2, Qwen3 and others share their module names. Names alone are no proof: :func:`map_model` also
checks that there is no parameter it cannot place and that the normalizations are plain RMSNorms.

Shapes: D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)
_ATTENTION_READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION_WRITER = "self_attn.o_proj"
_MLP_READERS = ("mlp.gate_proj", "mlp.up_proj")
_MLP_WRITER = "mlp.down_proj"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_INSIDE_HEADS = (
    "self_attn.q_norm",
    "self_attn.k_norm",
)  # behind q_proj and k_proj, outside the residual stream


@dataclass(frozen=True)
class Branch:
    """One residual branch: ``hidden + writer(f(readers(norm(hidden))))``.

    Attributes:
        norm: RMSNorm in front of the readers.
        readers: linears whose input is the norm's output, weights (N, D).
        writer: linear whose output is added to the residual stream, weight (D, M).
    """

    norm: nn.Module
    readers: tuple[nn.Linear, ...]
    writer: nn.Linear


@dataclass(frozen=True)
class ModelMap:
    """All modules that touch the residual stream.

    Attributes:
        embedding: writes the stream first, weight (V, D).
        branches: attention and MLP of every block, in order.
        final_norm: RMSNorm in front of the head.
        head: reads the stream last, weight (V, D); may share its weight with the embedding.
    """

    embedding: nn.Embedding
    branches: tuple[Branch, ...]
    final_norm: nn.Module
    head: nn.Linear

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.embedding.embedding_dim


def map_model(model: nn.Module) -> ModelMap:
    """Find the parts of a causal language model with Llama's module names.

    Raises:
        ValueError: a part is missing or of another kind, a parameter has no known place, or a normalization is
            not weight * x / rms(x).
    """
    finder = _Finder(model)
    embedding = finder.find("model.embed_tokens", nn.Embedding)
    final_norm, head = finder.find("model.norm", nn.Module), finder.find("lm_head", nn.Linear)
    branches = []
    for index, _ in enumerate(finder.find("model.layers", nn.ModuleList).children()):
        block = f"model.layers.{index}."
        for norm, readers, writer in (
            (_NORMS[0], _ATTENTION_READERS, _ATTENTION_WRITER),
            (_NORMS[1], _MLP_READERS, _MLP_WRITER),
        ):
            branches.append(
                Branch(
                    finder.find(block + norm, nn.Module),
                    tuple(finder.find(block + name, nn.Linear) for name in readers),
                    finder.find(block + writer, nn.Linear),
                )
            )
        finder.allow(*(block + name for name in _INSIDE_HEADS))
    finder.check()
    for norm_module in (final_norm, *(branch.norm for branch in branches)):
        _check_rms_norm(finder.name_of(norm_module), norm_module)
    return ModelMap(embedding, tuple(branches), final_norm, head)


class _Finder:
    """Looks modules up by name and remembers which were found, and which are missing."""

    def __init__(self, model: nn.Module) -> None:
        self._kind = type(model).__name__
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._missing: list[str] = []
        self._placed: set[str] = set()

    def find(self, name: str, kind: type[_Module]) -> _Module:
        """The module, or after noting that it is missing something that :meth:`check` does not let out."""
        module = self._modules.get(name)
        if not isinstance(module, kind):
            self._missing.append(f"{name} ({kind.__name__})" if kind is not nn.Module else name)
            return cast(_Module, nn.Identity())
        self.allow(name)
        return module

    def allow(self, *names: str) -> None:
        """These modules may have parameters."""
        self._placed.update(names)

    def name_of(self, module: nn.Module) -> str:
        """Fully qualified name of a module of the model."""
        return next(name for name, found in self._modules.items() if found is module)

    def check(self) -> None:
        """Raise ``ValueError`` for missing modules, parameters without a place, and shared ones."""
        if self._missing:
            raise ValueError(
                f"{self._kind} lacks {', '.join(self._missing[:6])}; a rotation of the residual stream needs the "
                "modules of Llama, so quantize this model without it"
            )
        names: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            owner = name.rpartition(".")[0]
            if owner not in self._placed:
                raise ValueError(
                    f"{self._kind}: the rotation does not know what {name} does in the residual stream; quantize "
                    "this model without it"
                )
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                raise ValueError(
                    f"{name} is no plain float weight; rotate the original model, then quantize it"
                )
            names.setdefault(id(parameter), []).append(name)
        for shared in names.values():
            if len(shared) > 1 and set(shared) != {"model.embed_tokens.weight", "lm_head.weight"}:
                raise ValueError(
                    f"{self._kind}: {' and '.join(shared)} share one weight, which cannot be rotated for both; "
                    "give each its own"
                )


def _check_rms_norm(name: str, norm: nn.Module) -> None:
    """Raise ``ValueError`` unless ``norm`` computes weight * x / rms(x), tried on four random vectors.

    The tolerance leaves room for the norm's epsilon (1e-5 against a mean square of 1) and for its dtype.
    """
    own = dict(norm.named_parameters())
    weight = own.get("weight")
    if own.keys() != {"weight"} or weight is None or weight.dim() != 1:
        raise ValueError(
            f"{name} has the parameters {sorted(own)} instead of one weight, so it is no RMSNorm"
        )
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = weight.detach().double().cpu() * x / x.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        found = norm(x.to(weight)).double().cpu()
    tolerance = 1e-3 + 8 * torch.finfo(weight.dtype).eps
    if not (found - expected).abs().max() <= tolerance * expected.abs().max():
        raise ValueError(
            f"{name} ({type(norm).__name__}) does not compute weight * x / rms(x), so a rotation does not pass "
            "through it; quantize this model without it"
        )
