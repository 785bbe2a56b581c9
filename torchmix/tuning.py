"""``tune`` (L8): the optional last step, which trains what quantization left to choose.

Widths, zero points and the storage format stay. Codes, scales and the parameters of normalization layers are trained
so that the quantized model's next-token distributions come closer to the original's: knowledge distillation by KL
divergence (arXiv 1503.02531) over all parameters at once. Scales alone, with fixed codes, are what EfficientQAT trains
end to end (arXiv 2407.11062); that codes may flip as well is learned rounding (:mod:`torchmix.tuning_latent`).

Shapes: S samples of L tokens, B samples of a batch, V vocabulary entries, T = B * L.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchmix.evaluation import kl_divergence, model_logits
from torchmix.tensor import PackedTensor, TiledTensor
from torchmix.tuning_student import Student, quantized_weights
from torchmix.workflow import token_sample
from torchmix.workflow_whole_model import calibration_mode

logger = logging.getLogger(__name__)
DEFAULT_STEPS = 300
WARM_UP_STEPS = 20
BETAS = (0.9, 0.95)
HELD_BACK_SHARE = 10
"""One sample in this many is held back."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TuningRecord:
    """What tuning did. KL divergences are means over all tokens of the samples held back, in nats per token.

    Attributes:
        kept: whether the model was changed; not where that would have made it worse.
        kl_before: KL(original || model) through the quantized tensors as they came.
        kl_after: the same with the tuned tensors, whether they were kept or not.
        steps: optimizer steps.
        samples: samples trained on.
        held_back: samples held back.
        codes_changed: share (0..1) of the codes that training changed, whether that was kept or not.
        seconds: time in all.
        losses: KL divergence of each step's batch, before the step.
    """

    kept: bool
    kl_before: float
    kl_after: float
    steps: int
    samples: int
    held_back: int
    codes_changed: float
    seconds: float
    losses: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return asdict(self)


def tune(
    model: nn.Module,
    original: nn.Module,
    data: Any,
    *,
    steps: int = DEFAULT_STEPS,
    batch_size: int = 8,
    learn_codes: bool = True,
    scale_lr: float = 2e-4,
    code_lr: float = 2e-3,
    norms: bool = True,
    tokenizer: Any = None,
    num_samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TuningRecord:
    """Train codes, scales and norms of a quantized model towards the original; optional, in place.

    One sample in ten (at least one) is held back. The model is changed at the end, if that lowers the KL divergence
    there; if not, or when anything fails, it stays as it is. Training mode, ``requires_grad`` flags and the global
    random state are left alone. A seed gives the same result again where the model's own operations do.

    Memory beside the two models: 16 bytes per quantized weight (latent code, two moments of Adam, gradient), 20 where
    the model's dtype is float32 (:func:`tuning_bytes`); and the activations of one batch.

    Args:
        model: causal language model, called as ``model(input_ids)``, with quantized weights, not compiled or repacked.
        original: the model before quantization, for example a ``copy.deepcopy`` made then.
        data: token ids int64 (S, L) such as ``Calibration.samples``, all of which are used, or anything else that
            :func:`torchmix.data.token_batches` takes.
        steps, batch_size: steps of Adam (warm-up, then cosine to 0), and samples per step.
        learn_codes, norms: train codes, and the weights and biases of normalization layers, too.
        scale_lr: learning rate of scales (relative change) and of norms (absolute).
        code_lr: learning rate of codes, in code units.
        tokenizer, num_samples, sequence_length: as in :func:`torchmix.calibrate`, for data that is not (S, L) ids.
        seed: order of the samples.
        progress: called as ``progress(steps_done, steps)``.

    Raises:
        ValueError: nothing quantized, models that do not belong together, are compiled or repacked, fewer than two
            samples, unusable options, or a KL divergence that is not finite.
        TypeError: data of a kind that cannot be read, or an original that is quantized itself.
    """
    started = time.perf_counter()
    _check_options(steps, batch_size, scale_lr, code_lr)
    _check_models(model, original)
    held_back, rest = _split(_token_ids(model, data, tokenizer, num_samples, sequence_length, seed))
    with calibration_mode(model), calibration_mode(original):
        before = _mean_kl(original, model, held_back, batch_size)
        student = Student(model, original, learn_codes, norms)
        optimizer = _optimizer(student, scale_lr, code_lr)
        batches = _batches(len(rest), batch_size, steps, seed)
        losses = _train(student, original, optimizer, rest, batches, progress)
        tuned = student.tensors()
        after = _mean_kl(original, student.with_tensors(tuned), held_back, batch_size)
    kept = _keep_if_better(model, tuned, before, after)
    counts = (len(losses), len(rest), len(held_back))
    changed, seconds = student.share_of_codes_changed(), time.perf_counter() - started
    return TuningRecord(kept, before, after, *counts, changed, seconds, losses)


def tuning_bytes(num_weights: int, dtype: torch.dtype, learn_codes: bool = True) -> int:
    """Bytes that :func:`tune` needs beside the two models and the activations, for so many quantized weights.

    Latent code and Adam's two moments are 12 bytes; at the end of the backward pass dense values and their gradients
    in the model's dtype come on top, and go while the latent codes' gradients (4 bytes) are made of them.
    """
    return num_weights * (12 * learn_codes + (not learn_codes) + max(4 * learn_codes, 2 * dtype.itemsize))


def _check_options(steps: int, batch_size: int, scale_lr: float, code_lr: float) -> None:
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps} and batch_size={batch_size} must both be at least 1")
    if not (0 <= scale_lr < math.inf and 0 <= code_lr < math.inf):
        raise ValueError(
            f"scale_lr={scale_lr} and code_lr={code_lr} must be finite and not negative; 2e-4 and 2e-3 are usual"
        )


def _check_models(model: nn.Module, original: nn.Module) -> None:
    """Raise for models that do not belong together, before anything is computed."""
    if {id(module) for module in model.modules()} & {id(module) for module in original.modules()}:
        raise ValueError(
            "model and original share modules, so there is nothing left to compare with; keep a copy of the model "
            "before it is quantized: original = copy.deepcopy(model)"
        )
    for which, module in (("model", model), ("original", original)):
        if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in module.modules()):
            raise ValueError(
                f"{which} is compiled, which hides its layers from tuning; tune first, then compile"
            )
    if any(isinstance(parameter, TiledTensor) for parameter in model.parameters()):
        raise ValueError(
            "model is repacked for GPU kernels; call torchmix.to_plain(model), tune, then torchmix.repack(model)"
        )
    quantized = quantized_weights(model)
    if not quantized:
        raise ValueError(f"{type(model).__name__} has no quantized weights to tune; run quantize_ first")
    parameters = dict(original.named_parameters(remove_duplicate=False))
    for name, weight in quantized.items():
        dense = parameters.get(name)
        if isinstance(dense, PackedTensor):
            raise TypeError(
                f"{name} of the original is quantized itself; pass the model as it was before quantize_"
            )
        if dense is None or dense.shape != weight.shape:
            found = "does not exist" if dense is None else f"has shape {tuple(dense.shape)}"
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, but {found} in the original; pass the model as it was before "
                "quantize_"
            )


def _token_ids(
    model: nn.Module, data: Any, tokenizer: Any, num_samples: int, sequence_length: int | None, seed: int
) -> Tensor:
    """int64 (S, L)."""
    if data is None:
        raise ValueError(
            "tuning needs token samples, but data is None; pass (S, L) token ids or texts. A calibration holds samples "
            "only when it was made from a text or from tokens"
        )
    if isinstance(data, Tensor) and data.dim() == 2:
        num_samples, sequence_length = max(1, len(data)), data.shape[1]
    return token_sample(model, data, tokenizer, num_samples, sequence_length, seed).input_ids


def _split(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Samples held back, spread evenly over all, and the samples to train on."""
    if len(ids) < 2:
        raise ValueError(
            f"tuning needs at least 2 samples, one of them to be held back, but there is {len(ids)}; give more data or "
            "a smaller sequence length"
        )
    count = max(1, len(ids) // HELD_BACK_SHARE)
    chosen = torch.zeros(len(ids), dtype=torch.bool)
    chosen[[(2 * i + 1) * len(ids) // (2 * count) for i in range(count)]] = True
    return ids[chosen], ids[~chosen]


def _batches(num_samples: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Samples of each step, int64 (B,); in a new random order each time all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, num_samples)
    batches: list[Tensor] = []
    while len(batches) < steps:
        order = torch.randperm(num_samples, generator=generator)
        batches += [rows for rows in order.split(size) if len(rows) == size]
    return batches[:steps]


def rate_factor(step: int, steps: int) -> float:
    """Learning rate of a step as a share of the largest: linear warm-up times a cosine that falls to 0.

    The warm-up takes 20 steps, or a fifth of all where that is less.
    """
    warm_up = max(1, min(WARM_UP_STEPS, steps // 5))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _mean_kl(original: nn.Module, model: Callable[[Tensor], Any], ids: Tensor, batch_size: int) -> float:
    """Mean KL(original || model) over all tokens of ``ids``, nats."""
    total = 0.0
    for batch in ids.split(batch_size):
        expected = model_logits("original", original, batch)
        total += float(kl_divergence(expected, model_logits("model", model, batch)).sum(dtype=torch.float64))
    return total / ids.numel()


def _optimizer(student: Student, scale_lr: float, code_lr: float) -> torch.optim.Optimizer:
    """Adam over all trained tensors; fused, as the other implementations copy them."""
    scales, codes = list(student.norms.values()), []
    for latent in student.latents.values():
        scales += latent.parameters[0]
        codes += latent.parameters[1]
    groups = [
        {"params": params, "lr": lr, "initial_lr": lr}
        for params, lr in ((scales, scale_lr), (codes, code_lr))
        if params
    ]
    fused = all(tensor.device.type in ("cpu", "cuda") for tensor in (*scales, *codes))
    return torch.optim.Adam(groups, betas=BETAS, fused=fused)


def _train(
    student: Student,
    original: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    batches: Sequence[Tensor],
    progress: Progress | None,
) -> tuple[float, ...]:
    """Take one step per batch of samples ``ids[batch]``; returns their mean KL divergence before the step."""
    losses = []
    for step, rows in enumerate(batches):
        batch = ids[rows]
        optimizer.zero_grad()
        with torch.no_grad():
            expected = model_logits("original", original, batch)
        losses.append(student.backward(batch, expected))
        if not math.isfinite(losses[-1]):
            raise ValueError(_diverged(f"the KL divergence is {losses[-1]} in step {step}"))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor(step, len(batches))
        optimizer.step()
        student.constrain()
        if progress is not None:
            progress(step + 1, len(batches))
    return tuple(losses)


def _diverged(what: str) -> str:
    return (
        f"{what}; the model was not changed. Where the first step already fails, look for NaN in the models' logits; "
        "otherwise use smaller learning rates (scale_lr, code_lr)"
    )


def _keep_if_better(model: nn.Module, tuned: Mapping[str, Tensor], before: float, after: float) -> bool:
    """Put the tuned tensors into the model if they lower the KL divergence on the samples held back."""
    if not math.isfinite(after):
        raise ValueError(_diverged(f"the KL divergence after tuning is {after}"))
    if after < before:
        _replace(model, tuned)
        return True
    logger.warning(
        "tuning would change the KL divergence on the samples held back from %.5f to %.5f nats per token: the model "
        "stays as it was; try more data, or smaller learning rates",
        *(before, after),
    )
    return False


def _replace(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put new parameters in the place of those of these names, wherever they are shared."""
    before = dict(model.named_parameters())
    new = {
        id(before[name]): nn.Parameter(tensor, requires_grad=before[name].requires_grad)
        for name, tensor in tensors.items()
    }
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])
