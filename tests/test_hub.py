"""The hub is asked once, briefly, and only for what can be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchmix.hub import HUB_SECONDS, why_unreachable

pytest.importorskip("huggingface_hub")


class Session:
    """HTTP client of the hub that notes requests, and answers them or not."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.requests: list[tuple[str, float]] = []

    def head(self, url: str, timeout: float) -> None:
        self.requests.append((url, timeout))
        if self.error is not None:
            raise self.error


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    """Stands for the network."""
    session = Session()
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    return session


def test_one_request_with_a_time_limit(session: Session) -> None:
    assert why_unreachable("org/model") == ""
    session.error = OSError("Name or service not known")
    assert why_unreachable("org/model") == "https://hub.example: Name or service not known"
    session.error = TimeoutError()
    assert why_unreachable("gpt2") == "https://hub.example: TimeoutError"
    assert session.requests == [("https://hub.example", HUB_SECONDS)] * 3
    assert HUB_SECONDS <= 5


def test_the_hub_is_not_asked_for_what_cannot_be_there(session: Session, tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "missing", str(tmp_path), "./missing", "a/b/c", "~/model", ""):
        assert why_unreachable(name) == ""
    assert not session.requests


def test_offline_mode_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.utils._http._GLOBAL_CLIENT", None)
    assert "offline mode" in why_unreachable("org/model").lower()
