"""``mixllm_config`` (L6): the configuration that torchao's ``quantize_`` takes, and its handler.

``quantize_`` shows each ``nn.Linear`` to the handler without its name. A layer is therefore recognised by the
fingerprint of its weight, which the plan holds: that works for a plan read from JSON and for a copy of the model,
and refuses a model that was not the one measured. Experts and GPT-2's ``Conv1D`` are never shown; they are
quantized when the first module comes by, through the model that ``calibrate`` saw or that was passed as ``model``.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from torchmix.accounting import budget_in_bits, check_group_size, width_costs
from torchmix.allocation import AllocationProblem, BitPlan, LayerChoices, LayerPlan, allocate
from torchmix.calibration import Calibration
from torchmix.config_sequential import original_model, round_plan_sequentially
from torchmix.layer_quantization import LayerRecord, quantize_target
from torchmix.rounding import DEFAULT_REFINE, DEFAULT_REFIT, ROUNDING_METHODS, RoundedWeight
from torchmix.scoring import data_free_scores
from torchmix.selection import MIN_IN_FEATURES, Target, check_target, select_parameters, weight_fingerprint
from torchmix.sequential import SequentialRounding
from torchmix.tensor import PackedTensor
from torchmix.tensor.module_repr import show_quantized_weights

logger = logging.getLogger(__name__)
DATA_FREE_WIDTHS = (3, 4, 5, 6, 8)
DATA_FREE_BITS = 4.5
SEQUENTIAL = "sequential"
ROUNDING_NAMES = (*ROUNDING_METHODS, SEQUENTIAL)
Granularity = Literal["group", "token"]


@dataclass
class MixLLMConfig(AOBaseConfig):
    """Quantize weights to rows of mixed widths, and activations to int8 on the fly.

    Use :func:`mixllm_config` to make one.

    Args:
        `plan`: row widths of every layer; None ranks the rows of each layer by their own rounding error.
        `calibration`: Hessians for GPTQ; None rounds without data.
        `rounding`: "rtn", "hqq", "clip" (clip search), "gptq", or "sequential": GPTQ layer after layer on inputs from
            the layers quantized before, with refit. None takes the best there is: "sequential" where the calibration
            holds Hessians and tokens and the original model can be run, "gptq" without a model, "clip" without
            Hessians.
        `group_size`: inputs per scale, used without a plan.
        `activation_group`: "group" for one activation scale per token and group, "token" for one per token.
        `bits`: budget per layer in bits per weight, used without a plan.
        `refit`: of sequential rounding, the share (0..1) of the correction for errors of earlier layers.
        `refine`: rounds of refinement after GPTQ (:mod:`torchmix.rounding.refine`), 0 for plain GPTQ.
        `records`: filled while quantizing, one :class:`LayerRecord` per layer.
        `progress`: called as ``progress(layers_done, layers_in_all, name)``.
        `version`: of this configuration class.
    """

    plan: BitPlan | None = None
    calibration: Calibration | None = None
    rounding: str | None = None
    group_size: int = 128
    activation_group: Granularity = "group"
    bits: float = DATA_FREE_BITS
    refit: float = DEFAULT_REFIT
    refine: int = DEFAULT_REFINE
    records: list[LayerRecord] = field(default_factory=list, repr=False)
    progress: Callable[[int, int, str], None] | None = field(default=None, repr=False)
    version: int = 1

    def __post_init__(self) -> None:
        torch._C._log_api_usage_once("torchmix.MixLLMConfig")
        if self.rounding is not None and self.rounding not in ROUNDING_NAMES:
            raise ValueError(f"rounding={self.rounding!r} is not known; choose one of {ROUNDING_NAMES}")
        if not 0.0 <= self.refit <= 1.0:
            raise ValueError(f"refit={self.refit!r} must lie in 0..1; 0.5 is the usual choice")
        if self.refine < 0:
            raise ValueError(f"refine={self.refine!r} must be 0 or more rounds; 3 is the usual choice")
        if self.activation_group not in ("group", "token"):
            raise ValueError(f"activation_group={self.activation_group!r} must be 'group' or 'token'")
        check_group_size(self.group_size)
        has_hessians = self.calibration is not None and bool(self.calibration.hessians)
        if self.rounding in ("gptq", SEQUENTIAL) and not has_hessians:
            raise ValueError(
                f"rounding={self.rounding!r} needs a calibration with Hessians; pass calibration=calibrate(model, "
                "data), or choose rounding='clip'"
            )
        if self.calibration is not None and self.plan is None:
            raise ValueError("a calibration without a plan: pass plan=calibration.plan(bits=4.5) as well")
        if self.plan is not None and self.calibration is not None:
            _check_same_model(self.plan, self.calibration)
        self._method = self.rounding or ("gptq" if has_hessians else "clip")
        self._by_fingerprint: dict[str, deque[LayerPlan]] = {}
        for layer in self.plan.layers.values() if self.plan is not None else ():
            self._by_fingerprint.setdefault(layer.fingerprint, deque()).append(layer)
        self._done: dict[int, tuple[Any, nn.Parameter]] = {}
        self._model: Any = None  # weak reference to the model whose experts are quantized along
        self._modules: frozenset[int] = frozenset()  # ids of its modules
        self._original: Any = None  # weak reference to the model that sequential rounding runs
        self._pending: list[Target] = []
        self._names: dict[int, tuple[Any, str]] = {}  # id of a parameter -> weak reference and name
        self._warned = False
        self._rounded: dict[str, RoundedWeight] = {}  # what sequential rounding has made ready


def mixllm_config(
    plan: BitPlan | None = None,
    calibration: Calibration | None = None,
    *,
    model: nn.Module | None = None,
    rounding: str | None = None,
    group_size: int = 128,
    activation_group: Granularity = "group",
    bits: float = DATA_FREE_BITS,
    refit: float = DEFAULT_REFIT,
    refine: int = DEFAULT_REFINE,
    progress: Callable[[int, int, str], None] | None = None,
) -> MixLLMConfig:
    """Configuration for ``quantize_(model, mixllm_config(plan, calibration))``.

    Without arguments it works on any module: the rows of each layer are ranked by their own rounding error, the
    budget holds for each layer, and rounding is a clip search; one warning says what was done without.

    Args:
        plan, calibration, rounding, group_size, activation_group, bits, refit, refine, progress:
            see :class:`MixLLMConfig`.
        model: the model that will be quantized; needed when the plan holds experts or ``Conv1D`` weights and was
            not made by a calibration of this very model, when layers of equal weights are treated differently, or for
            sequential rounding with a calibration from a file.

    Warns where ``quantize_`` would do nothing, as in a model of ``Conv1D`` layers alone, and says what to write.

    Raises:
        ValueError: for settings that contradict each other, a calibration of another model than the plan's, or
            a plan that holds weights which ``quantize_`` does not show, without a model to find them in.
    """
    config = MixLLMConfig(
        plan, calibration, rounding, group_size, activation_group, bits, refit, refine, progress=progress
    )
    hidden = [] if plan is None else [name for name, layer in plan.layers.items() if _is_hidden(layer)]
    found = model if model is not None else _model_of(calibration)
    if found is not None:
        config._names = {id(p): (weakref.ref(p), name) for name, p in found.named_parameters()}
    _choose_sequential(config, found)
    if found is not None and hidden:
        config._model = weakref.ref(found)
        config._modules = frozenset(id(module) for module in found.modules())
    if hidden:
        if found is None:
            raise ValueError(
                f"{hidden[0]}: quantize_ shows only nn.Linear modules to a configuration, but this plan holds "
                f"{len(hidden)} expert or Conv1D weights; pass mixllm_config(..., model=model)"
            )
        selection = select_parameters(found, include=list(plan.layers) if plan is not None else ())
        config._pending = [target for target in selection.targets if target.name in set(hidden)]
    if found is not None:
        _warn_where_nothing_is_shown(found, plan)
    return config


def _choose_sequential(config: MixLLMConfig, model: nn.Module | None) -> None:
    """Round layer after layer where that was asked for, or where nothing was and it can be done."""
    if (
        config.calibration is None
        or not config.calibration.hessians
        or config.rounding not in (None, SEQUENTIAL)
    ):
        return
    config._original, missing = original_model(config.calibration, config.plan, model)
    if config._original is not None:
        config._method = SEQUENTIAL
    elif config.rounding == SEQUENTIAL:
        raise ValueError(
            f"rounding='{SEQUENTIAL}' runs the original model on the calibration tokens, but {missing}; pass "
            "mixllm_config(..., model=model) with a calibration of token data, or choose rounding='gptq'"
        )
    else:
        logger.warning("rounding with one-shot GPTQ instead of layer after layer: %s", missing)


def _warn_where_nothing_is_shown(model: nn.Module, plan: BitPlan | None) -> None:
    """quantize_ never calls the handler for a model without any ``nn.Linear``: say so, and what to write instead."""
    if any(isinstance(module, nn.Linear) for module in model.modules()):
        return
    first = "" if plan is not None else "pass a plan, as of calibrate(model, data).plan(bits=4.5), and "
    warnings.warn(
        f"{type(model).__name__} has no nn.Linear, and quantize_ by itself looks at nothing else, so it would leave "
        f"the model untouched without an error; {first}call quantize_(model, config, filter_fn=lambda module, name: "
        "True)",
        stacklevel=3,
    )


def _planned(config: MixLLMConfig) -> list[LayerPlan]:
    return list(config.plan.layers.values()) if config.plan is not None else []


def _is_hidden(layer: LayerPlan) -> bool:
    return layer.transposed or layer.num_experts is not None


def _model_of(calibration: Calibration | None) -> nn.Module | None:
    """The model that was calibrated, if it still exists in this process."""
    return calibration.model() if calibration is not None and calibration.model is not None else None


def _check_same_model(plan: BitPlan, calibration: Calibration) -> None:
    for name, layer in plan.layers.items():
        measured = calibration.layers.get(name)
        if measured is None or measured.fingerprint != layer.fingerprint:
            raise ValueError(
                f"{name}: the plan and the calibration are not of the same model "
                f"({'not measured' if measured is None else 'other weights'}); make the plan with calibration.plan()"
            )


@register_quantize_module_handler(MixLLMConfig)
def _quantize_module(module: nn.Module, config: MixLLMConfig, *, parameter_name: str = "weight") -> nn.Module:
    """Handler of ``quantize_``: replaces one parameter of one module."""
    _round_in_sequence(config)
    _quantize_pending(module, config)
    weight = getattr(module, parameter_name, None)
    if not isinstance(weight, nn.Parameter) or weight.dim() not in (2, 3):
        return module
    done = config._done.get(id(weight))
    if isinstance(weight, PackedTensor):
        if any(weight is parameter for _, parameter in config._done.values()):
            return module
        raise TypeError(f"{module} is already quantized ({weight}); start from the original model")
    if done is not None and done[0]() is weight:  # a second module with the same, tied parameter
        _replace(module, parameter_name, done[1])
        return module
    if config.plan is None:
        _quantize_data_free(module, parameter_name, config)
    else:
        layer = _find_layer(module, weight, config)
        if layer is not None:
            _quantize_target(
                Target(layer.name, module, parameter_name, layer.transposed), layer.row_bits, config
            )
    return module


def _quantize_pending(module: nn.Module, config: MixLLMConfig) -> None:
    """Quantize what ``quantize_`` never shows, once, when the first module of the model comes by."""
    if config._model is None or not any(_is_hidden(layer) for layer in _planned(config)):
        return
    assert config.plan is not None, "only a plan can hold weights that quantize_ does not show"
    if config._model() is None or id(module) not in config._modules:
        name = next(name for name, layer in config.plan.layers.items() if _is_hidden(layer))
        raise ValueError(
            f"{name}: the plan's expert or Conv1D weights belong to another model object than the one that is being "
            "quantized; pass mixllm_config(..., model=model)"
        )
    pending, config._pending = config._pending, []
    for target in pending:
        layer = config.plan.layers[target.name]
        if weight_fingerprint(target.weight) != layer.fingerprint:
            raise ValueError(
                f"{target.name}: the weights differ from those that were measured; calibrate this model"
            )
        config._by_fingerprint[layer.fingerprint].remove(layer)
        _quantize_target(target, layer.row_bits, config)


def _find_layer(module: nn.Module, weight: Tensor, config: MixLLMConfig) -> LayerPlan | None:
    """The plan's entry for this weight; None when the plan excludes it."""
    assert config.plan is not None, "called with a plan only"
    if weight.device.type == "meta":
        raise ValueError(
            f"{module} is on the meta device and has no values to quantize; load the weights first"
        )
    fingerprint = weight_fingerprint(weight)
    layers = config._by_fingerprint.get(fingerprint) or deque()
    excluded = [exclusion.name for exclusion in config.plan.excluded if exclusion.fingerprint == fingerprint]
    reference, name = config._names.get(id(weight), (lambda: None, ""))
    if reference() is weight and (name in excluded or any(layer.name == name for layer in layers)):
        return next((layer for layer in layers if layer.name == name), None)
    if layers and excluded:
        raise ValueError(
            f"{module}: {layers[0].name} and the excluded {excluded[0]} hold equal weights, and quantize_ does not "
            "tell which of them this is; pass mixllm_config(..., model=model)"
        )
    if layers:
        layers.rotate(-1)  # layers with equal weights take turns, in the order of the model
        return layers[-1]
    if excluded:
        return None
    raise ValueError(
        f"{module}: no layer of the plan has these weights, so the plan was made for another model (or for this one "
        "before its weights changed); calibrate this model, or pass a filter_fn that leaves the layer out"
    )


def _quantize_target(target: Target, row_bits: Tensor, config: MixLLMConfig) -> None:
    """Round one weight (all its experts) and put the quantized tensor in its place."""
    check_target(target)
    group_size = config.plan.group_size if config.plan is not None else config.group_size
    method = "gptq" if config._method == SEQUENTIAL else config._method
    hessians = [
        None if config.calibration is None else config.calibration.hessian(target.name, e)
        for e in range(target.num_experts or 1)
    ]
    ready = config._rounded.get(target.name)
    quantized, record = quantize_target(
        target,
        row_bits,
        group_size,
        method,
        hessians,
        config.activation_group == "token",
        ready,
        config.refine,
    )
    config.records.append(record)
    weight, parameter = target.weight, nn.Parameter(quantized, requires_grad=False)
    config._done[id(weight)] = (weakref.ref(weight), parameter)
    _replace(target.module, target.parameter_name, parameter)
    if ready is None:
        _report_progress(config, {*config._rounded, *(record.name for record in config.records)}, target.name)


def _report_progress(config: MixLLMConfig, done: Collection[str], name: str) -> None:
    if config.progress is not None:
        config.progress(len(done), len(config.plan.layers) if config.plan is not None else len(done), name)


def _round_in_sequence(config: MixLLMConfig) -> None:
    """Round the whole model layer after layer, once, when its first module comes by."""
    if config._method != SEQUENTIAL or config._rounded or config.plan is None:
        return
    assert config.calibration is not None, "sequential rounding was chosen because there is a calibration"
    settings = SequentialRounding(
        config.plan.group_size, config.activation_group == "token", config.refit, config.refine
    )
    rounded = round_plan_sequentially(
        config._original(), config.plan, config.calibration, settings, partial(_report_progress, config)
    )
    if rounded is None:
        config._method = "gptq"
    else:
        config._rounded = rounded


def _quantize_data_free(module: nn.Module, parameter_name: str, config: MixLLMConfig) -> None:
    """Rank the rows of one layer by their own rounding error and round with clip search."""
    if not config._warned:
        config._warned = True
        warnings.warn(
            "mixllm_config() without a plan: rows are ranked by their own rounding error inside each layer instead of "
            "by their effect on the loss over all layers, rounding uses no calibration data, and layers are not known "
            "by name, so an output head is quantized like any layer (pass filter_fn to leave it out). For much better "
            "quality: calibration = torchmix.calibrate(model, data); plan = calibration.plan(bits=4.5); "
            "quantize_(model, mixllm_config(plan, calibration)).",
            stacklevel=2,
        )
    if not isinstance(module, nn.Linear):
        raise TypeError(
            f"{module}: without a plan only nn.Linear can be quantized, as the way other weights lie is unknown; "
            "pass a plan, as of calibrate(model, data).plan(bits=4.5)"
        )
    target = Target(str(module), module, parameter_name, transposed=False)
    in_features = target.rows.shape[-1]
    if in_features < MIN_IN_FEATURES:
        logger.warning("%s is left alone: its rows have fewer than %d inputs", module, MIN_IN_FEATURES)
        return
    check_target(target)
    if target.weight.device.type == "meta":
        raise ValueError(
            f"{module} is on the meta device and has no values to quantize; load the weights first"
        )
    scores = data_free_scores(target, DATA_FREE_WIDTHS, config.group_size)
    choices = LayerChoices(
        target.name, in_features, width_costs(in_features, DATA_FREE_WIDTHS, config.group_size), scores
    )
    low, high = (min(choices.costs) / in_features, max(choices.costs) / in_features)
    budget = budget_in_bits(min(max(config.bits, low), high), target.weight.numel())
    problem = AllocationProblem((choices,), DATA_FREE_WIDTHS, budget)
    _quantize_target(target, allocate(problem).row_bits[target.name], config)


def _replace(module: nn.Module, parameter_name: str, parameter: nn.Parameter) -> None:
    """Put the quantized parameter in place and let ``print(model)`` say so."""
    setattr(module, parameter_name, parameter)
    show_quantized_weights(module)


ALLOWED_AO_MODULES.add("torchmix")  # lets torchao's config_from_dict find MixLLMConfig
MixLLMConfig.__module__ = "torchmix"
