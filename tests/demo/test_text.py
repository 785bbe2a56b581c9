"""The demo's text and model: disjoint, repeatable, complete, and clear when something is missing."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest

from torchmix.demo import demo_model_directory, demo_texts
from torchmix.demo import text as demo_text_module
from torchmix.demo.text import split_topics


def word_runs(text: str, length: int = 13) -> set[tuple[str, ...]]:
    """All runs of `length` words; sharing one is the usual sign of contamination."""
    words = text.split()
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_topics_are_dealt_alternately_and_paragraphs_used_once() -> None:
    topics = {"c": "third\n\nsame  words\nhere", "a": "first\n\nsame words here", "b": "second\n \n first"}
    assert split_topics(topics) == ("first\n\nsame words here\n\nthird", "second")


def test_halves_are_long_repeatable_and_disjoint() -> None:
    texts = demo_texts()
    assert texts == demo_texts()
    assert min(len(texts.calibration), len(texts.evaluation)) > 100_000, "enough for a demo"
    evaluation = word_runs(texts.evaluation)
    shared = len(evaluation & word_runs(texts.calibration)) / len(evaluation)
    assert shared < 0.01, f"{shared:.1%} of the evaluation text's 13-word runs stand in the calibration text"


def test_missing_documentation_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"pydoc_data\.topics.*--data FILE"):
        demo_texts()


def test_missing_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text_module.resources, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="install torchmix again"):
        demo_model_directory()


def test_model_folder_is_the_one_its_card_describes() -> None:
    directory = demo_model_directory()
    card = (directory / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert digest in card
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (directory / name).is_file(), f"{name} is missing"
