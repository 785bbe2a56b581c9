"""Which linear layers read the output of which normalization (L3), seen while the model runs.

No table of architectures: a normalization is a module with a one-dimensional weight, and its readers are the linear
layers that are called with the very tensor it returned, or with a view of it. Every other use of that tensor, and of
the weights of those layers, is noted too, because a rewrite of both sides is only exact if nobody else looks.

Shapes: S samples of L tokens, K features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchmix.capture import LinearCall, LinearCalls
from torchmix.evaluation import evaluation_mode

ELSEWHERE = "an input that no normalization gives"
_MODEL_OUTPUT = "the model's output"
_NO_DATA = (
    int,
    bool,
    str,
    torch.Size,
    torch.dtype,
    torch.device,
    torch.layout,
    type(None),
)  # shapes and the like


@dataclass
class NormUse:
    """A normalization and what became of its output.

    Attributes:
        module: its parameters are ``weight`` (K,) and perhaps ``bias`` (K,), nothing else.
        features: K.
        readers: names of the linear weights that were applied to the whole output.
        others: what else read the output.
        largest: float32 (K,), largest magnitude of each feature of the output over all tokens.
        example: input and output (..., T, K) of a few tokens of the first call; None before, and for a module that
            is not called with a single tensor of the shape of its output.
    """

    module: nn.Module
    features: int
    readers: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    largest: Tensor | None = None
    example: tuple[Tensor, Tensor] | None = None


@dataclass
class WeightUse:
    """The weight of a linear layer and how it was used.

    Attributes:
        weight: (N, K), or (K, N) where ``transposed`` (``Conv1D`` of GPT-2).
        transposed: how it is stored.
        sources: names of the normalizations it was applied to, :data:`ELSEWHERE` for any other input.
        others: functions that read it otherwise, such as the embedding it is tied to.
    """

    weight: Tensor
    transposed: bool
    sources: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)

    @property
    def rows(self) -> Tensor:
        """The weight as (N, K), a view."""
        return self.weight.T if self.transposed else self.weight


def find_readers(model: nn.Module, samples: Tensor) -> tuple[dict[str, NormUse], dict[str, WeightUse]]:
    """Run the model on every sample, in eval mode and without gradients, and watch its normalizations.

    Args:
        model: called with int64 (1, L).
        samples: int64 (S, L), S >= 1.

    Returns:
        normalizations by module name and linear weights by parameter name, tied ones once.

    Raises:
        ValueError: ``samples`` is not int64 (S, L) with at least one token.
    """
    if samples.dim() != 2 or samples.dtype != torch.int64 or not samples.numel():
        raise ValueError(
            f"samples must be token ids, int64 (samples, tokens), got {samples.dtype} {tuple(samples.shape)}"
        )
    device = next(model.parameters()).device
    norms, weights = dict(_norms(model)), _linear_weights(model)
    watch = _Watch(norms, weights)
    handles = [
        use.module.register_forward_hook(watch.hook(name), with_kwargs=True) for name, use in norms.items()
    ]
    try:
        with torch.no_grad(), evaluation_mode([model]):
            for sample in samples:
                with LinearCalls({name: use.weight for name, use in weights.items()}, watch.observe), watch:
                    output = model(sample[None].to(device))
                watch.end_of_sample(output)
    finally:
        for handle in handles:
            handle.remove()
    return norms, weights


class _Watch(TorchFunctionMode):
    """Sees every function that is called with the output of a normalization or with the weight of a linear layer.

    ``observe`` is for :class:`torchmix.capture.LinearCalls`, entered outside of this mode: it then runs inside the
    call that this mode passes on, so a call after which nothing was observed is no linear layer.
    """

    def __init__(self, norms: dict[str, NormUse], weights: dict[str, WeightUse]) -> None:
        super().__init__()
        self._norms, self._weights = norms, weights
        self._weight_names = {id(use.weight): name for name, use in weights.items()}
        self._outputs: list[Tensor] = []  # of this sample; kept because ids must not be reused
        self._output_names: dict[int, str] = {}
        self._seen: list[LinearCall] = []

    def observe(self, call: LinearCall) -> None:
        """Note a linear layer that is about to run."""
        self._seen.append(call)

    def hook(self, name: str) -> Callable[..., None]:
        """Forward hook of the normalization ``name``."""
        use = self._norms[name]

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if (
                not isinstance(output, Tensor)
                or output.shape[-1:] != (use.features,)
                or output._base is not None
            ):
                use.others.add("code that gets a form of output which is not known")
                return
            largest = output.float().abs().reshape(-1, use.features).amax(0)
            use.largest = largest if use.largest is None else torch.maximum(use.largest, largest)
            use.example = use.example or _example([*args, *kwargs.values()], output)
            # watched from here on, so that this function is no reader
            self._outputs.append(output)
            self._output_names[id(output)] = name

        return after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the call run; note it when it reads something that is watched."""
        kwargs = kwargs or {}
        touched = [tensor for tensor in _tensors((args, kwargs)) if self._is_watched(tensor)]
        if not touched:
            return func(*args, **kwargs)
        versions = [tensor._version for tensor in touched]
        self._seen.clear()
        result = func(*args, **kwargs)
        if self._seen:
            self._note_linear(touched)
            self._seen.clear()
        elif versions != [tensor._version for tensor in touched] or not _is_view(result, touched):
            self._note_other(touched, getattr(func, "__name__", str(func)))
        return result

    def end_of_sample(self, output: Any) -> None:
        """Forget the sample; what the model returns counts as read."""
        self._note_other([t for t in _tensors(output) if self._is_watched(t)], _MODEL_OUTPUT)
        self._outputs.clear()
        self._output_names.clear()

    def _is_watched(self, tensor: Tensor) -> bool:
        return self._norm_of(tensor) is not None or self._weight_of(tensor) is not None

    def _norm_of(self, tensor: Tensor) -> str | None:
        return self._output_names.get(id(tensor)) or self._output_names.get(id(tensor._base))

    def _weight_of(self, tensor: Tensor) -> str | None:
        return self._weight_names.get(id(tensor)) or self._weight_names.get(id(tensor._base))

    def _note_linear(self, touched: list[Tensor]) -> None:
        """A linear layer ran: connect its weight and what it was applied to."""
        sources = set()
        for call in self._seen:
            norm, use = self._norm_of(call.source), self._weights[call.name]
            use.sources.add(norm or ELSEWHERE)
            if norm is None:
                continue
            sources.add(norm)
            whole = call.source.shape[-1] == use.rows.shape[1] == self._norms[norm].features
            if whole and call.source.stride(-1) == 1:
                self._norms[norm].readers.add(call.name)
            else:
                self._norms[norm].others.add(f"{call.name}, which reads a part of it")
        for tensor in touched:
            norm = self._norm_of(tensor)
            if norm is not None and norm not in sources:
                self._norms[norm].others.add("a linear layer, otherwise than as its input")

    def _note_other(self, touched: list[Tensor], reader: str) -> None:
        """Something else than a linear layer read these tensors."""
        for tensor in touched:
            norm, weight = self._norm_of(tensor), self._weight_of(tensor)
            if norm is not None:
                self._norms[norm].others.add(reader)
            if weight is not None:
                self._weights[weight].others.add(reader)


def _norms(model: nn.Module) -> Iterator[tuple[str, NormUse]]:
    """Modules without children whose parameters are a one-dimensional weight and perhaps such a bias."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters())
        if own.keys() <= {"weight", "bias"} and "weight" in own and all(p.dim() == 1 for p in own.values()):
            yield name, NormUse(module, own["weight"].numel())


def _example(arguments: list[Any], output: Tensor, tokens: int = 16) -> tuple[Tensor, Tensor] | None:
    """The first tokens of a module's only input and of its output."""
    x = arguments[0] if len(arguments) == 1 else None
    if not isinstance(x, Tensor) or x.shape != output.shape or x.dim() < 2:
        return None
    return x[..., :tokens, :].clone(), output[..., :tokens, :].clone()


def _linear_weights(model: nn.Module) -> dict[str, WeightUse]:
    """Plain weights of ``nn.Linear`` and ``Conv1D`` modules, by the first name of each."""
    found: dict[str, WeightUse] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        transposed = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or transposed) or type(weight) is not nn.Parameter:
            continue
        if weight.dim() == 2 and not any(use.weight is weight for use in found.values()):
            found[f"{name}.weight" if name else "weight"] = WeightUse(weight, transposed)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _is_view(result: Any, tensors: list[Tensor]) -> bool:
    """Whether a function only gave other shapes of these tensors, or facts about their shape and type."""
    if isinstance(result, Tensor):
        bases = {id(tensor) for tensor in tensors} | {id(tensor._base) for tensor in tensors} - {id(None)}
        return id(result) in bases or id(result._base) in bases
    if isinstance(result, tuple | list):
        return all(_is_view(part, tensors) for part in result)
    return isinstance(result, _NO_DATA)
