"""Token samples for calibration and evaluation, from text, chats, files, data sets or token ids (L5).

Data sets are read by :mod:`torchmix.data_sets`, which needs a package of its own. A tokenizer is anything called as
``tokenizer(text, add_special_tokens=False)["input_ids"]`` (every transformers tokenizer).

Shapes: S samples, L tokens per sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torchmix.data_sets import dataset_rows

READ_AHEAD = 16
"""Documents are read in order until there are this many times the tokens asked for."""

RECORD_SUFFIXES = {".json", ".jsonl", ".ndjson", ".parquet"}
FILE_SUFFIXES = RECORD_SUFFIXES | {".txt", ".text", ".raw", ".md", ".rst", ".csv"}
PREVIEW_CHARACTERS = 200

Document: TypeAlias = str | Tensor | list[Mapping[str, Any]]
"""One text, one row of token ids (1-D), or one conversation (messages with role and content)."""


@dataclass(frozen=True, eq=False)
class TokenSample:
    """The tokens a model is calibrated on, and where they came from.

    input_ids: int64 (S, L), on the CPU
    source:    what was read: file or data set name, documents, tokens
    sha256:    of input_ids as little-endian int64, row by row
    preview:   the first 200 characters of the first sample, decoded; None without a tokenizer
    requested: samples asked for; fewer are in input_ids where the data is short
    """

    input_ids: Tensor
    source: str
    sha256: str
    preview: str | None
    requested: int

    @property
    def num_samples(self) -> int:
        """Samples there are, S."""
        return self.input_ids.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens per sample, L."""
        return self.input_ids.shape[1]


def token_batches(
    data: Any,
    tokenizer: Any = None,
    *,
    num_samples: int,
    sequence_length: int | None,
    seed: int = 0,
    text_column: str | None = None,
    vocab_size: int | None = None,
) -> TokenSample:
    """Draw ``num_samples`` windows of ``sequence_length`` tokens from ``data``; never overlapping.

    ``data`` is one of
      - token ids: a tensor (S, L) or (tokens,), a list of such, dicts with ``input_ids`` (tokens with
        ``attention_mask`` 0 are dropped), a DataLoader or any iterable of such batches;
      - list[str]; chats: a list of conversations, each a list of messages or a dict with ``messages``;
      - a path: .jsonl and .json (records with ``text``, ``messages``, or ``prompt`` and ``completion``),
        .parquet, a data set directory; any other file is one text in UTF-8;
      - a ``datasets`` object, or the name of a data set on the hub: "name" or "name:config", split train.
    A path is looked for before a name. ``text_column`` names the field to read instead of the known ones.

    Text is tokenized without special tokens. Documents are joined to one stream, texts with the tokenizer's
    end-of-text token between them if it has one. A stream of at most ``num_samples`` windows is taken whole
    and in order; from a longer one windows are evenly spaced, the first start drawn from ``seed``.
    Token rows that all have ``sequence_length`` tokens are kept as samples, and chosen in the same way.
    ``sequence_length=None`` means the common length of token rows. No global random state changes.

    Raises:
        TypeError: data, or an item of it, of a kind not listed above; token ids that are not integers.
        FileNotFoundError: no such file, or a name that is neither a path nor a data set within reach.
        ImportError: a data set is named and ``datasets`` is not installed.
        ValueError: no data, less than one window, text without a tokenizer, a chat without a chat template,
            a file that cannot be read or is not UTF-8 or not JSON, an unknown field, ids outside
            0..``vocab_size`` - 1.
    """
    if num_samples < 1 or (sequence_length is not None and sequence_length < 1):
        raise ValueError(
            f"num_samples={num_samples}, sequence_length={sequence_length}: both must be at least 1"
        )
    items, source = _open(data)
    rows, rows_only, source = _read(items, source, tokenizer, text_column, num_samples, sequence_length)
    if sequence_length is None:
        if not rows_only or len({len(row) for row in rows}) > 1:
            raise ValueError(f"{source}: text and rows of unequal length need a sequence_length, got None")
        sequence_length = len(rows[0])
    input_ids = _draw(rows, rows_only, source, num_samples, sequence_length, seed)
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        wrong, limit = (lowest, "0") if lowest < 0 else (highest, f"the vocabulary of {vocab_size}")
        raise ValueError(f"{source}: token id {wrong} is outside {limit}; use the tokenizer of the model")
    return TokenSample(
        input_ids=input_ids,
        source=source,
        sha256=hashlib.sha256(input_ids.numpy().astype("<i8").tobytes()).hexdigest(),
        preview=None if tokenizer is None else tokenizer.decode(input_ids[0])[:PREVIEW_CHARACTERS],
        requested=num_samples,
    )


def read_token_ids(path_or_text: str | os.PathLike[str], tokenizer: Any) -> tuple[Tensor, int]:
    """A whole text file (or a text) as one stream: token ids int64 (tokens,), and its length in UTF-8 bytes.

    No special tokens, line ends as they stand in the file: the evaluation protocol. A string that is an
    existing file, or ends like one (.txt, ...), is a path; any other string is the text itself.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: no text, not UTF-8, not readable, or a .json, .jsonl or .parquet file.
    """
    path, text, source = _path(path_or_text), os.fspath(path_or_text), "the text"
    if isinstance(path_or_text, os.PathLike) or (text and os.path.exists(path)) or _ends_like_file(text):
        if path.suffix.lower() in RECORD_SUFFIXES:
            raise ValueError(f"{path}: evaluation reads plain text, not {path.suffix}; write a .txt file")
        text, source = _read_text(path), str(path)
    token_ids = _encode(text, tokenizer, source)
    if not len(token_ids):
        raise ValueError(f"{source} is empty; give a text of at least one evaluation window")
    return token_ids, len(text.encode())


def _open(data: Any) -> tuple[Iterable[Any], str]:
    """Items to read documents from, and a word for where they come from."""
    if isinstance(data, str | os.PathLike):
        return _open_path(data)
    if hasattr(data, "__array__"):  # tensors and numpy arrays
        return [data], f"token ids {tuple(data.shape)}"
    if isinstance(data, Mapping):
        return _open(data["train"]) if "train" in data else ([data], "one record")
    if isinstance(data, list | tuple):
        alone = bool(data) and (isinstance(data[0], int) or _is_message(data[0]))
        return ([data] if alone else data), f"{type(data).__name__} of {len(data)}"
    if isinstance(data, Iterable):
        return data, type(data).__name__
    raise TypeError(
        f"data must be token ids, texts, chats, a path, a data set or its name, got {type(data).__name__}"
    )


def _open_path(data: str | os.PathLike[str]) -> tuple[Iterable[Any], str]:
    """A file or directory if there is one, the name of a data set otherwise."""
    path, text = _path(data), os.fspath(data)
    if not text.strip():
        raise ValueError(f"data={text!r} names nothing; give a path or the name of a data set")
    if os.path.isdir(path):
        return dataset_rows(text, path), path.name
    if os.path.exists(path):
        return _file_items(path), path.name
    if isinstance(data, os.PathLike) or _ends_like_file(text):
        raise FileNotFoundError(f"{text}: no such file or directory; give the path of a text or data set")
    if any(character.isspace() for character in text):
        raise ValueError(
            f"data={text[:60]!r} is neither a path nor the name of a data set; put texts in a list: [text]"
        )
    return dataset_rows(text, None), text


def _path(data: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(data))  # Path.expanduser raises where a text begins with ~


def _ends_like_file(text: str) -> bool:
    """True for a string that can only be meant as a path."""
    return "\n" not in text and (
        Path(text).suffix.lower() in FILE_SUFFIXES or text.startswith(("/", "./", "../", "~"))
    )


def _file_items(path: Path) -> Iterable[Any]:
    """One text, or the records of a .jsonl, .json or .parquet file."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return dataset_rows(str(path), path)
    text = _read_text(path)
    if suffix in {".jsonl", ".ndjson"}:
        lines = enumerate(text.split("\n"), start=1)  # not splitlines: JSON strings may hold U+2028
        return [_parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if suffix == ".json":
        records = _parse_json(text, str(path))
        return records if isinstance(records, list) else [records]
    return [text]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); mend it, or give a .txt file") from error


def _read_text(path: Path) -> str:
    """The file as UTF-8, line ends untouched."""
    try:
        content = path.read_bytes()
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{path}: cannot be read ({error.strerror}); check name, type and permissions") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        value = f"byte {error.start} (0x{content[error.start]:02x})"
        raise ValueError(f"{path}: {value} is not UTF-8; convert it, as with iconv -t utf-8") from error


def _read(
    items: Iterable[Any],
    source: str,
    tokenizer: Any,
    text_column: str | None,
    num_samples: int,
    sequence_length: int | None,
) -> tuple[list[Tensor], bool, str]:
    """Token rows (1-D int64) in order, whether none of them was text, and a description of the source.

    Stops once ``READ_AHEAD`` times the tokens asked for have been seen.
    """
    rows: list[Tensor] = []
    eos = getattr(tokenizer, "eos_token_id", None)
    texts = tokens = documents = 0
    rest = ""
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws its seed from the global generator
        for index, item in enumerate(items):
            if rows and tokens >= READ_AHEAD * num_samples * (sequence_length or len(rows[0])):
                rest = ", the rest not read"
                break
            for document in _documents(item, f"{source}, item {index}", text_column):
                row = _encode(document, tokenizer, f"{source}, item {index}")
                if not len(row):
                    continue
                if texts and not isinstance(document, Tensor) and eos is not None and rows[-1][-1] != eos:
                    rows.append(torch.tensor([eos]))
                rows.append(row)
                texts += not isinstance(document, Tensor)
                documents, tokens = documents + 1, tokens + len(row)
    if not rows:
        raise ValueError(f"{source} holds no text and no tokens; give data of at least one sequence")
    total, noun = sum(len(row) for row in rows), "documents" if texts else "rows"
    return rows, not texts, f"{source}: {documents} {noun}, {total} tokens{rest}"


def _documents(item: Any, where: str, text_column: str | None = None) -> Iterator[Document]:
    """The documents of one item: a text, a chat, a record, token ids, or a batch of any of them."""
    if isinstance(item, str):
        yield item
    elif hasattr(item, "__array__"):
        yield from _token_rows(item, where)
    elif isinstance(item, Mapping):
        yield from _record_documents(item, where, text_column)
    elif isinstance(item, list | tuple):
        if not item:
            return
        if _is_message(item[0]):
            yield list(item)
        elif isinstance(item[0], int):
            yield from _token_rows(item, where)
        elif isinstance(item[0], Tensor):  # what loaders make of TensorDataset(input_ids, labels, ...)
            yield from _documents(item[0], where)
        else:
            for part in item:
                yield from _documents(part, where, text_column)
    else:
        raise TypeError(f"{where}: expected a text, a chat, a record or token ids, got {type(item).__name__}")


def _record_documents(record: Mapping[str, Any], where: str, text_column: str | None) -> Iterator[Document]:
    """The documents of a dict; a known field that is None counts as empty."""
    known = ("input_ids", "text", "messages") if text_column is None else (text_column,)
    field = next((name for name in known if record.get(name) is not None), None)
    if field == "input_ids":
        yield from _token_rows(record[field], where, record.get("attention_mask"))
    elif field is not None:
        yield from _documents(record[field], where)
    elif text_column is None and {"prompt", "completion"} <= record.keys():
        parts = [record[name] for name in ("prompt", "completion") if record[name]]  # two texts, or two chats
        yield from _documents(parts[0] + parts[1] if len(parts) == 2 else parts, where)
    elif not set(known) & set(record):
        wanted = " or ".join(known) + (", or prompt and completion," if text_column is None else "")
        raise ValueError(f"{where}: no {wanted} among the fields {list(record)}; name one with text_column")


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and "content" in item


def _token_rows(token_ids: Any, where: str, attention_mask: Any = None) -> Iterator[Tensor]:
    """Rows of integers (tokens,) or (S, L) as int64 on the CPU, without masked tokens."""
    try:
        ids = torch.as_tensor(token_ids).detach().cpu()
        mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: no tensor of token ids ({error}); give tensors, or lists of equal length"
        ) from error
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"{where}: token ids must be integers, got {ids.dtype}")
    if ids.dim() not in (1, 2) or mask.shape != ids.shape:
        raise ValueError(
            f"{where}: token ids and mask must have shape (tokens,) or (samples, tokens), got "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}"
        )
    for row, keep in zip(torch.atleast_2d(ids), torch.atleast_2d(mask), strict=True):
        yield row[keep.bool()].to(torch.int64)


def _encode(document: Document, tokenizer: Any, where: str) -> Tensor:
    """Token ids int64 (tokens,) of one document, without special tokens of the tokenizer's own."""
    if isinstance(document, Tensor):
        return document
    if tokenizer is None:
        raise ValueError(f"{where} is text, and there is no tokenizer; pass tokenizer=..., or give token ids")
    if not isinstance(document, str):
        try:
            document = str(tokenizer.apply_chat_template(document, tokenize=False))
        except Exception as error:
            raise ValueError(
                f"{where}: the chat does not become text ({error}); set tokenizer.chat_template, mend the "
                f"messages, or give plain text"
            ) from error
    # verbose=False: a text longer than the model's context is no mistake here
    token_ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(token_ids, dtype=torch.int64)


def _draw(
    rows: list[Tensor], rows_only: bool, source: str, num_samples: int, sequence_length: int, seed: int
) -> Tensor:
    """Samples int64 (S, L): whole rows where they have the right length, windows of the stream otherwise."""
    if rows_only and all(len(row) == sequence_length for row in rows):
        return torch.stack([rows[start] for start in _starts(len(rows), 1, num_samples, seed)])
    tokens = torch.cat(rows)
    if len(tokens) < sequence_length:
        raise ValueError(
            f"{source} in all, one sample needs {sequence_length}; give more data, or choose a smaller "
            f"sequence length (--sequence-length {len(tokens)} or less)"
        )
    starts = _starts(len(tokens), sequence_length, num_samples, seed)
    return torch.stack([tokens[start : start + sequence_length] for start in starts])


def _starts(total: int, width: int, count: int, seed: int) -> list[int]:
    """Starts of at most ``count`` windows of ``width`` in ``total`` places: all, or evenly spaced."""
    capacity = total // width
    if capacity <= count:
        return [index * width for index in range(capacity)]
    stride = total // count
    slack = total - (count - 1) * stride - width
    first = random.Random(seed).randint(0, slack)
    return [first + index * stride for index in range(count)]
