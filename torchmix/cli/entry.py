"""The command ``torchmix``: arguments in, exit code out, every error one line on stderr.

Exit codes: 0 done; 1 something failed (no memory, no space, a bug); 2 the input cannot be used; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from torchmix.cli import demo, env, evaluate, inspect, plan, quantize
from torchmix.cli.formatting import HelpFormatter, one_line
from torchmix.cli.startup import torchmix_version

DEBUG_VARIABLE = "TORCHMIX_DEBUG"
COMMANDS = (demo, plan, quantize, evaluate, inspect, env)
USER_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

DESCRIPTION = """\
Make a language model smaller: torchmix stores each row (output feature) of each linear layer with as many bits
as that row needs, 3 to 8, so that the whole model meets the size you ask for.
"""

EPILOG = """\
examples, from a first look to a smaller model:
  torchmix demo                                                    what it does, on a small bundled model
  torchmix plan MODEL --bits 4.5                                   how large MODEL would become; changes nothing
  torchmix quantize MODEL --data notes.txt --bits 4.5 --output small
  torchmix evaluate small --data other.txt --reference MODEL       what was lost
  torchmix inspect small                                           what is in the directory

'torchmix COMMAND --help' explains the flags of a command and ends with examples.
TORCHMIX_DEBUG=1 (or --debug) shows a full traceback where something fails.
"""


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with exit code 2."""
        _print_error(f"{message} (see: {self.prog} --help)")
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="torchmix", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"torchmix {torchmix_version()}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command_parser = command.add_parser(commands)
        command_parser.set_defaults(run=command.run)
        command_parser.add_argument(
            "--debug", action="store_true", help="show the full traceback where something fails"
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; by default those of the process.

    Returns:
        The exit code.
    """
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as leave:  # --help, --version, or an error that was printed
        return int(leave.code or 0)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        _print_error("interrupted; nothing was written under the output's name", kind="note")
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 (the last line of defence: no traceback for a user)
        return _report(error, options.debug)


def _report(error: Exception, debug: bool) -> int:
    """Print an error; returns the exit code."""
    if debug or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        traceback.print_exception(error)
    expected = isinstance(error, USER_ERRORS)
    hint = "" if expected or isinstance(error, OSError) else f" ({DEBUG_VARIABLE}=1 shows where)"
    _print_error(describe(error) + hint)
    return 2 if expected else 1


def describe(error: Exception) -> str:
    """An error in one line: what happened, without Python's own decoration."""
    if isinstance(error, OSError) and error.strerror:
        files = ", ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return one_line(f"{files}: {error.strerror}" if files else error.strerror)
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        return one_line(
            f"out of memory: {error}; use fewer or shorter samples (--samples, --sequence-length), or --dtype bfloat16"
        )
    text = one_line(str(error))
    return text if isinstance(error, USER_ERRORS) and text else f"{type(error).__name__}: {text}"


def _print_error(text: str, kind: str = "error") -> None:
    print(f"torchmix: {kind}: {text}", file=sys.stderr, flush=True)
