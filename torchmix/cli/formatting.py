"""Numbers, tables and help texts for people."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Mapping, Sequence

MAX_WIDTH = 110
_UNITS = ("B", "kB", "MB", "GB", "TB")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions and examples as they are written; flags beside their explanations."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
        super().__init__(prog, max_help_position=30, width=width)


def one_line(text: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(text.split())


def format_bytes(count: int) -> str:
    """A size in decimal units with three digits: 5963208 -> "5.96 MB"."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 else max(0, 2 - (value >= 9.995) - (value >= 99.95))
    return f"{value:.{digits}f} {_UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """A duration: "0.31 s", "12.4 s", "2:05" (minutes), "1:02:05"."""
    if seconds < 9.95:
        return f"{seconds:.2f} s"
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_number(value: float | None, digits: int) -> str:
    """A number with fixed digits, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of text under headers and a rule.

    Args:
        headers: one text per column.
        rows: cells, already formatted.
        left: this many first columns are aligned left, the others right.
    """
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    aligned = [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in aligned)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Lines of a name and its value, the values below each other."""
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in pairs)


def name_pattern(name: str) -> str:
    """A parameter's name with the numbers between dots as stars: layers of one kind share it."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)


def row_counts(rows_per_bits: Mapping[int, int], widths: Sequence[int]) -> list[str]:
    """One cell per width: the number of rows, "." where there are none."""
    return [f"{rows_per_bits[bits]:,}" if rows_per_bits.get(bits) else "." for bits in widths]
