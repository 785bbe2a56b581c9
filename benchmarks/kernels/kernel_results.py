"""What the kernel benchmark knows of one cell (peer, shape, tokens), its limits, and how cells are written and shown.

Shapes: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch

STORED = Path(__file__).with_name("stored_times.csv")
BASELINE = "bf16"
OURS = "torchmix"
OURS_WITH_ACTIVATION = "torchmix+activation"
ACTIVATION = "quantize_activation"
PREPARED = "prepare_activation"  # the same, laid out as the kernels read it
MARLIN = "marlin_w4a16"
# Measured on an H200: int8 with two multiply-adds per accumulator and group, as group scales need them; plain int8.
GROUP_SCALED_TOPS, INT8_TOPS = 1390.0, 1890.0
PEAK_TOPS = {OURS: GROUP_SCALED_TOPS, OURS_WITH_ACTIVATION: GROUP_SCALED_TOPS, "int8_int_mm": INT8_TOPS}
COPY_BYTES_PER_SECOND = 3.97e12  # own copy kernel, 4 GiB, read and written bytes
MOST_MEMORY_BOUND_TOKENS = (
    64  # below this the read floor is the limit of peers whose compute limit is not known
)


@dataclass(frozen=True)
class Cell:
    """One measurement, or the reason why there is none.

    peer: name. row_bits: mix of row widths, "" for peers that have one. us, us_min, us_max: microseconds per launch,
    None without a measurement. weight_bytes: bytes of the weight as stored (of what is read and written for
    :data:`ACTIVATION` and :data:`PREPARED`). relative_error: of the result against the float32 product of the same
    operands. ratio: speed over :data:`BASELINE` in the same run. note: "stored" or the reason of a failure.
    """

    peer: str
    row_bits: str
    N: int
    K: int
    M: int
    us: float | None = None
    us_min: float | None = None
    us_max: float | None = None
    weight_bytes: int = 0
    relative_error: float | None = None
    ratio: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """Peer and mix in one word."""
        return f"{self.peer} {self.row_bits}".rstrip()

    @property
    def gbps(self) -> float | None:
        """Gigabytes of weight per second."""
        return self.weight_bytes / self.us / 1e3 if self.us else None

    @property
    def tflops(self) -> float | None:
        """Useful multiplications and additions, in 1e12 per second."""
        return 2e-6 * self.M * self.N * self.K / self.us if self.us and self.N else None

    @property
    def share_of_limit(self) -> float | None:
        """Measured limit over time: 1 is the limit. None where the limit is not known."""
        limit = limit_us(self)
        return limit / self.us if self.us and limit is not None else None


@cache
def stored_rows() -> tuple[dict[str, str], ...]:
    """Rows of ``stored_times.csv``."""
    lines = [line for line in STORED.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return tuple(csv.DictReader(lines))


def stored_cells(shapes: Iterable[tuple[int, int]], tokens: Iterable[int]) -> list[Cell]:
    """Marlin's stored times for these (N, K) and M, as far as there are any."""
    shapes, tokens = set(shapes), set(tokens)
    rows = [row for row in stored_rows() if row["what"] == MARLIN]
    keys = [(int(row["N"]), int(row["K"]), int(row["M"])) for row in rows]
    return [
        Cell(MARLIN, "", n, k, m, float(row["us"]), weight_bytes=int(row["bytes"]), note="stored")
        for row, (n, k, m) in zip(rows, keys, strict=True)
        if (n, k) in shapes and m in tokens
    ]


def read_floor_us(num_bytes: float) -> float:
    """Microseconds it takes to read so many bytes once; on straight lines between what was measured."""
    points = sorted((float(row["bytes"]), float(row["us"])) for row in stored_rows() if not row["M"])
    upper = next((i for i in range(1, len(points)) if num_bytes <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[upper - 1], points[upper]
    return y0 + (num_bytes - x0) * (y1 - y0) / (x1 - x0)


def limit_us(cell: Cell) -> float | None:
    """The larger of reading the weight and multiplying at the measured peak; None where that peak is not known."""
    if cell.peer in (ACTIVATION, PREPARED):
        return cell.weight_bytes / COPY_BYTES_PER_SECOND * 1e6
    peak = PEAK_TOPS.get(cell.peer)
    if peak is None and cell.M > MOST_MEMORY_BOUND_TOKENS:
        return None
    compute = 2e-6 * cell.M * cell.N * cell.K / peak if peak else 0.0
    return max(read_floor_us(cell.weight_bytes), compute)


def with_ratios(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with their speed over the baseline of the same shape and tokens, where both were measured."""
    baseline = {(c.N, c.K, c.M): c.us for c in cells if c.peer == BASELINE and c.us}
    return [
        replace(cell, ratio=base / cell.us)
        if cell.us and cell.N and (base := baseline.get((cell.N, cell.K, cell.M)))
        else cell
        for cell in cells
    ]


def write_cells(cells: Sequence[Cell], path: Path, conditions: dict[str, str]) -> None:
    """Write all cells as CSV, under a temporary name first.

    Args:
        cells: what was measured so far.
        path: the file; its folder is made.
        conditions: the same for all rows: device, versions, commit.
    """
    derived = ("gbps", "tflops", "share_of_limit")
    names = [*(field.name for field in fields(Cell)), *derived]
    write_rows([{**{name: getattr(cell, name) for name in names}, **conditions} for cell in cells], path)


def write_rows(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Write a table as CSV, under a temporary name first. The first row has all columns; None is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
    temporary.replace(path)


def shape_table(cells: Sequence[Cell]) -> str:
    """One shape: a line per peer with microseconds and speed over the baseline, a column per M.

    Lines of :data:`OURS` are followed by GB/s of weight, TFLOP/s and percent of the measured limit.
    """
    tokens = sorted({cell.M for cell in cells})
    lines = [f"N={cells[0].N} K={cells[0].K}", _line("us  x bf16", [f"M={m}" for m in tokens])]
    for name in dict.fromkeys(cell.name for cell in cells):
        of_peer = {cell.M: cell for cell in cells if cell.name == name}
        row = [of_peer.get(m) for m in tokens]
        lines.append(_line(name, [_speed(cell) for cell in row]))
        if _peer_of(row) == OURS:
            for what, scale in (("gbps", 1.0), ("tflops", 1.0), ("share_of_limit", 100.0)):
                values = [getattr(cell, what) if cell else None for cell in row]
                label = {"gbps": "GB/s", "tflops": "TFLOP/s", "share_of_limit": "% of limit"}[what]
                lines.append(_line(f"  {label}", [f"{v * scale:.0f}" if v else "-" for v in values]))
    return "\n".join([*lines, *_notes(cells)])


def activation_table(cells: Sequence[Cell]) -> str:
    """Activation quantization alone, by one op: microseconds and percent of the copy bandwidth."""
    tokens = sorted({cell.M for cell in cells})
    lines = [_line(f"{cells[0].peer}: us, % copy", [f"M={m}" for m in tokens])]
    for k in sorted({cell.K for cell in cells}):
        of_k = {cell.M: cell for cell in cells if k == cell.K}
        texts = [
            f"{c.us:.2f} {100 * (c.share_of_limit or 0):3.0f}%" if (c := of_k.get(m)) and c.us else "-"
            for m in tokens
        ]
        lines.append(_line(f"K={k}", texts))
    return "\n".join([*lines, *_notes(cells)])


def _peer_of(cells: Sequence[Cell | None]) -> str:
    """Peer of a line of the table."""
    return next((cell.peer for cell in cells if cell is not None), "")


def conditions(device: str, commit: str | None) -> dict[str, str]:
    """What every row of a CSV says of the run: device, PyTorch, and the version of the code.

    Args:
        device: "cuda" or "cpu".
        commit: version; by default TORCHMIX_COMMIT, or what is checked out.
    """
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "commit": commit or os.environ.get("TORCHMIX_COMMIT") or git_commit(),
    }


def git_commit() -> str:
    """The commit that is checked out, with a mark where files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or "unknown"


def _line(name: str, texts: Sequence[str]) -> str:
    return " ".join([f"{name:<29}", *(f"{text:>12}" for text in texts)]).rstrip()


def _speed(cell: Cell | None) -> str:
    if cell is None or not cell.us:
        return "-" if cell is None else "failed"
    ratio = f"{cell.ratio:.2f}x" if cell.ratio else ""
    return f"{cell.us:.{1 if cell.us < 1000 else 0}f} {ratio:>6}"


def _notes(cells: Sequence[Cell]) -> list[str]:
    """Each reason once, with the tokens it belongs to."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for cell in cells:
        if cell.us is None and cell.note:
            tokens = reasons.setdefault((cell.name, cell.note), [])
            tokens += [cell.M] if cell.M not in tokens else []
    return [f"  {name}, M={','.join(map(str, ms))}: {note}" for (name, note), ms in reasons.items()]


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
