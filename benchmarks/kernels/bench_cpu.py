"""Speed of linear layers on a CPU: torchmix and its peers, in the same rounds.

    OMP_WAIT_POLICY=passive python benchmarks/kernels/bench_cpu.py --quick

A machine's memory and clocks may drift by factors within minutes, so only ratios within a round count: each round
calls every peer once, in random order, and a line of the table has the median of the ratios to ``F.linear`` in
bfloat16. Weights rotate over copies, so that they come from memory and not from a cache. The activations'
quantization is inside of the time. The CSV names machine, instructions, threads and version.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from cpu_peers import BASELINE, MIXED, PEERS, Call, chosen_peers
from kernel_results import git_commit, write_rows
from torch import Tensor

from torchmix._extension import cpu_capability, kernel_status
from torchmix.cli.env import environment

LLAMA_1B = ((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192))
LLAMA_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 4, 8, 32, 64, 256, 512)
COPY_BYTES = 100e6  # between two uses of the same weight
MOST_COPIES = 40
QUICK_PEERS = (BASELINE, "qlinear", "linear_dynamic", "int4pack", f"torchmix {MIXED}")
REQUIRED = {1: 5.0, 8: 2.2, 64: 1.9, 512: 1.7}  # times F.linear in bfloat16, median over the shapes
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, ImportError)


@dataclass(frozen=True)
class Row:
    """One peer on one shape and number of tokens: medians over the rounds of its time, and of bf16 time to its own."""

    peer: str
    N: int
    K: int
    M: int
    rounds: int
    weight_bytes: int
    ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    note: str = ""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; what is not given comes from ``--quick`` or the full table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", type=_shapes, help="NxK,NxK,... (default: layers of Llama 3.2 1B and 3.1 8B)"
    )
    parser.add_argument("--tokens", type=_numbers, help=f"M,M,... (default: {','.join(map(str, TOKENS))})")
    parser.add_argument("--peers", type=lambda text: text.split(";"), help=f"some of {'; '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, help="rounds for one token; fewer where calls are long")
    parser.add_argument(
        "--quick", action="store_true", help="three shapes, four numbers of tokens, five peers"
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: all cores)")
    parser.add_argument("--csv", type=Path, help="write all rows here")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.shapes = options.shapes or (
        ((2048, 2048), (4096, 4096), (4096, 14336)) if quick else LLAMA_1B + LLAMA_8B
    )
    options.tokens = options.tokens or ((1, 8, 64, 512) if quick else TOKENS)
    options.rounds = options.rounds or (21 if quick else 41)
    try:
        options.peers = chosen_peers(options.peers or (QUICK_PEERS if quick else tuple(PEERS)))
    except ValueError as error:
        parser.error(str(error))
    return options


class Timed:
    """Calls of one peer that rotate over copies of its weight."""

    def __init__(self, name: str, weight: Tensor) -> None:
        peer = PEERS[name](weight)
        count = min(MOST_COPIES, max(2, math.ceil(COPY_BYTES / peer.weight_bytes)))
        if name == "torchao_w8a8":
            count = 2  # each one is compiled
        self.name, self.weight_bytes, self.most_tokens = name, peer.weight_bytes, peer.most_tokens
        self._calls: itertools.cycle[Call] = itertools.cycle([peer.make_copy() for _ in range(count)])

    def seconds(self, x: Tensor) -> float:
        """Time of one call with the next copy."""
        call = next(self._calls)
        started = time.perf_counter()
        call(x)
        return time.perf_counter() - started


def measure(peers: Sequence[Timed], x: Tensor, out_features: int, rounds: int) -> list[Row]:
    """All peers in turn, ``rounds`` times."""
    tokens, inputs = x.shape
    times: dict[str, list[float]] = {}
    rows: dict[str, Row] = {}
    for peer in peers:
        if peer.most_tokens is not None and tokens > peer.most_tokens:
            continue
        rows[peer.name] = Row(peer.name, out_features, inputs, tokens, rounds, peer.weight_bytes)
        try:
            for _ in range(2):
                peer.seconds(x)
            times[peer.name] = []
        except FAILURES as error:
            rows[peer.name] = _changed(rows[peer.name], note=_reason(error))
    running = [peer for peer in peers if peer.name in times]
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(running)  # what one peer leaves in caches and thread pools meets all the others alike
        for peer in running:
            times[peer.name].append(peer.seconds(x))
    for name, seconds in times.items():
        ratios = sorted(base / own for base, own in zip(times[BASELINE], seconds, strict=True))
        rows[name] = _changed(
            rows[name],
            ms=median(seconds) * 1e3,
            ratio=median(ratios),
            ratio_low=ratios[len(ratios) // 4],
            ratio_high=ratios[-1 - len(ratios) // 4],
        )
    return list(rows.values())


def rounds_for(tokens: int, products: int, wanted: int) -> int:
    """Fewer rounds where a call takes long, at least 5."""
    return max(5, min(wanted, round(wanted * 60e6 / (products * (1 + tokens / 20)))))


def run(options: argparse.Namespace, write: Callable[[list[Row]], None]) -> list[Row]:
    """All shapes and numbers of tokens; a table for each shape as soon as it is known."""
    rows: list[Row] = []
    for out_features, inputs in options.shapes:
        torch.manual_seed(0)
        weight = torch.empty(out_features, inputs, dtype=torch.bfloat16).normal_(0, 0.02)
        peers, failed = _built(options.peers, weight)
        of_shape: list[Row] = []
        for tokens in options.tokens:
            x = torch.randn(tokens, inputs).bfloat16()
            rounds = rounds_for(tokens, weight.numel(), options.rounds)
            of_shape += measure(peers, x, out_features, rounds)
        of_shape += [Row(name, out_features, inputs, 0, 0, 0, note=reason) for name, reason in failed.items()]
        print(table(of_shape, options.tokens), flush=True)
        rows += of_shape
        write(rows)
    return rows


def _built(names: Sequence[str], weight: Tensor) -> tuple[list[Timed], dict[str, str]]:
    """The peers that can be made of this weight, and why the others cannot."""
    peers, failed = [], {}
    for name in names:
        try:
            peers.append(Timed(name, weight))
        except FAILURES as error:
            failed[name] = _reason(error)
    return peers, failed


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _changed(row: Row, **changes: object) -> Row:
    return Row(**{**row.__dict__, **changes})


def table(rows: Sequence[Row], tokens: Sequence[int]) -> str:
    """One shape: milliseconds and speed over bf16, a line per peer, a column per M."""
    lines = [f"N={rows[0].N} K={rows[0].K}: ms, times bf16"]
    lines.append(f"{'':20}" + "".join(f"{f'M={m}':>17}" for m in tokens))
    for name in dict.fromkeys(row.peer for row in rows if row.ms):
        of_peer = {row.M: row for row in rows if row.peer == name and row.ms}
        cells = [f"{of_peer[m].ms:10.3f} {of_peer[m].ratio:5.2f}x" if m in of_peer else "-" for m in tokens]
        lines.append(f"{name:20}" + "".join(f"{cell:>17}" for cell in cells))
    notes = dict.fromkeys(f"  {row.peer}: {row.note}" for row in rows if row.note)
    return "\n".join([*lines, *notes, ""])


def summary(rows: Sequence[Row]) -> str:
    """For each peer and M: median and smallest ratio over the shapes, and whether the mixed rows reach the goal."""
    lines = ["median (smallest) over the shapes, times F.linear bf16"]
    tokens = sorted({row.M for row in rows if row.ratio})
    lines.append(f"{'':20}" + "".join(f"{f'M={m}':>15}" for m in tokens))
    for name in dict.fromkeys(row.peer for row in rows if row.ratio):
        cells = []
        for m in tokens:
            ratios = [row.ratio for row in rows if row.peer == name and m == row.M and row.ratio]
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f})" if ratios else "-")
        lines.append(f"{name:20}" + "".join(f"{cell:>15}" for cell in cells))
    for m, required in REQUIRED.items():
        ratios = [row.ratio for row in rows if row.peer == f"torchmix {MIXED}" and m == row.M and row.ratio]
        if ratios:
            reached = "reached" if median(ratios) >= required else "missed"
            lines.append(f"goal at M={m}: {required}x, {reached} ({median(ratios):.2f}x)")
    return "\n".join(lines)


def conditions() -> dict[str, str]:
    """What every row of the CSV says of the run."""
    cpu = environment()["cpu"]
    return {
        "machine": f"{cpu['name']}, {cpu['cores']} cores",
        "capability": str(cpu_capability()),
        "threads": str(torch.get_num_threads()),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "torch": torch.__version__,
        "commit": os.environ.get("TORCHMIX_COMMIT") or git_commit(),
    }


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(n), int(k)) for n, k in (part.split("x") for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write shapes like 4096x4096,512x2048") from error


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers like 1,8,64") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    of_run = conditions()
    print(", ".join(f"{key}: {value}" for key, value in of_run.items()))
    reason = kernel_status().reason("cpu")
    if reason is not None:
        print(f"torchmix: {reason}")

    def write(rows: list[Row]) -> None:
        if options.csv is not None:
            write_rows([{**row.__dict__, **of_run} for row in rows], options.csv)

    with torch.inference_mode():
        rows = run(options, write)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
