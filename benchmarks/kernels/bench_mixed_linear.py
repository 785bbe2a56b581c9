"""Speed of the mixed-precision linear kernels and of their peers, in one run and one table.

    python benchmarks/kernels/bench_mixed_linear.py --csv mixed_linear.csv

Measured: torchmix without and with activation quantization, bf16 (cuBLAS), ``torch._scaled_mm`` fp8 by tensor and by
row, ``torch._int_mm``, tinygemm up to 16 tokens; Marlin and the read floor are stored numbers. Every result is checked
against a float32 product. A peer that fails is named with its reason; the others go on. Method: ``kernel_timing.py``.
The last table says which targets are met (``kernel_targets.py``). A part of the work: ``--quick``, ``--shapes``,
``--tokens``, ``--peers``, ``--row-bits``, ``--max-seconds``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kernel_peers import (
    ACTIVATIONS,
    LARGEST_ERROR,
    PEERS,
    Layer,
    Operands,
    activation_codes,
    missing_kernel,
    mix_name,
    our_layers,
    parse_mix,
    random_input,
    random_weight,
    relative_error,
    wrong_codes,
)
from kernel_results import (
    OURS,
    OURS_WITH_ACTIVATION,
    Cell,
    activation_table,
    conditions,
    read_floor_us,
    shape_table,
    stored_cells,
    with_ratios,
    write_cells,
)
from kernel_targets import ALL_8, MIXED, SHAPES, TOKENS, summary
from kernel_timing import Timer, interleave, make_timer, microseconds, num_copies, use_side_stream, warm_up
from torch import Tensor

OUR_PEERS = (OURS, OURS_WITH_ACTIVATION)
ALL_PEERS = (*OUR_PEERS, *PEERS, *ACTIVATIONS)
QUICK = {
    "shapes": ((4096, 4096), (28672, 4096)),
    "tokens": (1, 16, 64, 128, 1024),
    "row_bits": (parse_mix(MIXED),),
    "repeats": 3,
}
FULL = {"shapes": SHAPES, "tokens": TOKENS, "row_bits": (parse_mix(MIXED), parse_mix(ALL_8)), "repeats": 5}
FAST_OPERATIONS = 1500e12  # per second; no peer is faster, so that graphs are never too long
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError)
LONGEST_NOTE = 200


@dataclass
class Entry:
    """One line of a shape's table: a peer (and mix) with its layer, or the reason why there is none."""

    peer: str
    row_bits: str = ""
    layer: Layer | None = None
    reason: str = ""
    copies: list[Operands] = field(default_factory=list)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line; what is not given comes from ``--quick`` or the full table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", type=_shapes, help="NxK,NxK,... (default: layers of Llama 3.1 8B and 70B)"
    )
    parser.add_argument("--tokens", type=_tokens, help=f"M,M,... (default: {_list(TOKENS)})")
    parser.add_argument("--peers", type=_peers, default=ALL_PEERS, help=f"some of {_list(ALL_PEERS)}")
    parser.add_argument(
        "--row-bits",
        nargs="+",
        type=_mix,
        metavar="MIX",
        help=f"percent of rows at each width (default: {MIXED} and {ALL_8}), for example 5:50,3:50 6",
    )
    parser.add_argument("--repeats", type=int, help="recorded rounds over all peers (default: 5)")
    parser.add_argument("--quick", action="store_true", help="two shapes, five numbers of tokens, one mix")
    parser.add_argument(
        "--max-seconds", type=float, default=float("inf"), help="start no shape after so long"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="write all cells here")
    parser.add_argument("--commit", help="version for the CSV, where the code runs outside its repository")
    options = parser.parse_args(arguments)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA device is available; --device cpu runs the references, to try the benchmark out"
        )
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    return options


class Bench:
    """Runs what was asked for; :attr:`cells` has everything measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.cells = options, []
        self.missing = missing_kernel(options.device)
        self._started = time.perf_counter()

    def run(self) -> None:
        """All shapes, then activation quantization alone by each op; a table each as soon as it is known."""
        for n, k in self.options.shapes:
            if time.perf_counter() - self._started > self.options.max_seconds:
                print(
                    f"N={n} K={k}: not run, --max-seconds {self.options.max_seconds:g} are over", flush=True
                )
                continue
            began, cells = time.perf_counter(), self.shape(n, k)
            took = time.perf_counter() - began
            print(f"{shape_table(cells)}\n  {took:.1f} s\n", flush=True)
        for name in (name for name in ACTIVATIONS if name in self.options.peers):
            print(activation_table(self.activation(name)), "\n", flush=True)

    def shape(self, out_features: int, in_features: int) -> list[Cell]:
        """All peers and tokens of one shape."""
        torch.manual_seed(self.options.seed)
        weight = random_weight(out_features, in_features, self.options.device)
        entries = self._entries(weight)
        cells: list[Cell] = []
        for tokens in self.options.tokens:
            x = random_input(tokens, in_features, self.options.device)
            cells += self._cells(entries, x, out_features)
        order = [(entry.peer, entry.row_bits) for entry in entries]
        cells.sort(key=lambda cell: order.index((cell.peer, cell.row_bits)))
        if self.options.device == "cuda":
            cells += stored_cells([(out_features, in_features)], self.options.tokens)
        del entries, weight
        self._free()
        cells = with_ratios(cells)
        self._keep(cells)
        return cells

    def activation(self, name: str) -> list[Cell]:
        """Activation quantization alone by one op, for each number of inputs among the shapes."""
        features = sorted({k for _, k in self.options.shapes})
        cells = [self._activation_cell(name, tokens, k) for k in features for tokens in self.options.tokens]
        self._keep(cells)
        return cells

    def write(self) -> None:
        """The CSV, where one was asked for."""
        if self.options.csv is None or not self.cells:
            return
        of_run = conditions(self.options.device, self.options.commit)
        write_cells(self.cells, self.options.csv, {**of_run, "repeats": str(self.options.repeats)})

    def _keep(self, cells: Sequence[Cell]) -> None:
        self.cells += cells
        self.write()

    def _entries(self, weight: Tensor) -> list[Entry]:
        """The peers' layers and their copies; a peer that cannot be built keeps its reason."""
        entries = []
        for name in (name for name in PEERS if name in self.options.peers):
            try:
                layer = PEERS[name].build(weight)
                entries.append(Entry(name, layer=layer, copies=_copies(layer)))
            except FAILURES as error:
                entries.append(Entry(name, reason=self._reason(error)))
        ours = [name for name in OUR_PEERS if name in self.options.peers]
        for mix in self.options.row_bits if ours else ():
            entries += self._our_entries(weight, mix, ours)
        return entries

    def _our_entries(self, weight: Tensor, mix: dict[int, float], names: Sequence[str]) -> list[Entry]:
        """torchmix with one mix of widths; all its entries share the copies."""
        text = mix_name(mix)
        if self.missing:
            return [Entry(name, text, reason=self.missing) for name in names]
        try:
            layers = our_layers(weight, mix)
            copies = _copies(layers[OURS])
        except FAILURES as error:
            reason = self._reason(error)
            return [Entry(name, text, reason=reason) for name in names]
        return [Entry(name, text, layers[name], copies=copies) for name in names]

    def _cells(self, entries: Sequence[Entry], x: Tensor, out_features: int) -> list[Cell]:
        """One number of tokens: check every peer, then time those that are right in turn."""
        tokens, in_features = x.shape
        cells: dict[tuple[str, str], Cell] = {}
        timers: dict[tuple[str, str], Timer] = {}
        for entry in entries:
            if entry.peer in PEERS and not PEERS[entry.peer].takes(tokens):
                continue
            key = entry.peer, entry.row_bits
            cells[key] = Cell(*key, out_features, in_features, tokens, note=entry.reason)
            if entry.layer is None:
                continue
            try:
                timer, error = _checked_timer(entry, x, out_features)
            except FAILURES as failure:
                cells[key] = _changed(cells[key], note=self._reason(failure))
                continue
            right = error <= LARGEST_ERROR
            note = "" if right else f"wrong result: relative error {error:.2g}; its time is not taken"
            weight_bytes = entry.layer.weight_bytes
            cells[key] = _changed(cells[key], relative_error=error, weight_bytes=weight_bytes, note=note)
            if right:
                timers[key] = timer
        for key, seconds in interleave(timers, self.options.repeats).items():
            cells[key] = _timed(cells[key], seconds)
        return list(cells.values())

    def _activation_cell(self, name: str, tokens: int, in_features: int) -> Cell:
        """Inputs and results rotate, so that neither stays in the L2 cache."""
        cell = Cell(name, "", 0, in_features, tokens)
        if self.missing:
            return _changed(cell, note=self.missing)
        try:
            x = random_input(tokens, in_features, self.options.device)
            quantized = ACTIVATIONS[name]
            moved = x.nbytes + sum(result.nbytes for result in quantized(x))
            inputs = [x, *(x.clone() for _ in range(num_copies(moved) - 1))]

            def launch(number: int) -> Operands:
                return quantized(inputs[number % len(inputs)])

            timer = make_timer(launch, len(inputs), moved / 4e12 + 2e-6, x.device, keep=len(inputs))
            no_code = torch.iinfo(timer.output[0].dtype).min  # in either layout it stands for -128
            timer.output[0].fill_(no_code)
            timer.enqueue()
            timer.seconds()  # waits
            wrong = wrong_codes(x, activation_codes(name, timer.output, x))
            seconds = interleave({"": timer}, self.options.repeats)[""]
        except FAILURES as error:
            return _changed(cell, note=self._reason(error))
        note = f"{wrong:.2%} of the codes differ from the reference" if wrong else ""
        return _timed(_changed(cell, weight_bytes=moved, relative_error=wrong, note=note), seconds)

    def _reason(self, error: Exception) -> str:
        """One line about a failure. Ends the run where the device does not answer any more."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_NOTE]
        if self.options.device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                raise SystemExit(
                    f"the device fails after {text}; what was measured before is written"
                ) from error
        return text

    def _free(self) -> None:
        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()


def _checked_timer(entry: Entry, x: Tensor, out_features: int) -> tuple[Timer, float]:
    """A timer of one peer on one input, and the relative error of what a replay wrote into poisoned memory."""
    layer, copies = entry.layer, entry.copies
    assert layer is not None, "an entry without a layer has nothing to time"
    operands = layer.activate(x)
    least = max(read_floor_us(layer.weight_bytes) / 1e6, 2.0 * x.numel() * out_features / FAST_OPERATIONS)

    def launch(number: int) -> Tensor:
        return layer.multiply(operands, copies[number % len(copies)])

    timer = make_timer(launch, len(copies), least, x.device)
    timer.output.fill_(float("nan") if timer.output.is_floating_point() else -(2**31))
    timer.enqueue()
    timer.seconds()  # waits
    error = relative_error(layer, operands, timer.output)
    return timer, error if error == error else float("inf")


def _copies(layer: Layer) -> list[Operands]:
    """The layer's weights and as many copies as keep them out of the L2 cache."""
    count = num_copies(layer.weight_bytes) if layer.weights[0].is_cuda else 1
    return [layer.weights, *(tuple(t.clone() for t in layer.weights) for _ in range(count - 1))]


def _changed(cell: Cell, **changes: object) -> Cell:
    return Cell(**{**cell.__dict__, **changes})


def _timed(cell: Cell, seconds: list[float]) -> Cell:
    middle, smallest, largest = microseconds(seconds)
    return _changed(cell, us=middle, us_min=smallest, us_max=largest)


def _list(values: Sequence[object]) -> str:
    return ",".join(map(str, values))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        shapes = tuple((int(n), int(k)) for n, k in (part.split("x") for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write shapes like 4096x4096,28672x4096") from error
    if any(n < 1 or k < 1 for n, k in shapes):
        raise argparse.ArgumentTypeError(f"{text!r}: shapes must be positive")
    return shapes


def _tokens(text: str) -> tuple[int, ...]:
    try:
        tokens = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers like 1,16,1024") from error
    if min(tokens) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: tokens must be positive")
    return tokens


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in ALL_PEERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{','.join(unknown)}: not among {','.join(ALL_PEERS)}")
    return names


def _mix(text: str) -> dict[int, float]:
    try:
        return parse_mix(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(arguments)
    gc.disable()  # a collection in the middle of a capture would free graphs
    if options.device == "cuda":
        use_side_stream()
        warm_up()
    bench = Bench(options)
    try:
        with torch.inference_mode():
            bench.run()
    finally:
        bench.write()
        gc.enable()
    print(summary(bench.cells))
    if options.csv is not None:
        print(f"{len(bench.cells)} cells in {options.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
