"""``Student`` (L8): a quantized model that can be differentiated with respect to its codes, scales and norms.

Shapes: B samples of L tokens, V vocabulary entries, T = B * L.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchmix.evaluation import kl_from_log_probs, model_logits
from torchmix.evaluation.divergence import log_probs, token_chunks
from torchmix.tensor import MixedPrecisionTensor
from torchmix.tuning_inputs import DenseWeight, TunedProducts
from torchmix.tuning_latent import LatentWeight

logger = logging.getLogger(__name__)


def quantized_weights(model: nn.Module) -> dict[str, MixedPrecisionTensor]:
    """Quantized parameters by name, shared ones once."""
    return {n: p for n, p in model.named_parameters() if isinstance(p, MixedPrecisionTensor)}


def kl_with_gradient(reference_logits: Tensor, logits: Tensor) -> tuple[float, Tensor]:
    """KL(reference || model) summed over all tokens, and its gradient with respect to the model's logits.

    The gradient of KL(p || softmax(z)) is softmax(z) - p. Worked on in chunks of tokens, so that no float32 copy of
    all logits is made.

    Args:
        reference_logits, logits: float (B, L, V).

    Returns:
        nats, and (B, L, V) in the dtype of ``logits``.
    """
    reference_TV, logits_TV = reference_logits.flatten(0, 1), logits.detach().flatten(0, 1)
    gradient_TV = torch.empty_like(logits_TV)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows in token_chunks(logits_TV):
        log_p, log_q = log_probs(reference_TV[rows].to(logits.device)), log_probs(logits_TV[rows])
        total += kl_from_log_probs(log_p, log_q).sum(dtype=torch.float64)
        gradient_TV[rows] = log_q.exp_().sub_(log_p.exp_()).to(logits.dtype)
    return float(total), gradient_TV.view(logits.shape)


class _Logits(nn.Module):
    """A language model whose output is the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (B, L) -> (B, L, V)."""
        return model_logits("model", self.model, ids)


class Student:
    """The quantized model with trainable numbers in place of its quantized weights and norms.

    Attributes:
        latents: quantized weights by name.
        norms: float32 copies of the parameters of normalization layers, by name.
    """

    def __init__(self, model: nn.Module, original: nn.Module, learn_codes: bool, norms: bool) -> None:
        self._model = _Logits(model)
        self._weights = quantized_weights(model)
        dense = dict(original.named_parameters(remove_duplicate=False))
        self.latents = {
            name: LatentWeight(weight, dense[name] if learn_codes else None)
            for name, weight in self._weights.items()
        }
        found = _norm_parameters(model) if norms else {}
        self._norm_dtypes = {name: parameter.dtype for name, parameter in found.items()}
        self.norms = {name: parameter.detach().float().clone() for name, parameter in found.items()}
        self._looked_for_unseen = False

    def dense_weights(self) -> dict[str, DenseWeight]:
        """Dense values of all quantized weights for one step."""
        return {
            name: DenseWeight(
                self.latents[name].dense(), weight.in_features, weight.group_size, weight.per_token
            )
            for name, weight in self._weights.items()
        }

    def logits(self, ids: Tensor, weights: Mapping[str, DenseWeight], norms: Mapping[str, Tensor]) -> Tensor:
        """(B, L, V) through dense weights with quantized inputs."""
        values = {name: weight.value for name, weight in weights.items()}
        products = TunedProducts(weights)
        with products:
            logits = self.with_tensors({**values, **norms})(ids)
        if not self._looked_for_unseen:
            self._looked_for_unseen = True
            for name in weights.keys() - products.seen:
                logger.warning("%s: no product with this weight was seen; it may be tuned less well", name)
        return logits

    def backward(self, ids: Tensor, expected: Tensor) -> float:
        """Set the gradients of everything that is trained; returns the mean KL divergence per token."""
        weights = self.dense_weights()
        norms = {name: self.norm_value(name).requires_grad_() for name in self.norms}
        logits = self.logits(ids, weights, norms)
        total, gradient = kl_with_gradient(expected, logits)
        if not math.isfinite(total):
            return total
        logits.backward(gradient)
        for name, latent in self.latents.items():  # dense values and gradients go as latent gradients come
            latent.set_gradients(weights.pop(name).take_gradient(), 1 / ids.numel())
        for name, value in norms.items():
            self.norms[name].grad = None if value.grad is None else value.grad.float() / ids.numel()
        return total / ids.numel()

    def constrain(self) -> None:
        """After a step: bring latent codes back into their ranges."""
        for latent in self.latents.values():
            latent.constrain()

    def norm_value(self, name: str) -> Tensor:
        """A copy of one norm's parameter in its own dtype."""
        return self.norms[name].detach().to(self._norm_dtypes[name], copy=True)

    def tensors(self) -> dict[str, Tensor]:
        """The trained parameters by name, in their storage format."""
        quantized: dict[str, Tensor] = {name: latent.tensor() for name, latent in self.latents.items()}
        return quantized | {name: self.norm_value(name) for name in self.norms}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """The model as a function of token ids, with other parameters."""
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return lambda ids: functional_call(self._model, named, (ids,))

    def share_of_codes_changed(self) -> float:
        """0..1, over all quantized weights."""
        changed = sum(latent.codes_changed() for latent in self.latents.values())
        return changed / sum(weight.numel() for weight in self._weights.values())


def _norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """1-D parameters of normalization layers by name; a layer is one when its class says so."""
    found = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() == 1 and parameter.is_floating_point() and "norm" in type(owner).__name__.lower():
            found[name] = parameter
    return found
