"""Layer 6: the demo's model directory and its calibration and evaluation text.

The text is Python's own documentation (``pydoc_data.topics``, what ``help("topics")`` shows), so nothing
has to be downloaded or bundled. Its topics quote each other at length: a quarter of the 13-word runs of one
half would stand in the other if whole topics were dealt out. So every paragraph is used once, where it
appears first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path

_MODEL_NAME = "wiki-llama-5m"
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class DemoText:
    """Two texts that share no paragraph: one to calibrate on, one to measure on."""

    calibration: str
    evaluation: str


def demo_texts() -> DemoText:
    """Python's documentation in two disjoint halves, the same on every call.

    The content follows the interpreter's version, so numbers measured on it compare within one Python
    version only. Raises FileNotFoundError where the interpreter comes without ``pydoc_data.topics``.
    """
    try:
        topics: Mapping[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise FileNotFoundError(
            f"this Python has no pydoc_data.topics ({error}), the text that the demo works on; "
            "give a text file of your own with --data FILE"
        ) from error
    calibration, evaluation = split_topics(topics)
    return DemoText(calibration, evaluation)


def split_topics(topics: Mapping[str, str]) -> tuple[str, str]:
    """Deal the topics, sorted by name, alternately into two texts; a paragraph that came before is left out.

    topics: topic name -> text. Paragraphs are compared without regard to white space.
    """
    seen: set[str] = set()
    halves: tuple[list[str], list[str]] = ([], [])
    for index, name in enumerate(sorted(topics)):
        for paragraph in _BLANK_LINES.split(topics[name].strip("\n")):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                halves[index % 2].append(paragraph)
    return "\n\n".join(halves[0]), "\n\n".join(halves[1])


def demo_model_directory() -> Path:
    """The folder of the bundled model, in transformers' layout (config, safetensors weights, tokenizer).

    Raises FileNotFoundError where the installation lacks it.
    """
    directory = Path(str(resources.files("torchmix.demo"))) / _MODEL_NAME
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"the demo model is missing from this installation: {directory} has no config.json; "
            "install torchmix again, unpacked (not from inside a zip file)"
        )
    return directory
