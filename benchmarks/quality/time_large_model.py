"""Time and peak memory of calibrate + plan + quantize for a large decoder, measured on few of its blocks.

    python benchmarks/quality/time_large_model.py --device cuda

A model of Llama-3.1-8B's shape with random weights is built with one block and with three. What the second has more
is two blocks' share; the table multiplies it by 32 and adds what does not depend on the blocks (embedding, head).
Tokens are random: time and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from harness import git_commit, machine, write_csv
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM

import torchmix
from torchmix.forecast import peak_device_bytes, peak_resident_bytes

BLOCKS = 32
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


def peak_bytes(device: str) -> int:
    """Peak memory on the device since the last reset; on a CPU of the process since its start."""
    return peak_device_bytes(device) or peak_resident_bytes()


def measure(num_blocks: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of each step and peak bytes for a model of so many blocks."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(
            LlamaConfig(**SHAPE, num_hidden_layers=num_blocks, dtype="bfloat16")
        ).bfloat16()
    samples = torch.randint(SHAPE["vocab_size"], (options.samples, options.sequence_length))
    on_cuda = torch.device(options.device).type == "cuda"
    result: dict[str, float] = {"blocks": num_blocks}
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    started = time.perf_counter()
    calibration = torchmix.calibrate(
        model, samples, num_samples=options.samples, sequence_length=options.sequence_length
    )
    result["calibrate"] = time.perf_counter() - started
    result["calibrate peak bytes"] = peak_bytes(options.device)
    started = time.perf_counter()
    plan = calibration.plan(bits=4.5)
    result["plan"] = time.perf_counter() - started
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    started = time.perf_counter()
    quantize_(model, torchmix.mixllm_config(plan, calibration, model=model))
    if on_cuda:
        torch.cuda.synchronize()
    result["quantize"] = time.perf_counter() - started
    result["quantize peak bytes"] = peak_bytes(options.device)
    result["Hessian bytes"] = sum(h.numel() * h.element_size() for h in calibration.hessians.values())
    return result


def main() -> None:
    """Measure one block and three, and print what that makes for 32."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args()
    measure(1, options)  # warm-up: kernels are compiled at their first use
    one, three = measure(1, options), measure(3, options)
    rows = []
    for key in one:
        if key == "blocks":
            continue
        per_block = (three[key] - one[key]) / 2
        whole = one[key] + (BLOCKS - 1) * per_block
        rows.append(
            {
                "what": key,
                "1 block": one[key],
                "3 blocks": three[key],
                "per block": per_block,
                "32 blocks": whole,
            }
        )
        scale, unit = (1e9, "GB") if "bytes" in key else (1, "s")
        print(
            f"{key}: {one[key] / scale:.2f}, {three[key] / scale:.2f} {unit}; 32 blocks {whole / scale:.1f} {unit}"
        )
    seconds = sum(row["32 blocks"] for row in rows if "bytes" not in row["what"])
    print(f"calibrate + plan + quantize, 32 blocks: {seconds:.0f} s on {machine(options.device)}")
    if options.csv is not None:
        conditions = {
            "samples": options.samples,
            "sequence_length": options.sequence_length,
            "machine": f"{machine(options.device)}, torch {torch.__version__}",
            "commit": options.commit or git_commit(),
        }
        write_csv([{**row, **conditions} for row in rows], options.csv)


if __name__ == "__main__":
    main()
