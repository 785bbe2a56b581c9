"""Perplexity, bits per byte and KL divergence of causal language models on token ids (L2, torch only).

Protocol: the text is one stream of tokens without special tokens, cut into non-overlapping windows; window i
reads tokens [i w, (i + 1) w) and predicts the next token of each; every position is scored; the tail shorter
than a window is dropped. perplexity = exp(mean negative log-likelihood per token).

Shapes: B windows per batch, L tokens per window, T = B * L, V vocabulary entries.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.evaluation.divergence import kl_from_log_probs, log_probs, quantile, token_chunks

DEFAULT_WINDOW = 1024
"""Tokens per window where neither the caller nor the model's context says otherwise."""

Model = Callable[..., Any]
"""Anything called as ``model(input_ids)`` that returns logits (B, L, V), or an object with ``.logits``."""

Progress = Callable[[int, int], None]
"""Called as ``progress(windows_done, windows_in_all)`` after each batch."""


@dataclass(frozen=True)
class Evaluation:
    """What one model scored on one text. The divergences are None where there was no reference.

    perplexity:      exp(nll), per token of this tokenizer: compare across tokenizers by bits_per_byte only
    nll:             mean negative log-likelihood per token, nats
    bits_per_byte:   nll * tokens of the whole text / its bytes / ln 2; None without ``num_bytes``
    tokens, windows: scored positions, and the windows they lie in
    kl_mean, kl_p99, kl_max: KL(reference || model) per token in nats: mean, exact 99th percentile, largest
    top1_agreement:  share (0..1) of positions where both models rank the same token first
    """

    perplexity: float
    nll: float
    bits_per_byte: float | None
    tokens: int
    windows: int
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """All fields by name, ready for JSON (a perplexity beyond float64 is ``inf``)."""
        return asdict(self)


def window_tokens(token_ids: Tensor | Sequence[int], window: int) -> tuple[Tensor, Tensor]:
    """Cut a stream of token ids into the protocol's windows: ``(inputs, targets)``, int64 (windows, window).

    Row i of inputs is tokens [i w, (i + 1) w), row i of targets the same shifted by one.

    Raises:
        TypeError: token ids that are not integers.
        ValueError: ids that are not one-dimensional, a window below 1, or fewer than window + 1 tokens.
    """
    ids = torch.as_tensor(token_ids)
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"token_ids must be integers, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"token_ids must be one stream (1-D), got shape {tuple(ids.shape)}; flatten it")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    count = (len(ids) - 1) // window
    if count < 1:
        raise ValueError(
            f"the text has {len(ids)} tokens, one window of {window} needs {window + 1}; "
            f"give a longer text or a smaller window"
        )
    ids = ids.to(torch.int64)
    return ids[: count * window].view(count, window), ids[1 : count * window + 1].view(count, window)


def evaluate(
    model: Model,
    token_ids: Tensor | Sequence[int],
    *,
    reference: Model | None = None,
    window: int | None = None,
    batch_size: int = 4,
    num_bytes: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score ``model`` on ``token_ids``, and compare it with ``reference`` if one is given.

    See :func:`evaluate_many` for the arguments and the errors; this is the case of one model.
    """
    return evaluate_many(
        {"model": model},
        token_ids,
        reference=reference,
        window=window,
        batch_size=batch_size,
        num_bytes=num_bytes,
        progress=progress,
    )["model"]


def evaluate_many(
    models: Mapping[str, Model],
    token_ids: Tensor | Sequence[int],
    *,
    reference: Model | None = None,
    window: int | None = None,
    batch_size: int = 4,
    num_bytes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Score several models on one text; the reference runs once per batch, not once per model.

    Args:
        models: name -> model. The reference itself may be among them and then is not run a second time.
        token_ids: integers (tokens,), the whole text without special tokens.
        reference: the original model; adds the KL divergences and the top-1 agreement.
        window: tokens per window; default 1024, or the shortest context of the models where that is less.
        batch_size: windows per forward pass. Logits of one batch are held for one model and the reference.
        num_bytes: UTF-8 bytes of the whole text ``token_ids`` came from, for bits per byte.
        progress: called as ``progress(windows_done, windows_in_all)``.

    The models are put in eval mode and each module's own mode is restored afterwards. Log-softmax is
    float32 whatever the models' dtype, sums over tokens are float64.

    Raises:
        TypeError: token ids that are not integers, or a model that returns no logits.
        ValueError: no models, too short a text (says how many tokens are needed), a window beyond a model's
            context, token ids outside the vocabulary, a model and a reference of different vocabularies,
            NaN or infinite logits (names model, window and position), weights on the meta device.
    """
    if not models:
        raise ValueError(f"evaluate_many needs at least one model, got {dict(models)!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 window, got {batch_size}")
    named = [*models.items(), *([] if reference is None else [("reference", reference)])]
    window = _resolve_window(named, window)
    inputs, targets = window_tokens(token_ids, window)
    _check_vocabulary(named, token_ids)
    totals = {name: _Totals() for name in models}
    with evaluation_mode([model for _, model in named]), torch.inference_mode():
        for start in range(0, len(inputs), batch_size):
            batch = slice(start, start + batch_size)
            scores = _score_batch(models, reference, inputs[batch], targets[batch], start)
            for name, score in scores:
                totals[name].add(score)
            if progress is not None:
                progress(min(start + batch_size, len(inputs)), len(inputs))
    tokens_per_byte = len(token_ids) / num_bytes if num_bytes else None
    return {name: total.result(len(inputs), tokens_per_byte) for name, total in totals.items()}


@dataclass(frozen=True)
class _TokenScores:
    """Per token of a batch: nll float32 (T,), kl float32 (T,) or None, same_top bool (T,) or None."""

    nll: Tensor
    kl: Tensor | None
    same_top: Tensor | None


@dataclass
class _Totals:
    """Running sums of one model; per-token KL values are kept (4 bytes each) for the exact percentile."""

    nll_sum: float = 0.0
    tokens: int = 0
    same_top: int = 0
    kl: list[Tensor] = field(default_factory=list)

    def add(self, scores: _TokenScores) -> None:
        """Count one batch."""
        self.nll_sum += float(scores.nll.sum(dtype=torch.float64))
        self.tokens += scores.nll.numel()
        if scores.kl is not None and scores.same_top is not None:
            self.kl.append(scores.kl.cpu())
            self.same_top += int(scores.same_top.sum())

    def result(self, windows: int, tokens_per_byte: float | None) -> Evaluation:
        """Means over all batches; ``tokens_per_byte`` is that of the whole text, or None."""
        nll = self.nll_sum / self.tokens
        common: dict[str, Any] = {
            "perplexity": float(torch.tensor(nll, dtype=torch.float64).exp()),  # inf where math.exp raises
            "nll": nll,
            "bits_per_byte": None if tokens_per_byte is None else nll * tokens_per_byte / math.log(2),
            "tokens": self.tokens,
            "windows": windows,
        }
        if not self.kl:
            return Evaluation(**common)
        kl = torch.cat(self.kl)
        return Evaluation(
            **common,
            kl_mean=float(kl.mean(dtype=torch.float64)),
            kl_p99=quantile(kl, 0.99),
            kl_max=float(kl.max()),
            top1_agreement=self.same_top / self.tokens,
        )


def _score_batch(
    models: Mapping[str, Model], reference: Model | None, inputs: Tensor, targets: Tensor, first_window: int
) -> Iterator[tuple[str, _TokenScores]]:
    """Scores of each model on one batch (B, L), one model's logits in memory at a time."""
    expected = None if reference is None else model_logits("reference", reference, inputs)
    for name, model in models.items():
        logits = (
            expected if expected is not None and model is reference else model_logits(name, model, inputs)
        )
        if expected is not None and expected.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"{name} has a vocabulary of {logits.shape[-1]} entries, the reference {expected.shape[-1]}; "
                f"KL divergence needs two models with the same tokenizer"
            )
        scores = _score_tokens(logits.flatten(0, 1), targets.flatten(), expected)
        del logits  # before the next model runs
        _check_finite(scores, name, first_window, inputs.shape[1])
        yield name, scores


def _score_tokens(logits_TV: Tensor, targets_T: Tensor, reference_logits: Tensor | None) -> _TokenScores:
    """Negative log-likelihood, KL and top-1 agreement per token, a chunk of tokens at a time."""
    targets_T = targets_T.to(logits_TV.device)
    nll, kl, same_top = [], [], []
    for rows in token_chunks(logits_TV):
        log_q = log_probs(logits_TV[rows])
        nll.append(-log_q.gather(-1, targets_T[rows, None]).squeeze(-1))
        if reference_logits is not None:
            reference = reference_logits.flatten(0, 1)[rows].to(logits_TV.device)
            kl.append(kl_from_log_probs(log_probs(reference), log_q))
            same_top.append(reference.argmax(-1) == logits_TV[rows].argmax(-1))
    if reference_logits is None:
        return _TokenScores(torch.cat(nll), None, None)
    return _TokenScores(torch.cat(nll), torch.cat(kl), torch.cat(same_top))


def _check_finite(scores: _TokenScores, name: str, first_window: int, window: int) -> None:
    """Raise with the first window whose logits hold NaN or +inf (either makes the log-softmax NaN)."""
    for owner, values in ((name, scores.nll), ("reference", scores.kl)):
        if values is not None and bool(values.isnan().any()):
            position = int(values.isnan().nonzero()[0])
            raise ValueError(
                f"{owner}: logits are NaN or infinite in window {first_window + position // window}, "
                f"position {position % window}; look for NaN in the weights, or evaluate in float32"
            )


def model_logits(name: str, model: Model, inputs: Tensor) -> Tensor:
    """Call the model on (B, L) ids on its own device; logits (B, L, V) in the model's dtype."""
    device = next((t.device for t in _tensors(model)), inputs.device)
    if device.type == "meta":
        raise ValueError(f"{name}: the weights are on the meta device (no values); load the model first")
    output = model(inputs.to(device), **_call_options(model))
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name}: a model must return logits or an object with .logits, got {type(output).__name__}"
        )
    if logits.dim() != 3 or logits.shape[:2] != inputs.shape:
        raise ValueError(
            f"{name}: logits must have shape ({inputs.shape[0]}, {inputs.shape[1]}, vocabulary), "
            f"got {tuple(logits.shape)}"
        )
    return logits


def _tensors(model: Model) -> Iterator[Tensor]:
    """Parameters, then buffers, of a module; nothing for a plain callable."""
    if isinstance(model, nn.Module):
        yield from model.parameters()
        yield from model.buffers()


def _call_options(model: Model) -> dict[str, bool]:
    """``use_cache=False`` for models that know the word: a key/value cache would be filled for nothing."""
    module = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    forward = getattr(module, "forward", module)
    return {"use_cache": False} if "use_cache" in inspect.signature(forward).parameters else {}


def _config_value(model: Model, name: str) -> int | None:
    """An integer of a transformers-style ``model.config``, or None."""
    config: Any = getattr(model, "config", None)
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _resolve_window(named: Sequence[tuple[str, Model]], window: int | None) -> int:
    """The window to use; refuses one beyond a model's positions."""
    contexts = [(name, _config_value(model, "max_position_embeddings")) for name, model in named]
    if window is None:
        return min([DEFAULT_WINDOW, *(context for _, context in contexts if context is not None)])
    for name, context in contexts:
        if context is not None and window > context:
            raise ValueError(f"{name}: window={window} is beyond its context of {context}; choose less")
    return window


def _check_vocabulary(named: Sequence[tuple[str, Model]], token_ids: Tensor | Sequence[int]) -> None:
    """Refuse ids the embedding does not have before a device assertion does."""
    ids = torch.as_tensor(token_ids)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0:
        raise ValueError(f"token_ids must not be negative, got {lowest} (a label mask?); take those out")
    for name, model in named:
        vocab_size = _config_value(model, "vocab_size")
        if vocab_size is not None and highest >= vocab_size:
            raise ValueError(
                f"{name}: token id {highest} is outside its vocabulary of {vocab_size} entries; "
                f"tokenize the text with the model's own tokenizer"
            )


@contextmanager
def evaluation_mode(models: Sequence[Model]) -> Iterator[None]:
    """Eval mode inside, every module's own training flag back afterwards.

    The flags are set one by one because ``eval()`` raises on modules made by ``torch.export``.
    """
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    flags = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, training in zip(modules, flags, strict=True):
            module.training = training
