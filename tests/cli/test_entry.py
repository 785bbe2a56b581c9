"""Exit codes, one-line errors, help that comes without torch."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from torchmix.cli import entry, env
from torchmix.cli.entry import build_parser, describe, main

ROOT = Path(__file__).parents[2]


def test_help_answers_without_importing_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "torchmix", "--help"]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "torchmix demo" in result.stdout
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "torchmix.cli.entry" in modules
    assert not modules & {"torch", "torchao", "transformers", "numpy"}


def test_a_command_in_a_process_of_its_own_prints_no_noise(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchmix", "plan", str(tiny_model), "--bits", "4.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "size on disk" in result.stdout
    assert result.stderr == ""
    assert not list(tmp_path.iterdir()), "plan writes nothing"


@pytest.mark.parametrize("command", ["demo", "plan", "quantize", "evaluate", "inspect", "env"])
def test_each_help_ends_with_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    examples = text.partition("examples:\n")[2].strip().splitlines()
    assert examples, f"{command} --help has no examples"
    for example in examples:
        words = example.split("  ")[1 if example.startswith("  ") else 0].replace("'", "").split()
        options = build_parser().parse_args(words[1:])
        assert words[0] == "torchmix"
        assert options.command == command


def test_every_flag_is_explained() -> None:
    for action in build_parser()._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        silent = [flag.dest for flag in action._actions if not flag.help]
        assert not silent, f"{action.prog}: no help for {silent}"


def test_version_and_no_command(run: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("torchmix ")
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["plan"], ["plan", "m", "--bits", "many"], ["env", "--what"]]
)
def test_unusable_arguments_are_one_line_and_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("torchmix: error: ")
    assert captured.err.count("\n") == 1
    assert "--help" in captured.err


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ValueError("layer x\n  is wrong"), 2, "layer x is wrong"),
        (TypeError("dtype int8"), 2, "dtype int8"),
        (FileNotFoundError("a: no such file"), 2, "a: no such file"),
        (PermissionError(errno.EACCES, "no permission", "dir"), 2, "dir: no permission"),
        (OSError(errno.ENOSPC, "no space", "disk"), 1, "disk: no space"),
        (RuntimeError("it broke"), 1, "RuntimeError: it broke (TORCHMIX_DEBUG=1 shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(
    error: BaseException,
    code: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(options: Namespace) -> int:
        raise error

    monkeypatch.setattr(env, "run", fail)
    monkeypatch.delenv(entry.DEBUG_VARIABLE, raising=False)
    assert main(["env"]) == code
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("way", ["flag", "variable"])
def test_debug_shows_the_traceback(
    way: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Namespace) -> int:
        raise ValueError("wrong")

    monkeypatch.setattr(env, "run", fail)
    if way == "variable":
        monkeypatch.setenv(entry.DEBUG_VARIABLE, "1")
    assert main(["env", *(["--debug"] if way == "flag" else [])]) == 2
    message = capsys.readouterr().err
    assert "Traceback" in message
    assert "torchmix: error: wrong" in message


def test_out_of_memory_says_what_to_do() -> None:
    assert "--sequence-length" in describe(RuntimeError("CUDA out of memory. Tried to allocate"))
    assert "--sequence-length" in describe(MemoryError())
