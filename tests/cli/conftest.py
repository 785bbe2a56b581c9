"""What the command line's tests share: a tiny model with a tokenizer, texts, and a way to run commands."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers.utils import logging as transformers_logging

from tests.saved_model import save_tiny_model
from torchmix.cli import main
from torchmix.cli.startup import THIRD_PARTIES

SENTENCES = (
    "A river is a natural stream of water. ",
    "The library holds nine thousand books; few are read. ",
    "In 1912 the bridge was rebuilt with stone from the old mill! ",
    "Snow fell on the town for three days, and no train came. ",
)


VARIABLES = (
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_VERBOSITY",
    "TRANSFORMERS_VERBOSITY",
    "TOKENIZERS_PARALLELISM",
    "OMP_WAIT_POLICY",
)


class Outcome(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def text(seed: int, length: int) -> str:
    """Sentences in an order that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(SENTENCES), (length // 30,), generator=generator).tolist()
    return "".join(SENTENCES[pick] for pick in picks)[:length]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny model; do not change it."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text of 4000 bytes."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text(text(0, 4000), encoding="utf-8")
    return path


@contextmanager
def restored_logging() -> Iterator[None]:
    """Undo what the command line changes in a process: loggers and bars of other packages."""
    loggers = [logging.getLogger(name) for name in ("torchmix", *THIRD_PARTIES, "torch.utils._pytree")]
    before = [(logger, logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    environment = {name: os.environ.get(name) for name in VARIABLES}
    transformers_logging.disable_progress_bar()  # a process of its own does it through the environment
    try:
        with warnings.catch_warnings():
            yield
    finally:
        transformers_logging.enable_progress_bar()
        for logger, level, propagate, handlers in before:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers[:] = handlers
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@pytest.fixture(scope="session")
def call() -> Callable[..., int]:
    """Run a command in this process; returns its exit code."""

    def call_command(*arguments: object) -> int:
        with restored_logging():
            return main([str(argument) for argument in arguments])

    return call_command


@pytest.fixture
def run(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command in this process; returns exit code, stdout and stderr."""

    def run_command(*arguments: object) -> Outcome:
        capsys.readouterr()
        return Outcome(call(*arguments), *capsys.readouterr())

    return run_command
