"""Layer 6: what ``torchmix demo`` works on: a small trained model and text that every Python has."""

from __future__ import annotations

from torchmix.demo.text import DemoText, demo_model_directory, demo_texts

__all__ = ["DemoText", "demo_model_directory", "demo_texts"]
