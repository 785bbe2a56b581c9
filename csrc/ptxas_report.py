"""Build step, part 3: read what ``ptxas -v`` says about each kernel: registers, spills, shared memory."""

from __future__ import annotations

import re
import shutil
import subprocess

_NOTE = re.compile(r"^\s*(ptxas info\b|\d+ bytes stack frame|\d+ bytes gmem)")
_ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def without_notes(output: str) -> str:
    """The compiler's output without the notes about resources: warnings and errors."""
    return "\n".join(line for line in output.splitlines() if not _NOTE.match(line))


def kernel_lines(output: str) -> list[str]:
    """One line per kernel and architecture: registers, bytes spilled, static shared memory, name.

    ptxas prints in this order: the entry, its stack frame and spills, its registers and shared memory.
    """
    lines: list[str] = []
    name = arch = spills = ""
    for line in output.splitlines():
        if entry := _ENTRY.search(line):
            name, arch, spills = entry["name"], entry["arch"], ""
        elif found := _SPILLS.search(line):
            stack, stores, loads = found.groups()
            spills = "no spills" if stores == loads == "0" else f"SPILLS {stores} B stored, {loads} B loaded"
            spills += "" if stack == "0" else f", stack {stack} B"
        elif name and (used := _REGISTERS.search(line)):
            shared = _SHARED.search(line)
            memory = f"{shared[1]} B shared" if shared else "no static shared"
            lines.append(f"{arch}: {used[1]} registers, {spills}, {memory}: {name}")
            name = ""
    return _readable(sorted(lines))


def _readable(lines: list[str]) -> list[str]:
    """The lines with C++ names instead of symbols, where a program for that is there."""
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None or not lines:
        return lines
    result = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=False)
    return result.stdout.splitlines() if result.returncode == 0 else lines
