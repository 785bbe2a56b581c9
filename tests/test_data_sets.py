"""Token samples from ``datasets``: objects, local files, and names on the hub (not reached here)."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from torchmix.data import token_batches

CHAT = [{"role": "user", "content": "Which fox?"}, {"role": "assistant", "content": "The brown one."}]


class ByteTokenizer:
    """Bytes as token ids, 256 as end of text; a chat is its contents, one per line."""

    eos_token_id = 256

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, token_ids: Any) -> str:
        return bytes(token for token in token_ids if token < 256).decode()

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        return "".join(message["content"] + "\n" for message in messages)


def stream_of(data: Any, tokenizer: Any = None) -> list[int]:
    """Every token of the data: windows of one token, all of them."""
    sample = token_batches(data, tokenizer, num_samples=10**6, sequence_length=1)
    return sample.input_ids.flatten().tolist()


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, and a hub that answers."""
    monkeypatch.setattr("torchmix.data_sets.why_unreachable", lambda name: "")
    return pytest.importorskip("datasets")


def test_objects(datasets, tokenizer):
    texts = datasets.Dataset.from_dict({"text": ["One fox.", "Two dogs."]})
    expected = stream_of(["One fox.", "Two dogs."], tokenizer)
    assert stream_of(texts, tokenizer) == expected
    assert stream_of(datasets.DatasetDict(test=texts.select([0]), train=texts), tokenizer) == expected
    assert stream_of(texts.to_iterable_dataset(), tokenizer) == expected
    chats = datasets.Dataset.from_list([{"messages": CHAT}])
    assert stream_of(chats, tokenizer) == list(b"Which fox?\nThe brown one.\n")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]})
    assert stream_of(rows) == stream_of(rows.with_format("torch")) == stream_of(rows.with_format("numpy"))


def test_local_files_and_directories(datasets, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = datasets.Dataset.from_dict({"text": ["One fox.", "Two dogs."]})
    texts.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=texts).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "plain").mkdir()
    texts.to_parquet(str(tmp_path / "plain" / "train.parquet"))
    expected = stream_of(["One fox.", "Two dogs."], tokenizer)
    for name in ("saved", "splits", "plain", "plain/train.parquet"):
        assert stream_of(tmp_path / name, tokenizer) == expected, name


@pytest.mark.parametrize(
    "name, arguments",
    [("wikitext:wikitext-2", ("wikitext", "wikitext-2")), ("org/set", ("org/set", None))],
)
def test_names_are_streamed_unless_offline(datasets, tokenizer, monkeypatch, name, arguments):
    calls = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "One fox."}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for offline in (False, True):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        assert stream_of(name, tokenizer) == list(b"One fox.")
    assert calls == [(arguments, {"split": "train", "streaming": streaming}) for streaming in (True, False)]


@pytest.mark.parametrize("kind", [ConnectionError, ValueError])
def test_a_name_out_of_reach(datasets, tokenizer, monkeypatch, kind):
    def load_dataset(*args: Any, **options: Any) -> None:
        raise kind("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = FileNotFoundError if kind is ConnectionError else ValueError
    with pytest.raises(expected, match=r"'org/set'.*no route.*local \.txt or \.jsonl.*HF_HUB_OFFLINE"):
        stream_of("org/set", tokenizer)


def test_a_hub_that_does_not_answer_is_not_waited_for(datasets, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("torchmix.data_sets.why_unreachable", lambda name: asked.append(name) or "no route")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("waited for the hub"))
    with pytest.raises(
        FileNotFoundError,
        match=r"'org/set:part'.*no such file.*no route.*local \.txt or \.jsonl.*HF_HUB_OFFLINE",
    ):
        stream_of("org/set:part", tokenizer)
    assert asked == ["org/set"]


def test_without_the_package(tokenizer, monkeypatch):
    real_import = builtins.__import__

    def no_datasets(name: str, *args: Any, **options: Any) -> Any:
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real_import(name, *args, **options)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(ImportError, match=r"'org/set' needs a package: pip install.*\.txt or \.jsonl"):
        stream_of("org/set", tokenizer)
