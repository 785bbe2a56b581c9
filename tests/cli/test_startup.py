"""torchmix's own warnings are shown, those of other packages are not."""

from __future__ import annotations

import logging
import warnings

import pytest

from torchmix.cli.startup import package_version, start, torchmix_version


def warn_as(module: str, text: str) -> None:
    """A warning that seems to come from a module."""
    warnings.warn_explicit(text, UserWarning, "file.py", 1, module=module)


@pytest.mark.parametrize("quiet", [False, True])
def test_own_warnings_are_one_line_and_others_are_silent(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loggers = [logging.getLogger(name) for name in ("torchmix", "torchao", "torch.utils._pytree")]
    for logger in loggers:
        for name in ("level", "propagate", "handlers"):
            monkeypatch.setattr(logger, name, getattr(logger, name))
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        start(quiet=quiet)
        start(quiet=quiet)  # a second time changes nothing
        warn_as("torchmix.config", "something\n was left out")
        warn_as("transformers.generation", "an annoyance")
        logging.getLogger("torchmix.config").warning("layer %s: fallback", "a")
        logging.getLogger("torchao").warning("Failed to load")
        logging.getLogger("torch.utils._pytree").warning("is deprecated")
    expected = (
        []
        if quiet
        else [
            "torchmix: warning: something was left out",
            "torchmix: warning: layer a: fallback",
        ]
    )
    assert capsys.readouterr().err.splitlines() == expected


def test_versions_need_no_import() -> None:
    assert package_version("torch")
    assert package_version("no-such-package") is None
    assert torchmix_version()
