"""One evaluator for all quality tables: calibrate, plan, quantize, evaluate, and write down under which conditions.

Every case goes through the same pipeline. Bits are true: codes, scales, zero points and row widths of the quantized
layers. Models are evaluated through their packed tensors and ops. ``--dense`` takes the same weights dequantized and
the same int8 activations in floating point instead: equal but for the order of float sums, which tips single roundings,
and several times faster where there are no kernels. A row is written as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization import quantize_

import torchmix
from torchmix.calibration import Calibration
from torchmix.capture import QuantizedInputs
from torchmix.data import read_token_ids
from torchmix.evaluation import Evaluation, evaluate
from torchmix.huggingface import load_model, load_tokenizer
from torchmix.tensor import MixedPrecisionTensor

ORIGINAL = "original"
Planner = Callable[[Calibration, nn.Module], torchmix.BitPlan]


@dataclass(frozen=True)
class Measurement:
    """What a calibration is made from; cases with equal measurements share one.

    transform: name of a rewrite of the model before anything is measured, "" for none.
    """

    samples: int = 64
    seed: int = 0
    salience: tuple[str, ...] = ("fisher_token",)
    data: str = ""
    transform: str = ""
    token_weights: bool = False


@dataclass(frozen=True)
class Case:
    """One row of a table.

    plan: arguments of ``Calibration.plan``, or a function that makes the plan.
    config: arguments of ``mixllm_config``; the default is the library's.
    adapt: changes the calibration before planning (other token weights, for example).
    tune: arguments of ``torchmix.tune``, None for no tuning.
    """

    name: str
    plan: Mapping[str, Any] | Planner
    config: Mapping[str, Any] = field(default_factory=dict)
    measurement: Measurement = field(default_factory=Measurement)
    adapt: Callable[[Calibration, nn.Module], Calibration] | None = None
    tune: Mapping[str, Any] | None = None


def arguments(description: str) -> argparse.ArgumentParser:
    """Flags that all tables share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model", help="directory or hub id of a causal language model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples (default: 64)")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens per sample (default: 1024)")
    parser.add_argument("--max-tokens", type=int, help="evaluate on the first tokens only")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument(
        "--dense", action="store_true", help="evaluate dequantized weights with int8 activations (faster)"
    )
    parser.add_argument("--only", help="run only the cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--commit", help="version for the CSV, where the code runs outside its repository")
    return parser


class Bench:
    """Loads the model once; makes calibrations when a case first needs them."""

    def __init__(self, options: argparse.Namespace, transforms: Mapping[str, Callable[..., Any]]) -> None:
        self.options, self._transforms = options, transforms
        self.tokenizer = load_tokenizer(options.model)
        self.model = load_model(options.model, dtype=torch.float32, device=options.device)
        self._models: dict[str, nn.Module] = {"": self.model}
        self._calibrations: dict[Measurement, Calibration] = {}

    def source(self, measurement: Measurement) -> nn.Module:
        """The model that a measurement is made on: the original, or a rewritten copy."""
        name = measurement.transform
        if name not in self._models:
            self._models[name] = copy.deepcopy(self.model)
            self._transforms[name](self._models[name], self.calibration(Measurement(self.options.samples)))
        return self._models[name]

    def calibration(self, measurement: Measurement) -> Calibration:
        """The calibration of a measurement, made at first use."""
        if measurement not in self._calibrations:
            started = time.perf_counter()
            self._calibrations[measurement] = torchmix.calibrate(
                self.source(measurement),
                measurement.data or self.options.data,
                tokenizer=self.tokenizer,
                num_samples=measurement.samples,
                sequence_length=self.options.sequence_length,
                salience=measurement.salience,
                seed=measurement.seed,
                token_weights=measurement.token_weights,
            )
            print(f"calibrated {measurement} in {time.perf_counter() - started:.0f} s", flush=True)
        return self._calibrations[measurement]

    def quantize(self, case: Case) -> tuple[nn.Module, torchmix.BitPlan, float]:
        """A quantized copy, its plan, and the seconds that planning, rounding and tuning took."""
        source = self.source(case.measurement)
        calibration = self.calibration(case.measurement)
        if case.adapt is not None:
            calibration = case.adapt(calibration, source)
        started = time.perf_counter()
        plan = case.plan(calibration, source) if callable(case.plan) else calibration.plan(**case.plan)
        model = copy.deepcopy(source)
        config = {"model": model, **case.config}
        quantize_(model, torchmix.mixllm_config(plan, calibration, **config))
        if case.tune is not None:
            data = case.measurement.data or self.options.data
            length = self.options.sequence_length
            tuned = torchmix.tune(
                model, source, data, tokenizer=self.tokenizer, sequence_length=length, **case.tune
            )
            print(f"{case.name}: {tuned}", flush=True)
        return model, plan, time.perf_counter() - started

    def run(self, cases: Iterable[Case]) -> list[dict[str, str]]:
        """All cases that were asked for, evaluated on the whole text; rows as they go into the CSV."""
        token_ids, _ = read_token_ids(self.options.text, self.tokenizer)
        token_ids = token_ids[: self.options.max_tokens]
        original = self._evaluate(self.model, token_ids)
        rows = [self._row(ORIGINAL, original, original, None, None, 0.0)]
        for case in cases:
            if self.options.only and self.options.only not in case.name:
                continue
            model, plan, seconds = self.quantize(case)
            started = time.perf_counter()
            if self.options.dense:
                model = Dense(model)
            result = self._evaluate(model, token_ids)
            rows.append(self._row(case.name, result, original, case, plan, seconds))
            took = f"{seconds:.1f} + {time.perf_counter() - started:.1f} s"
            print(
                f"{case.name}: {plan.bits_per_weight:.4f} bits, KL {result.kl_mean:.5f}, {took}", flush=True
            )
            write_csv(rows, self.options.csv)
        return rows

    def _evaluate(self, model: nn.Module, token_ids: torch.Tensor) -> Evaluation:
        return evaluate(
            model,
            token_ids,
            reference=self.model,
            window=self.options.sequence_length,
            batch_size=2 if self.options.device == "cpu" else 8,
        )

    def _row(
        self,
        name: str,
        result: Evaluation,
        original: Evaluation,
        case: Case | None,
        plan: torchmix.BitPlan | None,
        seconds: float,
    ) -> dict[str, str]:
        measurement = case.measurement if case else Measurement(self.options.samples)
        predicted = plan.predicted_kl if plan else None
        return {
            "method": name,
            "bits_per_weight": f"{plan.bits_per_weight:.4f}" if plan else "",
            "perplexity": f"{result.perplexity:.4f}",
            "perplexity_loss": f"{result.perplexity - original.perplexity:+.4f}",
            "kl_mean": f"{result.kl_mean:.5f}",
            "kl_p99": f"{result.kl_p99:.4f}",
            "top1_agreement": f"{result.top1_agreement:.4f}",
            "predicted_kl": f"{predicted:.5f}" if predicted is not None else "",
            "seconds": f"{seconds:.1f}",
            "samples": str(measurement.samples),
            "seed": str(measurement.seed),
            "calibration": Path(measurement.data or self.options.data).name,
            **self._conditions(),
        }

    def _conditions(self) -> dict[str, str]:
        return {
            "evaluated": "dense" if self.options.dense else "packed",
            "text": Path(self.options.text).name,
            "model": Path(self.options.model).name,
            "machine": f"{machine(self.options.device)}, torch {torch.__version__}",
            "commit": self.options.commit or os.environ.get("TORCHMIX_COMMIT") or git_commit(),
        }


def machine(device: str) -> str:
    """What the run was made on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def git_commit() -> str:
    """The commit that is checked out, with a mark where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


def report(rows: list[dict[str, str]], path: Path | None) -> None:
    """Print the table."""
    shown = list(rows[0])[: list(rows[0]).index("samples")]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in shown}
    for row in ({key: key for key in shown}, *rows):
        print("  ".join(row[key].ljust(widths[key]) for key in shown))
    if path is not None:
        print(f"written to {path}")


def write_csv(rows: list[dict[str, str]], path: Path | None) -> None:
    """Write the rows, under a temporary name first."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


class Dense(nn.Module):
    """A quantized model with dense weights of the same values, its activations quantized to int8 and back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        packed = {name: p for name, p in model.named_parameters() if isinstance(p, MixedPrecisionTensor)}
        first = next(iter(packed.values()))
        self._int8 = QuantizedInputs(first.group_size, first.per_token)
        for name, weight in packed.items():
            owner, _, attribute = name.rpartition(".")
            dense = nn.Parameter(weight.dequantize(), requires_grad=False)
            setattr(model.get_submodule(owner), attribute, dense)
            self._int8.add(dense)

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Logits of the model inside."""
        with self._int8:
            return self.model(input_ids, use_cache=False)


def with_samples(case: Case, samples: int) -> Case:
    """The case with so many calibration samples."""
    return replace(case, measurement=replace(case.measurement, samples=samples))
