"""Token samples from every kind of data, the windows drawn, and each error's way out."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchmix.data import READ_AHEAD, TokenSample, _starts, read_token_ids, token_batches

TEXT = "The quick brown fox jumps over the lazy dog. Grüße aus Köln!\r\nA second line, and a third.\n" * 20
CHAT = [{"role": "user", "content": "Which fox?"}, {"role": "assistant", "content": "The brown one."}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
CHAT_TEXT = "<user>Which fox?\n<assistant>The brown one.\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE of 300 entries with an end-of-text token (id 0) and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=16
    )
    fast.chat_template = TEMPLATE
    return fast


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def stream_of(data: Any, tokenizer: Any = None, **options: Any) -> list[int]:
    """Every token of the data: windows of one token, all of them."""
    sample = token_batches(data, tokenizer, num_samples=10**6, sequence_length=1, **options)
    return sample.input_ids.flatten().tolist()


class TestTokens:
    def test_rows_are_samples(self):
        rows = torch.arange(12).view(3, 4)
        sample = token_batches(rows, num_samples=3, sequence_length=4)
        assert torch.equal(sample.input_ids, rows)
        assert sample.preview is None
        assert (sample.num_samples, sample.sequence_length, sample.requested) == (3, 4, 3)
        assert sample.source == "token ids (3, 4): 3 rows, 12 tokens"
        assert sample.sha256 == hashlib.sha256(np.arange(12, dtype="<i8").tobytes()).hexdigest()

    def test_more_rows_than_asked_for_are_chosen_whole(self):
        rows = torch.arange(400).view(100, 4)
        sample = token_batches(rows, num_samples=5, sequence_length=4)
        first = sample.input_ids[:, 0]
        assert (first % 4 == 0).all()
        assert (first.diff() == 80).all()

    def test_rows_of_another_length_are_one_stream(self):
        sample = token_batches(torch.arange(12).view(3, 4), num_samples=9, sequence_length=5)
        assert sample.input_ids.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        assert (sample.num_samples, sample.requested) == (2, 9)

    def test_length_of_the_rows(self):
        rows = torch.arange(12).view(3, 4)
        assert torch.equal(token_batches(rows, num_samples=3, sequence_length=None).input_ids, rows)
        with pytest.raises(ValueError, match="unequal length need a sequence_length"):
            token_batches([rows[0], rows[1, :2]], num_samples=3, sequence_length=None)

    @pytest.mark.parametrize(
        "data",
        [
            torch.arange(8),
            list(range(8)),
            np.arange(8, dtype=np.uint16),
            [torch.arange(4), torch.arange(4, 8, dtype=torch.int32)],
            [[0, 1, 2], [3, 4, 5, 6, 7]],
            {"input_ids": torch.arange(8).view(2, 4)},
            [{"input_ids": [0, 1, 2, 3]}, {"input_ids": torch.tensor([4, 5, 6, 7])}],
            [{"input_ids": torch.arange(8), "text": "tokens come first"}],
            iter([torch.arange(4).view(1, 4), torch.arange(4, 8).view(1, 4)]),
            [(torch.arange(8).view(2, 4), torch.zeros(2, 4))],
        ],
    )
    def test_kinds_of_token_data(self, data):
        assert stream_of(data) == list(range(8))

    def test_masked_tokens_are_dropped(self):
        batch = {
            "input_ids": torch.tensor([[9, 9, 1, 2], [3, 4, 5, 9]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]),
        }
        assert stream_of(batch) == [1, 2, 3, 4, 5]

    def test_data_loader_and_global_random_state(self):
        rows = torch.arange(40).view(10, 4)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=3)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        sample = token_batches(loader, num_samples=10, sequence_length=4)
        assert torch.equal(sample.input_ids, rows)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]

    def test_endless_data_is_read_no_further_than_needed(self):
        taken = []

        def endless():
            while True:
                taken.append(1)
                yield torch.arange(8)

        sample = token_batches(endless(), num_samples=2, sequence_length=4)
        assert sample.num_samples == 2
        assert len(taken) == READ_AHEAD * 2 * 4 // 8 + 1
        assert sample.source.endswith("the rest not read")


class TestText:
    def test_list_of_texts_with_end_of_text_between(self, tokenizer):
        eos = tokenizer.eos_token_id
        expected = [*ids_of(tokenizer, "One fox."), eos, *ids_of(tokenizer, "Two dogs.")]
        assert stream_of(["One fox.", "", "Two dogs."], tokenizer) == expected
        assert stream_of(["One fox.<|endoftext|>", "Two dogs."], tokenizer) == expected

    def test_no_separator_without_end_of_text(self, tokenizer):
        plain = copy.deepcopy(tokenizer)
        plain.eos_token = None
        expected = ids_of(tokenizer, "One fox.") + ids_of(tokenizer, "Two dogs.")
        assert stream_of(["One fox.", "Two dogs."], plain) == expected

    def test_preview_is_the_first_sample(self, tokenizer):
        sample = token_batches([TEXT], tokenizer, num_samples=1, sequence_length=400)
        assert sample.preview == tokenizer.decode(sample.input_ids[0])[:200]
        assert len(sample.preview) == 200
        assert sample.source.startswith("list of 1: 1 documents, ")

    @pytest.mark.parametrize(
        "data",
        [
            CHAT,
            [CHAT],
            [{"messages": CHAT}],
            {"messages": CHAT},
            [{"prompt": CHAT[:1], "completion": CHAT[1:]}],
        ],
    )
    def test_chats_go_through_the_template(self, tokenizer, data):
        assert stream_of(data, tokenizer) == ids_of(tokenizer, CHAT_TEXT)

    @pytest.mark.parametrize(
        "record",
        [
            {"text": "One fox."},
            {"prompt": "One ", "completion": "fox."},
            {"prompt": "", "completion": "One fox."},
            {"text": None, "prompt": "One ", "completion": "fox."},
            {"text": "One fox.", "messages": None, "id": 7},
        ],
    )
    def test_records(self, tokenizer, record):
        assert stream_of([record], tokenizer) == ids_of(tokenizer, "One fox.")

    def test_text_column(self, tokenizer):
        rows = [{"body": "One fox.", "text": "not this"}, {"body": None, "text": "nor this"}]
        assert stream_of(rows, tokenizer, text_column="body") == ids_of(tokenizer, "One fox.")
        with pytest.raises(ValueError, match=r"item 0: no article among the fields \['body', 'text'\]"):
            stream_of(rows, tokenizer, text_column="article")

    def test_batches_of_texts(self, tokenizer):
        loader = torch.utils.data.DataLoader([{"text": "One fox."}, {"text": "Two dogs."}], batch_size=2)
        assert stream_of(loader, tokenizer) == stream_of(["One fox.", "Two dogs."], tokenizer)


class TestFiles:
    def write(self, folder: Path, name: str, content: str | bytes) -> Path:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    @pytest.mark.parametrize("kind", [str, Path])
    def test_text_file_is_one_document(self, tokenizer, tmp_path, kind):
        path = self.write(tmp_path, "book.txt", TEXT)
        assert stream_of(kind(path), tokenizer) == ids_of(tokenizer, TEXT)  # "\r\n" stays as it is
        sample = token_batches(kind(path), tokenizer, num_samples=2, sequence_length=8)
        assert sample.source == f"book.txt: 1 documents, {len(ids_of(tokenizer, TEXT))} tokens"

    def test_home_directory(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        self.write(tmp_path, "book.txt", "One fox.")
        assert stream_of("~/book.txt", tokenizer) == ids_of(tokenizer, "One fox.")

    def test_jsonl_and_json(self, tokenizer, tmp_path):
        records = [{"text": "One\u2028fox."}, {"messages": CHAT}, {"prompt": "Two ", "completion": "dogs."}]
        lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n"
        expected = stream_of(["One\u2028fox.", CHAT_TEXT, "Two dogs."], tokenizer)
        assert stream_of(self.write(tmp_path, "a.jsonl", lines), tokenizer) == expected
        assert stream_of(self.write(tmp_path, "a.json", json.dumps(records)), tokenizer) == expected
        single = self.write(tmp_path, "b.json", json.dumps({"text": "One fox."}))
        assert stream_of(single, tokenizer) == ids_of(tokenizer, "One fox.")

    def test_a_path_comes_before_a_name(self, tokenizer, tmp_path, monkeypatch):
        self.write(tmp_path, "wikitext", "One fox.")
        monkeypatch.chdir(tmp_path)
        assert stream_of("wikitext", tokenizer) == ids_of(tokenizer, "One fox.")

    def test_missing_file(self, tokenizer, tmp_path):
        for path in (tmp_path / "absent", str(tmp_path / "absent"), "absent.txt", "absent.JSONL", "./absent"):
            with pytest.raises(FileNotFoundError, match="absent"):
                stream_of(path, tokenizer)

    def test_not_utf8(self, tokenizer, tmp_path):
        path = self.write(tmp_path, "latin1.txt", b"Gr\xfc\xdfe")
        with pytest.raises(ValueError, match=r"latin1\.txt: byte 2 \(0xfc\) is not UTF-8"):
            stream_of(path, tokenizer)

    def test_unreadable(self, tokenizer, tmp_path, monkeypatch):
        path = self.write(tmp_path, "secret.txt", "One fox.")

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(ValueError, match=r"secret\.txt: cannot be read \(Permission denied\)"):
            stream_of(path, tokenizer)

    def test_bad_json_names_the_line(self, tokenizer, tmp_path):
        path = self.write(tmp_path, "a.jsonl", '{"text": "One fox."}\n\n{"text": \n')
        with pytest.raises(ValueError, match=r"a\.jsonl, line 3: not JSON"):
            stream_of(path, tokenizer)

    def test_unknown_fields(self, tokenizer, tmp_path):
        path = self.write(tmp_path, "a.jsonl", '{"body": "One fox."}\n')
        with pytest.raises(ValueError, match=r"a\.jsonl, item 0: no .*fields \['body'\]; .*text_column"):
            stream_of(path, tokenizer)

    def test_empty_file(self, tokenizer, tmp_path):
        for name in ("empty.txt", "empty.jsonl"):
            with pytest.raises(ValueError, match=rf"{name} holds no text"):
                stream_of(self.write(tmp_path, name, ""), tokenizer)


class TestWindows:
    @given(
        total=st.integers(0, 5000),
        width=st.integers(1, 300),
        count=st.integers(1, 60),
        seed=st.integers(0, 9),
    )
    def test_starts(self, total, width, count, seed):
        starts = _starts(total, width, count, seed)
        assert len(starts) == min(count, total // width)
        assert all(start >= 0 and start + width <= total for start in starts)
        gaps = {after - before for before, after in pairwise(starts)}
        assert len(gaps) <= 1  # evenly spaced
        assert all(gap >= width for gap in gaps)  # never overlapping

    def test_a_short_stream_is_taken_whole_and_in_order(self):
        sample = token_batches(torch.arange(23), num_samples=4, sequence_length=5)
        assert torch.equal(sample.input_ids, torch.arange(20).view(4, 5))

    def test_seed_decides(self):
        def draw(seed: int) -> TokenSample:
            return token_batches(torch.arange(10_000), num_samples=4, sequence_length=5, seed=seed)

        assert draw(0).sha256 == draw(0).sha256
        assert len({draw(seed).sha256 for seed in range(8)}) == 8

    def test_windows_reach_over_the_whole_text(self, tokenizer):
        stream = torch.tensor(ids_of(tokenizer, TEXT))
        sample = token_batches([TEXT], tokenizer, num_samples=3, sequence_length=8)
        stride = len(stream) // 3
        first = next(i for i in range(stride) if torch.equal(stream[i : i + 8], sample.input_ids[0]))
        assert first + 2 * stride + 8 <= len(stream)
        assert sample.input_ids.shape == (3, 8)


class TestErrors:
    def test_too_few_tokens(self):
        with pytest.raises(ValueError, match=r"7 tokens in all, one sample needs 8.*--sequence-length 7"):
            token_batches(torch.arange(7), num_samples=1, sequence_length=8)

    @pytest.mark.parametrize("data", [[], [""], torch.empty(0, dtype=torch.int64), iter([])])
    def test_empty(self, tokenizer, data):
        with pytest.raises(ValueError, match="holds no text and no tokens"):
            token_batches(data, tokenizer, num_samples=1, sequence_length=8)

    @pytest.mark.parametrize("data", [None, 7, object()])
    def test_unknown_kind(self, data):
        with pytest.raises(TypeError, match=f"got {type(data).__name__}"):
            token_batches(data, num_samples=1, sequence_length=8)

    def test_unknown_item(self):
        with pytest.raises(TypeError, match=r"item 1: expected a text.*got NoneType"):
            token_batches([torch.arange(8), None], num_samples=1, sequence_length=8)

    def test_a_text_is_not_a_path(self, tokenizer):
        for text in ("The quick brown fox", TEXT):
            with pytest.raises(ValueError, match=r"neither a path nor the name.*put texts in a list"):
                token_batches(text, tokenizer, num_samples=1, sequence_length=8)
        for text in ("", "  "):
            with pytest.raises(ValueError, match="names nothing"):
                token_batches(text, tokenizer, num_samples=1, sequence_length=8)

    def test_counts(self):
        for options in ({"num_samples": 0, "sequence_length": 8}, {"num_samples": 1, "sequence_length": 0}):
            with pytest.raises(ValueError, match="must be at least 1"):
                token_batches(torch.arange(8), **options)

    def test_tokenizer_missing(self):
        with pytest.raises(ValueError, match="item 0 is text, and there is no tokenizer"):
            token_batches(["One fox."], num_samples=1, sequence_length=1)

    def test_chat_template_missing_or_refusing(self, tokenizer, monkeypatch):
        monkeypatch.setattr(tokenizer, "chat_template", None)
        with pytest.raises(ValueError, match=r"item 0: the chat does not become text.*chat_template"):
            stream_of([CHAT], tokenizer)
        monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
        with pytest.raises(ValueError, match=r"item 1: .*roles must alternate"):
            stream_of(["One fox.", CHAT], tokenizer)

    def test_ids_outside_the_vocabulary(self):
        data = torch.tensor([1, 2, 37, 4])
        assert token_batches(data, num_samples=1, sequence_length=4, vocab_size=38).num_samples == 1
        with pytest.raises(ValueError, match="token id 37 is outside the vocabulary of 37"):
            token_batches(data, num_samples=1, sequence_length=4, vocab_size=37)
        with pytest.raises(ValueError, match="token id -100 is outside 0"):
            token_batches(torch.tensor([1, -100]), num_samples=1, sequence_length=2)

    def test_not_integers_or_not_rows(self):
        with pytest.raises(TypeError, match=r"integers, got torch\.float32"):
            token_batches(torch.zeros(8), num_samples=1, sequence_length=8)
        with pytest.raises(ValueError, match=r"got \(2, 2, 2\)"):
            token_batches(torch.zeros(2, 2, 2, dtype=torch.int64), num_samples=1, sequence_length=8)
        with pytest.raises(ValueError, match="lists of equal length"):
            token_batches({"input_ids": [[1, 2], [3]]}, num_samples=1, sequence_length=1)


class TestReadTokenIds:
    def test_file_and_text(self, tokenizer, tmp_path):
        path = tmp_path / "book.txt"
        path.write_bytes(TEXT.encode())
        for data in (path, str(path), TEXT):
            token_ids, num_bytes = read_token_ids(data, tokenizer)
            assert token_ids.tolist() == ids_of(tokenizer, TEXT)
            assert token_ids.dtype == torch.int64
            assert num_bytes == len(TEXT.encode())

    def test_a_text_that_looks_odd_stays_a_text(self, tokenizer):
        for text in ("~~~ a rule\n", "nul \0 inside", "x" * 5000):
            assert tokenizer.decode(read_token_ids(text, tokenizer)[0]) == text

    def test_no_warning_about_long_texts(self, tokenizer, caplog):
        fresh = copy.deepcopy(tokenizer)
        fresh.deprecation_warnings.clear()  # it warns once per tokenizer
        logger = logging.getLogger("transformers")  # does not propagate to where caplog listens
        logger.addHandler(caplog.handler)
        try:
            read_token_ids(TEXT, fresh)  # far beyond model_max_length
        finally:
            logger.removeHandler(caplog.handler)
        assert not caplog.records

    def test_errors(self, tokenizer, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
            read_token_ids("absent.txt", tokenizer)
        with pytest.raises(FileNotFoundError, match="absent"):
            read_token_ids(Path("absent"), tokenizer)
        with pytest.raises(ValueError, match="the text is empty"):
            read_token_ids("", tokenizer)
        with pytest.raises(ValueError, match="cannot be read"):
            read_token_ids(tmp_path, tokenizer)
        with pytest.raises(ValueError, match=r"plain text, not \.jsonl"):
            read_token_ids(tmp_path / "a.jsonl", tokenizer)
