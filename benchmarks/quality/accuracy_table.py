"""Perplexity and KL divergence of several settings on one model, through the real packed tensors and ops.

One run, one calibration, one evaluator: the table compares what can be compared. Example, with a model and texts
of your own::

    python benchmarks/quality/accuracy_table.py MODEL --data calibration.txt --text test.txt \\
        --csv benchmarks/results/accuracy.csv

Bits are true: codes, scales, zero points and row widths of the quantized layers. Activations are int8 throughout.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import quantize_

import torchmix
from torchmix.data import read_token_ids
from torchmix.evaluation import evaluate_many
from torchmix.huggingface import load_model, load_tokenizer


def settings(budgets: list[float], sequential: bool) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, arguments of ``Calibration.plan``, and rounding of each row of the table."""
    yield "RTN, 4 bits", {"widths": (4,)}, "rtn"
    yield "RTN with clip search, 4 bits", {"widths": (4,)}, "clip"
    yield "GPTQ, 4 bits", {"widths": (4,)}, "gptq"
    yield "MixLLM paper, 10 % of rows at 8 bits", {"rows_at_8_bits": 0.10, "salience": "mixllm"}, "gptq"
    yield "8 bits", {"widths": (8,)}, "gptq"
    for bits in budgets:
        yield f"torchmix, {bits:g} bits", {"bits": bits}, "gptq"
        if sequential:
            yield f"torchmix, {bits:g} bits, sequential", {"bits": bits}, "sequential"


def main() -> None:
    """Calibrate once, quantize every setting, evaluate all of them in one pass over the text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory or hub id of a causal language model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--text", required=True, help="evaluation text")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples (default: 64)")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens per sample (default: 1024)")
    parser.add_argument(
        "--bits", type=float, nargs="*", default=[4.17, 4.41, 4.5, 4.845, 5.215], help="budgets"
    )
    parser.add_argument(
        "--sequential", action="store_true", help="also round every budget in sequence with refit"
    )
    parser.add_argument("--max-tokens", type=int, help="evaluate on the first tokens only")
    parser.add_argument("--device", default="cpu", help="where to run (default: cpu)")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=torch.float32, device=args.device)
    started = time.perf_counter()
    calibration = torchmix.calibrate(
        model,
        args.data,
        tokenizer=tokenizer,
        num_samples=args.samples,
        sequence_length=args.sequence_length,
        salience=("fisher_token", "mixllm"),
        widths=(3, 4, 5, 6, 8),
    )
    print(f"calibrated on {calibration.tokens} tokens in {time.perf_counter() - started:.0f} s", flush=True)

    models, plans, seconds = {"original": model}, {}, {"original": 0.0}
    for name, options, rounding in settings(args.bits, args.sequential):
        started = time.perf_counter()
        plans[name] = calibration.plan(**options)
        models[name] = copy.deepcopy(model)
        config = torchmix.mixllm_config(plans[name], calibration, rounding=rounding, model=models[name])
        quantize_(models[name], config)
        seconds[name] = time.perf_counter() - started
        print(f"{name}: {plans[name].bits_per_weight:.4f} bits, {seconds[name]:.1f} s", flush=True)

    token_ids, _ = read_token_ids(args.text, tokenizer)
    results = evaluate_many(
        models,
        token_ids[: args.max_tokens],
        reference=model,
        window=args.sequence_length,
        progress=lambda done, total: print(f"evaluated {done} of {total} windows", end="\r", flush=True),
    )
    print()
    rows = []
    for name, result in results.items():
        plan = plans.get(name)
        rows.append(
            {
                "method": name,
                "bits_per_weight": f"{plan.bits_per_weight:.4f}" if plan else "",
                "perplexity": f"{result.perplexity:.4f}",
                "perplexity_loss": f"{result.perplexity - results['original'].perplexity:+.4f}",
                "kl_mean": f"{result.kl_mean:.5f}",
                "predicted_kl": f"{plan.predicted_kl:.5f}" if plan and plan.predicted_kl is not None else "",
                "kl_p99": f"{result.kl_p99:.4f}",
                "top1_agreement": f"{result.top1_agreement:.4f}",
                "seconds": f"{seconds[name]:.1f}",
            }
        )
    report(rows, args)


def machine(device: str) -> str:
    """What the run was made on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def report(rows: list[dict[str, str]], args: argparse.Namespace) -> None:
    """Print the table, and write it with the conditions of the run."""
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in ({key: key for key in widths}, *rows):
        print("  ".join(row[key].ljust(width) for key, width in widths.items()))
    if args.csv is None:
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    conditions = {
        "model": Path(args.model).name,
        "calibration": f"{Path(args.data).name} {args.samples}x{args.sequence_length}",
        "text": Path(args.text).name,
        "machine": f"{machine(args.device)}, torch {torch.__version__}",
        "commit": commit or "unknown",
    }
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *conditions])
        writer.writeheader()
        writer.writerows(row | conditions for row in rows)
    print(f"written to {args.csv}")


if __name__ == "__main__":
    main()
