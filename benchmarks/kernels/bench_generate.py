"""Speed and memory of a whole model: greedy decoding at some batch sizes, and prefill of long inputs.

    python benchmarks/kernels/bench_generate.py --csv generate.csv

The model has Llama 3.1 8B's shape and random weights (``generate_model.py``). Formats: bf16, torchmix, torchao's int4
weight-only (its default packing, and the one of tinygemm) and int8 dynamic; embedding and head stay bf16 in all of
them. A format that does not run is named with its reason. Decoding: a static cache, blocks compiled with
``torch.compile``, and the whole step, next token included, in one CUDA graph; ``--compile step`` leaves both to
``torch.compile(mode="reduce-overhead")``, which takes a compilation of all blocks per batch size. Prefill: batch 1,
compiled blocks. With ``--layers`` below 32 the table is about that smaller model; nothing is scaled.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from generate_model import (
    LLAMA_8B,
    State,
    compile_model,
    decode,
    formats,
    new_state,
    prefill,
    random_llama,
)
from kernel_peers import missing_kernel, mix_name, parse_mix
from kernel_results import conditions, write_rows
from kernel_targets import MIXED
from kernel_timing import capture, use_side_stream
from transformers import LlamaForCausalLM

TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError)
LONGEST_NOTE = 200
Row = dict[str, Any]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    names = tuple(formats(parse_mix(MIXED)))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers", type=int, default=LLAMA_8B["num_hidden_layers"], help="blocks of the model"
    )
    parser.add_argument("--formats", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--batches", type=_numbers, default=(1, 8, 32, 64), help="batch sizes of decoding")
    parser.add_argument("--prompts", type=_numbers, default=(2048, 8192), help="tokens of prefill")
    parser.add_argument(
        "--context", type=int, default=256, help="length of the cache in decoding (default: 256)"
    )
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded per sequence (default: 64)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", choices=("blocks", "step", "none"), default="blocks")
    parser.add_argument("--row-bits", type=parse_mix, default=parse_mix(MIXED), help=f"default: {MIXED}")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), help="start no format after so long"
    )
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--commit", help="version for the CSV, where the code runs outside its repository")
    options = parser.parse_args(arguments)
    options.formats = options.formats.split(",")
    unknown = [name for name in options.formats if name not in names]
    if unknown:
        parser.error(f"--formats {','.join(unknown)}: not among {','.join(names)}")
    if min(options.layers, options.repeats, options.steps) < 1 or options.steps >= options.context:
        parser.error("--layers, --repeats and --steps must be at least 1, and --steps below --context")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; --device cpu --tiny tries the benchmark out")
    return options


class Bench:
    """Measures format after format; :attr:`rows` has everything so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows = options, []
        self._cuda = options.device == "cuda"

    def run(self) -> None:
        """All formats, one after another, so that only one model is in memory."""
        started = time.perf_counter()
        for name in self.options.formats:
            if time.perf_counter() - started > self.options.max_seconds:
                self._add(name, note=f"not run: --max-seconds {self.options.max_seconds:g} are over")
                continue
            self.format(name)
            torch._dynamo.reset()
            self._free()

    def format(self, name: str) -> None:
        """One format: decoding at every batch size, then prefill of every length."""
        try:
            model = self._model(name)
        except FAILURES as error:
            self._add(name, note=self._reason(error))
            return
        self._free()
        weights = torch.cuda.memory_allocated() if self._cuda else 0
        measures = [("decode", n, self.decoding) for n in self.options.batches]
        measures += [("prefill", n, self.prefilling) for n in self.options.prompts]
        for what, number, measure in measures:
            if self._cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                batch, tokens, seconds = measure(model, number)
            except FAILURES as error:
                batch, tokens = (number, 1) if what == "decode" else (1, number)
                self._add(name, what, batch, tokens, weights=weights, note=self._reason(error))
                continue
            self._add(name, what, batch, tokens, seconds, weights)

    def decoding(self, model: LlamaForCausalLM, batch: int) -> tuple[int, int, float]:
        """Batch, tokens of a step, and seconds of a step."""
        state = new_state(model, batch, 1, self.options.context)
        start = self.options.context - self.options.steps
        step = self._step(model, state)
        seconds = []
        for _ in range(self.options.repeats):
            state.positions.fill_(start)
            seconds.append(self._seconds(lambda: [step() for _ in range(self.options.steps)]))
        return batch, 1, median(seconds) / self.options.steps

    def prefilling(self, model: LlamaForCausalLM, tokens: int) -> tuple[int, int, float]:
        """Batch, tokens, and seconds until the first new token's logits."""
        state = new_state(model, 1, tokens, tokens)
        for _ in range(2):
            _check(prefill(model, state))
        seconds = [self._seconds(lambda: prefill(model, state)) for _ in range(self.options.repeats)]
        return 1, tokens, median(seconds)

    def _model(self, name: str) -> LlamaForCausalLM:
        """The model in one format, compiled where blocks are."""
        missing = missing_kernel(self.options.device) if name.startswith("torchmix") else None
        if missing:
            raise RuntimeError(missing)
        torch.manual_seed(0)
        changes = TINY if self.options.tiny else {}
        model = random_llama(self.options.layers, self.options.device, **changes)
        formats(self.options.row_bits)[name](model)
        if self.options.compile == "blocks":
            compile_model(model)
        return model

    def _step(self, model: LlamaForCausalLM, state: State) -> Callable[[], object]:
        """One decoding step as a function without arguments, compiled and captured as asked for."""

        def step() -> torch.Tensor:
            return decode(model, state)

        if self.options.compile == "step":
            for tensor in (
                state.tokens,
                state.positions,
                *(t for c in state.caches for t in (c.keys, c.values)),
            ):
                torch._dynamo.mark_static_address(tensor)
            compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
            for _ in range(3):  # compiles, warms up, records
                _check(compiled())
            return compiled
        for _ in range(2):
            _check(step())
        if not self._cuda:
            return step
        torch.cuda.synchronize()
        graph, _ = capture(lambda number: step(), 1, 1)
        return graph.replay

    def _seconds(self, work: Callable[[], object]) -> float:
        """Seconds of some work, on the device where there is one."""
        if not self._cuda:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _add(
        self,
        name: str,
        what: str = "",
        batch: int = 0,
        tokens: int = 0,
        seconds: float | None = None,
        weights: int = 0,
        note: str = "",
    ) -> None:
        """One row, printed and written at once."""
        rate = batch * tokens / seconds if seconds else None
        baseline = [
            row["tokens_per_second"]
            for row in self.rows
            if (row["format"], row["what"], row["batch"], row["tokens"]) == ("bf16", what, batch, tokens)
        ]
        row = {
            "format": f"{name} {mix_name(self.options.row_bits)}" if name.startswith("torchmix") else name,
            "blocks": f"{self.options.layers} of {LLAMA_8B['num_hidden_layers']}",
            "what": what,
            "batch": batch,
            "tokens": tokens,
            "milliseconds": seconds * 1e3 if seconds else None,
            "tokens_per_second": rate,
            "ratio": rate / baseline[0]
            if rate and baseline and baseline[0]
            else 1.0
            if rate and name == "bf16"
            else None,
            "weights_gb": weights / 1e9 if weights else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if self._cuda and seconds else None,
            "note": note,
        }
        self.rows.append(row)
        print(line(row), flush=True)
        if self.options.csv is not None:
            shared = {
                "model": "tiny" if self.options.tiny else "Llama 3.1 8B shape",
                "context": self.options.context,
                "compile": self.options.compile,
                **conditions(self.options.device, self.options.commit),
            }
            write_rows([{**row, **shared} for row in self.rows], self.options.csv)

    def _reason(self, error: BaseException) -> str:
        """One line about a failure. Ends the run where the device does not answer any more."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_NOTE]
        if self._cuda:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                raise SystemExit(
                    f"the device fails after {text}; what was measured before is written"
                ) from error
        return text

    def _free(self) -> None:
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()


def header(options: argparse.Namespace) -> str:
    """What the table is about, and the names of its columns."""
    whole = LLAMA_8B["num_hidden_layers"]
    lines = ["tiny model: figures mean nothing"] if options.tiny else []
    if options.layers != whole:
        lines.append(
            f"{options.layers} of {whole} blocks: these are times and memory of the smaller model, nothing is scaled"
        )
    columns = {name: name for name in ("format", "blocks", "what", "batch", "tokens", "note")}
    columns |= {"milliseconds": "ms", "tokens_per_second": "tokens/s", "ratio": "x bf16"}
    columns |= {"weights_gb": "GB", "peak_gb": "peak GB", "note": ""}
    return "\n".join([*lines, line(columns)])


def line(row: Row) -> str:
    """One row of the printed table."""

    def number(name: str, digits: int) -> str:
        value = row[name]
        return value if isinstance(value, str) else "-" if value is None else f"{value:.{digits}f}"

    return (
        f"{row['format']:<22} {row['blocks']:<8} {row['what']:<8} {row['batch']:>5} {row['tokens']:>6} "
        f"{number('milliseconds', 3):>10} {number('tokens_per_second', 1):>10} {number('ratio', 2):>6} "
        f"{number('weights_gb', 2):>6} {number('peak_gb', 2):>7}  {row['note']}"
    ).rstrip()


def _check(logits: torch.Tensor) -> None:
    """Raise ``RuntimeError`` for logits that are no numbers."""
    if not bool(torch.isfinite(logits).all()):
        raise RuntimeError("wrong result: logits are not finite")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(",") if part)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers like 1,8,32") from error
    if any(number < 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers must be positive")
    return numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    if options.device == "cuda":
        use_side_stream()
    print(header(options), flush=True)
    with torch.no_grad():
        Bench(options).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
