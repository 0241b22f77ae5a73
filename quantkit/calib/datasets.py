"""Calibration and evaluation sets: text in, token ids of a fixed shape out, with a line that says how.

Calibration, local text and ``builtin``: documents in order, each followed by the EOS token, tokenized without special
tokens, cut into consecutive chunks; the first ones, or a seeded choice among all. So every tool can be given the same
set. ``wikitext2`` and ``c4`` follow the GPTQ line of papers: random windows of one joined text, and a random window of
each of a number of random long documents.

Evaluation, the GPTQ line's protocol: the text as one string, tokenized once without special tokens, cut into
consecutive windows, the remainder dropped.
"""

from __future__ import annotations

import hashlib
import random
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkit.calib.sources import (
    HUB_DATASETS,
    TEXT_FIELD,
    builtin_documents,
    hub_rows,
    local_documents,
    source_name,
)
from quantkit.errors import RequestError

C4_EVALUATION_DOCUMENTS = 1100  # the "new" protocol of OmniQuant, SliM-LLM and later code
C4_EVALUATION_WINDOWS = 256


@dataclass(frozen=True)
class Calibration:
    """A calibration set.

    `input_ids` is int64 [n_samples, seq_len] on the CPU. `source` is a data set's name, a file's stem or a folder's
    name, never a path. `n_documents` counts the documents that were tokenized to get the set. `fingerprint` is the
    SHA-256 (hex) of the shape and the ids, all as little-endian int64. `protocol` is one line for reports.
    """

    input_ids: Tensor
    source: str
    n_documents: int
    fingerprint: str
    protocol: str

    image_masks: None = None  # no token stands for a picture

    @property
    def longest(self) -> int:
        """Tokens of a sample."""
        return self.input_ids.shape[1]

    def inputs(self) -> Iterator[dict[str, Tensor]]:
        """Arguments of the model's forward for each sample, batch size 1."""
        return ({"input_ids": row.unsqueeze(0)} for row in self.input_ids)

    def to_json(self) -> dict[str, Any]:
        """What a report keeps of it: everything but the ids."""
        n_samples, seq_len = self.input_ids.shape
        return {
            "source": self.source,
            "n_samples": n_samples,
            "seq_len": seq_len,
            "n_documents": self.n_documents,
            "fingerprint": self.fingerprint,
            "protocol": self.protocol,
        }


@dataclass(frozen=True)
class EvalWindows:
    """An evaluation text in windows.

    `input_ids` is int64 [windows, seq_len] on the CPU. `name` is a data set's name, a file's stem or a folder's name.
    `sha256` (hex) is that of the whole text in UTF-8: for a plain text file, that of the file. `protocol` is one line.
    """

    input_ids: Tensor
    name: str
    sha256: str
    protocol: str


@dataclass(frozen=True)
class _Drawn:
    ids: Tensor  # int64 [n_samples, seq_len]
    n_documents: int
    how: str


def load_calibration(
    source: str,
    tokenizer: Any,
    *,
    n_samples: int,
    seq_len: int,
    seed: int = 0,
    shuffle: bool = False,
    vocab_size: int | None = None,
    hub: Mapping[str, Mapping[str, Any]] = HUB_DATASETS,
) -> Calibration:
    """Read a calibration set of n_samples x seq_len tokens.

    Args:
        source: ``builtin``, ``wikitext2``, ``c4``, a text file, or a folder of text files (`quantkit.calib.sources`).
        tokenizer: a transformers tokenizer, or any callable of its form with `eos_token_id`.
        n_samples: sequences wanted, at least 1.
        seq_len: tokens of each, at least 1.
        seed: of the random choice (`shuffle`, ``wikitext2``, ``c4``).
        shuffle: choose among all chunks of the text instead of taking the first; the whole text is then tokenized.
            ``wikitext2`` and ``c4`` are drawn at random in any case.
        vocab_size: rows of the model's embedding; when given, ids are checked against it.
        hub: arguments of `datasets.load_dataset` for the hub data sets.

    Raises:
        RequestError: unknown source, a missing optional package, too little text, ids outside the vocabulary.
        FileError: a file that is empty, damaged or without the field ``text``; a data set that cannot be fetched.
    """
    for setting, value in (("n_samples", n_samples), ("seq_len", seq_len)):
        if value < 1:
            raise RequestError(f"{setting} is {value}; it must be at least 1")
    name = source_name(source)
    rng = random.Random(seed)
    if source == "wikitext2":
        drawn = _joined_windows(hub_rows("wikitext2/calibration", hub), tokenizer, n_samples, seq_len, rng)
    elif source == "c4":
        drawn = _document_windows(hub_rows("c4/calibration", hub), tokenizer, n_samples, seq_len, rng)
    else:
        documents = builtin_documents("train") if source == "builtin" else local_documents(source)
        drawn = _chunks(documents, tokenizer, name, n_samples, seq_len, rng if shuffle else None)
    if source in ("wikitext2", "c4") or shuffle:
        drawn = _Drawn(drawn.ids, drawn.n_documents, f"{drawn.how}, seed {seed}")
    _check_vocabulary(drawn.ids, vocab_size, name)
    protocol = f"{name}: {n_samples} x {seq_len} tokens, {drawn.how}, no special tokens"
    return Calibration(drawn.ids, name, drawn.n_documents, fingerprint(drawn.ids), protocol)


def load_evaluation(
    source: str,
    tokenizer: Any,
    seq_len: int,
    limit: int | None = None,
    *,
    vocab_size: int | None = None,
    hub: Mapping[str, Mapping[str, Any]] = HUB_DATASETS,
) -> EvalWindows:
    """Read an evaluation text and cut it into windows.

    A text file is taken as it is; several documents are joined by two newlines. ``builtin`` is held-out text of the
    embedded demo, ``wikitext2`` the test split, ``c4`` the "new" protocol: the first 1100 documents of the first
    validation file joined by a space, and of their windows the first 256.

    Args:
        source: as in `load_calibration`.
        tokenizer: as in `load_calibration`.
        seq_len: tokens of a window, at least 2 (the first token of a window is not predicted).
        limit: windows to keep, the first ones; None keeps all.
        vocab_size: rows of the model's embedding; when given, ids are checked against it.
        hub: arguments of `datasets.load_dataset` for the hub data sets.

    Raises:
        RequestError, FileError: as `load_calibration`.
    """
    if seq_len < 2:
        raise RequestError(f"seq_len is {seq_len}; a window needs at least 2 tokens")
    if limit is not None and limit < 1:
        raise RequestError(f"limit is {limit}; evaluate at least 1 window, or leave the limit out")
    name = source_name(source)
    text = _evaluation_text(source, hub)
    ids = torch.tensor(tokenize(tokenizer, text), dtype=torch.int64)
    n_windows = len(ids) // seq_len
    if n_windows == 0:
        raise RequestError(
            f"{name}: {len(ids)} tokens, less than one window of seq_len {seq_len}; "
            f"lower seq_len to {max(2, len(ids))} or less, or pass more text"
        )
    protocol = f"{name}: GPTQ-line windows of {seq_len} tokens, no special tokens, mean over windows"
    if source == "c4":
        n_windows = min(n_windows, C4_EVALUATION_WINDOWS)
        protocol += f', "new" c4 ({C4_EVALUATION_DOCUMENTS} documents)'
    kept = n_windows if limit is None else min(n_windows, limit)
    protocol += f", {kept} of {n_windows} windows"
    windows = ids[: kept * seq_len].view(kept, seq_len)
    _check_vocabulary(windows, vocab_size, name)
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()
    return EvalWindows(windows, name, digest, protocol)


def tokenize(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without the special tokens that the tokenizer would add."""
    # verbose=False: texts longer than the model's context are cut into windows afterwards, so no warning is due.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def fingerprint(input_ids: Tensor) -> str:
    """SHA-256 (hex) of the shape and then the ids of a [n_samples, seq_len] tensor, as little-endian int64."""
    numbers = array("q", input_ids.shape)
    numbers.extend(input_ids.flatten().tolist())
    if sys.byteorder == "big":
        numbers.byteswap()
    return hashlib.sha256(numbers.tobytes()).hexdigest()


def _chunks(
    documents: Iterable[str], tokenizer: Any, name: str, n_samples: int, seq_len: int, rng: random.Random | None
) -> _Drawn:
    """Consecutive chunks of the documents: the first ones, or with `rng` a choice among all."""
    eos = tokenizer.eos_token_id
    wanted = n_samples * seq_len
    stream, n_documents = array("q"), 0  # 8 bytes a token: a list of all tokens of a large file would not fit
    for text in documents:
        stream.extend(tokenize(tokenizer, text))
        if eos is not None:
            stream.append(eos)
        n_documents += 1
        if rng is None and len(stream) >= wanted:
            break
    n_chunks = len(stream) // seq_len
    if n_chunks < n_samples:
        raise _too_little(name, len(stream), n_samples, seq_len)
    ids = torch.tensor(stream[: n_chunks * seq_len], dtype=torch.int64).view(n_chunks, seq_len)
    separator = "EOS after each" if eos is not None else "no separator (the tokenizer has no EOS)"
    order = f"{n_documents} documents in order, {separator}"
    if rng is None:
        return _Drawn(ids[:n_samples].clone(), n_documents, f"the first chunks of {order}")
    chosen = rng.sample(range(n_chunks), n_samples)
    return _Drawn(ids[chosen], n_documents, f"random chunks of {order}")


def _joined_windows(rows: Any, tokenizer: Any, n_samples: int, seq_len: int, rng: random.Random) -> _Drawn:
    """Random windows of all rows joined by two newlines and tokenized once (GPTQ's wikitext2)."""
    ids = torch.tensor(tokenize(tokenizer, "\n\n".join(rows[TEXT_FIELD])), dtype=torch.int64)
    if len(ids) <= seq_len:
        raise RequestError(f"wikitext2: {len(ids)} tokens, one window needs {seq_len + 1}; lower seq_len")
    starts = [rng.randint(0, len(ids) - seq_len - 1) for _ in range(n_samples)]
    windows = torch.stack([ids[start : start + seq_len] for start in starts])
    return _Drawn(windows, 1, "random windows of the train split joined by two newlines")


def _document_windows(rows: Any, tokenizer: Any, n_samples: int, seq_len: int, rng: random.Random) -> _Drawn:
    """A random window in each of n_samples random documents of more than seq_len tokens (GPTQ's c4)."""
    windows: list[Tensor] = []
    used: set[int] = set()
    short: set[int] = set()
    while len(windows) < n_samples:
        if len(short) == len(rows):
            raise RequestError(f"c4: no document has more than seq_len {seq_len} tokens; lower seq_len")
        row = rng.randint(0, len(rows) - 1)
        if row in short:
            continue
        ids = torch.tensor(tokenize(tokenizer, rows[row][TEXT_FIELD]), dtype=torch.int64)
        if len(ids) <= seq_len:
            short.add(row)
            continue
        start = rng.randint(0, len(ids) - seq_len - 1)
        windows.append(ids[start : start + seq_len])
        used.add(row)
    return _Drawn(torch.stack(windows), len(used), f"a random window of each of {n_samples} random long documents")


def _evaluation_text(source: str, hub: Mapping[str, Mapping[str, Any]]) -> str:
    if source == "wikitext2":
        return "\n\n".join(hub_rows("wikitext2/evaluation", hub)[TEXT_FIELD])
    if source == "c4":
        rows = hub_rows("c4/evaluation", hub)
        return " ".join(rows[: min(C4_EVALUATION_DOCUMENTS, len(rows))][TEXT_FIELD])
    return "\n\n".join(builtin_documents("heldout") if source == "builtin" else local_documents(source))


def _too_little(name: str, n_tokens: int, n_samples: int, seq_len: int) -> RequestError:
    n_chunks, fitting = n_tokens // seq_len, n_tokens // n_samples
    lower = [f"n_samples to {n_chunks}"] if n_chunks else []
    lower += [f"seq_len to {fitting}"] if fitting else []
    advice = f"lower {' or '.join(lower)}, or pass more text" if lower else "pass more text"
    found = f"{n_chunks} full chunks of {seq_len} tokens ({n_tokens} tokens in all)"
    return RequestError(f"{name}: {found}, n_samples is {n_samples}; {advice}")


def _check_vocabulary(ids: Tensor, vocab_size: int | None, name: str) -> None:
    if vocab_size is not None and int(ids.max()) >= vocab_size:
        raise RequestError(
            f"{name}: token id {int(ids.max())} is outside the model's vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model"
        )
