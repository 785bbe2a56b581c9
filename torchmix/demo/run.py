"""Layer 10: what ``torchmix demo`` computes: one model, five ways to store it, measured on the same text.

Every number comes from the run: the weights are packed, the layers compute through the packed tensors, and the
size is that of the files which ``save_pretrained`` would write.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_

from torchmix.allocation import BitPlan, Exclusion
from torchmix.calibration import Calibration
from torchmix.checkpoint import planned_checkpoint_bytes
from torchmix.checkpoint_format import file_bytes, model_specs
from torchmix.config import mixllm_config
from torchmix.data import read_token_ids
from torchmix.demo.text import DemoText, demo_model_directory
from torchmix.evaluation import Evaluation, evaluate_many
from torchmix.huggingface import load_model, load_tokenizer
from torchmix.workflow import calibrate

ORIGINAL = "original"
OURS = "torchmix, 4.5 bits"
BITS = 4.5
PAPER_SHARE = 0.10
WINDOW = 1024
SALIENCE = ("fisher_token", "mixllm")
PROMPT = "The castle was built in"
NEW_TOKENS = 48

Progress = Callable[[int, int], None]
Stage = Callable[[str, str], AbstractContextManager[Progress]]
"""(what is done, of what it counts) -> context manager that gives a progress callback."""


@dataclass(frozen=True)
class DemoSettings:
    """How much work the demo does.

    num_samples: calibration samples of 1024 tokens. num_windows: evaluation windows of 1024 tokens.
    model: directory of a causal language model in transformers' layout.
    """

    num_samples: int
    num_windows: int
    model: Path
    seed: int = 0


@dataclass(frozen=True)
class DemoRow:
    """One way to store the model.

    bits_per_weight: of the quantized layers, everything stored counted; 16 for the original.
    perplexity, kl_mean: on the evaluation text, KL in nats per token from the original.
    model_bytes: all weight files, unquantized parts included.
    seconds: time to choose the widths and round, calibration not counted.
    """

    method: str
    bits_per_weight: float
    perplexity: float
    kl_mean: float
    model_bytes: int
    seconds: float


@dataclass(frozen=True)
class DemoReport:
    """Everything that the demo found out.

    samples: method -> what it makes of ``prompt``, for the original and torchmix.
    predicted_kl: of torchmix's plan, computed before anything was quantized.
    """

    rows: tuple[DemoRow, ...]
    model: Path
    prompt: str
    samples: dict[str, str]
    layers: int
    quantized_weights: int
    coverage: float
    excluded: tuple[Exclusion, ...]
    predicted_kl: float | None
    calibration_tokens: int
    calibration_seconds: float
    evaluation_tokens: int
    evaluation_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values; ``rows`` has the contract's keys."""
        values = asdict(self)
        values["model"] = self.model.name
        values["excluded"] = [{"name": entry.name, "reason": entry.reason} for entry in self.excluded]
        return values


def demo_settings(
    num_samples: int = 12, num_windows: int = 24, model: Path | None = None, seed: int = 0
) -> DemoSettings:
    """Settings that take under two minutes on two cores, with the bundled model.

    Raises:
        FileNotFoundError: the installation lacks the model.
    """
    return DemoSettings(num_samples, num_windows, model or demo_model_directory(), seed)


@contextmanager
def _no_stage(title: str, unit: str) -> Iterator[Progress]:
    yield lambda done, total: None


def run_demo(texts: DemoText, settings: DemoSettings, stage: Stage = _no_stage) -> DemoReport:
    """Calibrate once, quantize four times, and measure the original and all four on unseen text.

    Raises:
        ValueError: a text is too short.
    """
    tokenizer = load_tokenizer(settings.model)
    original = load_model(settings.model)
    stored = copy.deepcopy(original)  # in the dtype of its files, for the sizes
    original.float()
    token_ids, _ = read_token_ids(texts.evaluation, tokenizer)
    token_ids = token_ids[: settings.num_windows * WINDOW + 1]
    started = time.perf_counter()
    with stage("calibrating", "steps") as progress:
        calibration = calibrate(
            original,
            [texts.calibration],
            tokenizer=tokenizer,
            num_samples=settings.num_samples,
            sequence_length=WINDOW,
            salience=SALIENCE,
            seed=settings.seed,
            progress=progress,
        )
    calibrated = time.perf_counter()
    quantized = _quantize_all(original, calibration, stage)
    models = {ORIGINAL: original, **{method: result.model for method, result in quantized.items()}}
    rounded = time.perf_counter()
    with stage("evaluating five models", "windows") as progress:
        scores = evaluate_many(
            models, token_ids, reference=original, window=WINDOW, batch_size=2, progress=progress
        )
    evaluated = time.perf_counter()
    plan = quantized[OURS].plan
    return DemoReport(
        rows=_rows(stored, quantized, scores),
        model=settings.model,
        prompt=PROMPT,
        samples=_samples(models, tokenizer, stage),
        layers=len(plan.layers),
        quantized_weights=plan.quantized_weights,
        coverage=plan.coverage,
        excluded=plan.excluded,
        predicted_kl=plan.predicted_kl,
        calibration_tokens=0 if calibration.samples is None else calibration.samples.numel(),
        calibration_seconds=calibrated - started,
        evaluation_tokens=scores[ORIGINAL].tokens,
        evaluation_seconds=evaluated - rounded,
    )


@dataclass(frozen=True)
class _Quantized:
    model: nn.Module
    plan: BitPlan
    seconds: float


def _quantize_all(original: nn.Module, calibration: Calibration, stage: Stage) -> dict[str, _Quantized]:
    """The four quantized models, all from one calibration."""
    plain_gptq = {"rounding": "gptq", "refine": 0}
    recipes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "RTN, all rows 4 bits": ({"widths": (4,)}, {"rounding": "rtn"}),
        "GPTQ, all rows 4 bits": ({"widths": (4,)}, plain_gptq),
        "MixLLM, 10% of rows 8 bits": ({"rows_at_8_bits": PAPER_SHARE, "salience": "mixllm"}, plain_gptq),
        OURS: ({"bits": BITS}, {}),
    }
    results: dict[str, _Quantized] = {}
    with stage("quantizing", "models") as progress:
        for done, (method, (budget, options)) in enumerate(recipes.items(), 1):
            started = time.perf_counter()
            plan = calibration.plan(**budget)
            model = copy.deepcopy(original)
            quantize_(model, mixllm_config(plan, calibration, model=model, **options))
            results[method] = _Quantized(model, plan, time.perf_counter() - started)
            progress(done, len(recipes))
    return results


def _rows(
    stored: nn.Module, quantized: Mapping[str, _Quantized], scores: Mapping[str, Evaluation]
) -> tuple[DemoRow, ...]:
    """The table; sizes are those of files in the dtype that ``stored`` has."""
    original = scores[ORIGINAL]
    rows = [DemoRow(ORIGINAL, 16.0, original.perplexity, 0.0, file_bytes(model_specs(stored)), 0.0)]
    for method, result in quantized.items():
        plan, score = result.plan, scores[method]
        assert score.kl_mean is not None, "there was a reference"
        size = planned_checkpoint_bytes(stored, plan)
        rows.append(
            DemoRow(method, plan.bits_per_weight, score.perplexity, score.kl_mean, size, result.seconds)
        )
    return tuple(rows)


def _samples(models: Mapping[str, nn.Module], tokenizer: Any, stage: Stage) -> dict[str, str]:
    """What the original and torchmix's model make of the prompt."""
    samples: dict[str, str] = {}
    with stage("generating", "texts") as progress:
        for method in (ORIGINAL, OURS):
            samples[method] = generate(models[method], tokenizer, PROMPT)
            progress(len(samples), 2)
    return samples


def generate(model: Any, tokenizer: Any, prompt: str, new_tokens: int = NEW_TOKENS) -> str:
    """Continue a prompt with the most likely tokens; repetition is penalized, or small models go in circles."""
    input_ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            repetition_penalty=1.2,
            pad_token_id=tokenizer.eos_token_id,
        )
    text = str(tokenizer.decode(output[0], skip_special_tokens=True))
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text) if match.end() > len(prompt)]
    return text[: ends[-1]] if ends else text  # whole sentences, if there is one
