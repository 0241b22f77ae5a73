"""Calibration and evaluation sets: exact ids against loops written out, and every refusal's message."""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from quantkit.calib.datasets import Calibration, fingerprint, load_calibration, load_evaluation, tokenize
from quantkit.calib.sources import HUB_DATASETS
from quantkit.demo import corpus
from quantkit.errors import FileError, RequestError

TOKENIZER = tiny_tokenizer()  # one token a byte; EOS is 2
EOS = 2
TEXTS = ["one small document", "", "two\n\nlines \u2013 and a dash", "x" * 70, "tail"]


def write_jsonl(path: Path, texts: Sequence[str], **more: object) -> str:
    path.write_text("".join(json.dumps({**more, "text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def stream(texts: Sequence[str]) -> list[int]:
    """Every document's tokens and an EOS, in one list."""
    ids: list[int] = []
    for text in texts:
        ids += [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]
    return ids


# --- local text ---------------------------------------------------------------------------------------------------


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=8),
    n_samples=st.integers(1, 6),
    seq_len=st.integers(1, 20),
)
@example(texts=["abc"], n_samples=1, seq_len=4)  # fits to the last token, the EOS
@example(texts=["abc"], n_samples=1, seq_len=5)
@example(texts=["abc", "d"], n_samples=1, seq_len=4)  # the second document is not needed
@example(texts=[""], n_samples=1, seq_len=1)
def test_chunks_are_the_stream_cut_in_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], n_samples: int, seq_len: int
) -> None:
    source = write_jsonl(tmp_path_factory.mktemp("chunks") / "docs.jsonl", texts)
    ids, wanted = stream(texts), n_samples * seq_len
    if len(ids) < wanted:
        with pytest.raises(RequestError, match=f"^docs: {len(ids) // seq_len} full chunks of {seq_len} tokens"):
            load_calibration(source, TOKENIZER, n_samples=n_samples, seq_len=seq_len)
        return
    calibration = load_calibration(source, TOKENIZER, n_samples=n_samples, seq_len=seq_len)
    assert calibration.input_ids.dtype == torch.int64
    assert calibration.input_ids.tolist() == torch.tensor(ids[:wanted]).view(n_samples, seq_len).tolist()
    needed = next(count for count in range(1, len(texts) + 1) if len(stream(texts[:count])) >= wanted)
    assert calibration.n_documents == needed


def test_every_kind_of_file_gives_the_same_set(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    sources = [write_jsonl(tmp_path / "a.jsonl", TEXTS, kind="noise"), write_jsonl(tmp_path / "b.json", TEXTS)]
    parquet.write_table(arrow.table({"n": [1] * len(TEXTS), "text": TEXTS}), tmp_path / "c.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(TEXTS[:1] + TEXTS[2:]):
        (folder / f"{number}.TXT").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text("not text for calibration")
    (folder / "deeper").mkdir()
    (tmp_path / "d.jsonl").write_text("\n \n".join(json.dumps({"text": text}) for text in TEXTS))  # blank lines
    sources += [str(tmp_path / "c.parquet"), str(tmp_path / "d.jsonl")]
    sets = [load_calibration(source, TOKENIZER, n_samples=3, seq_len=32) for source in sources]
    assert [calibration.source for calibration in sets] == ["a", "b", "c", "d"]
    assert len({calibration.fingerprint for calibration in sets}) == 1
    without_empty = load_calibration(str(folder), TOKENIZER, n_samples=3, seq_len=32)
    assert without_empty.source == "folder"
    assert without_empty.input_ids.flatten().tolist() == stream(TEXTS[:1] + TEXTS[2:])[:96]


def test_a_text_file_is_one_document_with_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    calibration = load_calibration(str(tmp_path / "dos.txt"), TOKENIZER, n_samples=1, seq_len=9)
    assert calibration.input_ids[0].tolist() == stream(["one\ntwo\n"])
    assert calibration.n_documents == 1


def test_no_more_is_read_than_needed(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    write_jsonl(path, TEXTS)
    path.write_text(path.read_text() + "{broken\n")
    assert load_calibration(str(path), TOKENIZER, n_samples=2, seq_len=16).n_documents == 3
    with pytest.raises(FileError, match=r"^docs\.jsonl, line 6: not valid JSON"):
        load_calibration(str(path), TOKENIZER, n_samples=2, seq_len=16, shuffle=True)


def test_shuffle_chooses_distinct_chunks_by_seed(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "docs.jsonl", [f"document number {number}" for number in range(200)])
    chunks = stream([f"document number {number}" for number in range(200)])
    all_chunks = [tuple(chunks[start : start + 16]) for start in range(0, len(chunks) - 15, 16)]

    def draw(seed: int, n_samples: int = 8) -> Calibration:
        return load_calibration(source, TOKENIZER, n_samples=n_samples, seq_len=16, seed=seed, shuffle=True)

    assert draw(0).fingerprint == draw(0).fingerprint
    assert len({draw(seed).fingerprint for seed in range(5)}) == 5
    assert draw(3).n_documents == 200
    chosen = [tuple(row) for row in draw(1, len(all_chunks)).input_ids.tolist()]
    assert sorted(chosen) == sorted(all_chunks)  # all of them, each once
    assert chosen != all_chunks


def test_a_tokenizer_without_eos_joins_without_separator(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    calibration = load_calibration(write_jsonl(tmp_path / "d.jsonl", TEXTS), tokenizer, n_samples=2, seq_len=40)
    assert calibration.input_ids.flatten().tolist() == [token for token in stream(TEXTS) if token != EOS][:80]
    assert "no separator (the tokenizer has no EOS)" in calibration.protocol


def test_builtin_is_the_text_that_python_carries() -> None:
    calibration = load_calibration("builtin", TOKENIZER, n_samples=4, seq_len=64)
    assert calibration.source == "builtin"
    assert calibration.input_ids.flatten().tolist() == stream(corpus.documents("train")[:3])[:256]


def test_the_report_names_the_set_and_no_path(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    calibration = load_calibration(source, TOKENIZER, n_samples=2, seq_len=16)
    record = calibration.to_json()
    assert record == {
        "source": "docs",
        "n_samples": 2,
        "seq_len": 16,
        "n_documents": 3,
        "fingerprint": calibration.fingerprint,
        "protocol": "docs: 2 x 16 tokens, the first chunks of 3 documents in order, EOS after each, no special tokens",
    }
    assert str(tmp_path) not in json.dumps(record)


def test_fingerprint_is_of_shape_and_ids() -> None:
    ids = torch.tensor([[1, 2, 300], [4, 5, 6]])
    expected = hashlib.sha256(struct.pack("<8q", 2, 3, 1, 2, 300, 4, 5, 6)).hexdigest()
    assert fingerprint(ids) == expected
    assert fingerprint(ids.t().contiguous().t()) == expected  # the memory layout does not count
    assert fingerprint(ids.view(3, 2)) != expected


# --- hub data sets, through `datasets` on local stand-ins ---------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Callable[[str, Sequence[str]], dict[str, Any]]:
    """A table like HUB_DATASETS, whose entry reads a local file through the same call."""
    pytest.importorskip("datasets")

    def table(key: str, texts: Sequence[str], column: str = "text") -> dict[str, Any]:
        split = HUB_DATASETS[key]["split"]
        file = tmp_path / "standin.jsonl"
        file.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
        arguments = {"path": "json", "data_files": {split: str(file)}, "split": split}
        return {key: {**arguments, "cache_dir": str(tmp_path / "cache")}}

    return table


ROWS = [f"row {number}: " + "words and more " * (number % 7) for number in range(40)]


def test_wikitext2_draws_windows_of_the_joined_text(hub: Any) -> None:
    table = hub("wikitext2/calibration", ROWS)
    calibration = load_calibration("wikitext2", TOKENIZER, n_samples=5, seq_len=32, seed=7, hub=table)
    tokens = TOKENIZER("\n\n".join(ROWS), add_special_tokens=False, verbose=False)["input_ids"]
    rng, expected = random.Random(7), []
    for _ in range(5):  # the loop of GPTQ's get_wikitext2
        start = rng.randint(0, len(tokens) - 32 - 1)
        expected.append(tokens[start : start + 32])
    assert calibration.input_ids.tolist() == expected
    assert calibration.source == "wikitext2"
    assert calibration.protocol.endswith("joined by two newlines, seed 7, no special tokens")
    with pytest.raises(RequestError, match=r"^wikitext2: \d+ tokens, one window needs 100001; lower seq_len"):
        load_calibration("wikitext2", TOKENIZER, n_samples=5, seq_len=100_000, hub=table)


def test_c4_draws_long_documents(hub: Any) -> None:
    table = hub("c4/calibration", ROWS)
    calibration = load_calibration("c4", TOKENIZER, n_samples=6, seq_len=60, seed=3, hub=table)
    rng, expected = random.Random(3), []
    for _ in range(6):  # the loop of GPTQ's get_c4
        while True:
            tokens = TOKENIZER(ROWS[rng.randint(0, len(ROWS) - 1)], add_special_tokens=False)["input_ids"]
            if len(tokens) > 60:
                break
        start = rng.randint(0, len(tokens) - 60 - 1)
        expected.append(tokens[start : start + 60])
    assert calibration.input_ids.tolist() == expected
    with pytest.raises(RequestError, match=r"^c4: no document has more than seq_len 500 tokens; lower seq_len"):
        load_calibration("c4", TOKENIZER, n_samples=1, seq_len=500, hub=table)


def test_evaluation_of_hub_data_sets(hub: Any) -> None:
    windows = load_evaluation("wikitext2", TOKENIZER, 16, hub=hub("wikitext2/evaluation", ROWS))
    assert windows.input_ids.flatten().tolist() == whole_windows("\n\n".join(ROWS), 16)
    many = [f"d{number % 10}" for number in range(1105)]
    windows = load_evaluation("c4", TOKENIZER, 8, hub=hub("c4/evaluation", many))
    assert windows.input_ids.shape == (256, 8)  # of (1100 x 3 - 1) // 8 windows
    assert windows.sha256 == hashlib.sha256(" ".join(many[:1100]).encode()).hexdigest()
    assert windows.input_ids.flatten().tolist() == whole_windows(" ".join(many[:1100]), 8)[: 256 * 8]
    assert '"new" c4 (1100 documents), 256 of 256 windows' in windows.protocol
    assert load_evaluation("c4", TOKENIZER, 8, 3, hub=hub("c4/evaluation", many)).input_ids.shape == (3, 8)


def test_hub_data_set_that_cannot_be_read(hub: Any, tmp_path: Path) -> None:
    away = {"wikitext2/calibration": {"path": "json", "data_files": str(tmp_path / "away.json"), "split": "train"}}
    message = r"^wikitext2: cannot be fetched from the Hugging Face hub \(.*\); .*pass a local \.txt"
    with pytest.raises(FileError, match=message):
        load_calibration("wikitext2", TOKENIZER, n_samples=1, seq_len=4, hub=away)
    with pytest.raises(FileError, match=r"^c4: no column 'text'; its columns are body"):
        load_calibration("c4", TOKENIZER, n_samples=1, seq_len=4, hub=hub("c4/calibration", ROWS, column="body"))


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in ("c4", str(tmp_path / "a.parquet")):
        with pytest.raises(RequestError, match=re.escape('pip install "quantkit[data]"')):
            load_calibration(source, TOKENIZER, n_samples=1, seq_len=4)


# --- evaluation windows -------------------------------------------------------------------------------------------


def whole_windows(text: str, seq_len: int) -> list[int]:
    tokens: list[int] = TOKENIZER(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens[: len(tokens) // seq_len * seq_len]


def test_evaluation_windows_drop_the_remainder(tmp_path: Path) -> None:
    text = "0123456789" * 10 + "rest"
    (tmp_path / "held.out.txt").write_text(text)
    windows = load_evaluation(str(tmp_path / "held.out.txt"), TOKENIZER, 10)
    assert windows.input_ids.shape == (10, 10)
    assert windows.input_ids.flatten().tolist() == whole_windows(text, 10)
    assert windows.name == "held.out"
    assert windows.sha256 == hashlib.sha256((tmp_path / "held.out.txt").read_bytes()).hexdigest()
    limited = load_evaluation(str(tmp_path / "held.out.txt"), TOKENIZER, 10, 4)
    assert torch.equal(limited.input_ids, windows.input_ids[:4])
    assert limited.protocol.endswith("4 of 10 windows")


def test_evaluation_joins_documents_by_two_newlines(tmp_path: Path) -> None:
    windows = load_evaluation(write_jsonl(tmp_path / "d.jsonl", TEXTS), TOKENIZER, 16)
    assert windows.input_ids.flatten().tolist() == whole_windows("\n\n".join(TEXTS), 16)
    builtin = load_evaluation("builtin", TOKENIZER, 64, 2)
    assert builtin.input_ids.flatten().tolist() == tokenize(TOKENIZER, "\n\n".join(corpus.documents("heldout")))[:128]


def test_special_tokens_are_not_added(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    template = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer("a")["input_ids"][0] == 1
    assert 1 not in tokenize(tokenizer, "a")


# --- refusals -----------------------------------------------------------------------------------------------------


def test_settings_out_of_range() -> None:
    for settings, message in [
        ({"n_samples": 0, "seq_len": 8}, "n_samples is 0; it must be at least 1"),
        ({"n_samples": 1, "seq_len": -8}, "seq_len is -8; it must be at least 1"),
    ]:
        with pytest.raises(RequestError, match=f"^{message}"):
            load_calibration("builtin", TOKENIZER, **settings)
    with pytest.raises(RequestError, match=r"^seq_len is 1; a window needs at least 2 tokens"):
        load_evaluation("builtin", TOKENIZER, 1)
    with pytest.raises(RequestError, match=r"^limit is 0; evaluate at least 1 window"):
        load_evaluation("builtin", TOKENIZER, 8, 0)


def test_sources_that_do_not_exist(tmp_path: Path) -> None:
    cases: list[tuple[str, str]] = [
        ("wikitxt2", "^wikitxt2: no such file or folder, and no data set of that name; did you mean 'wikitext2'"),
        (str(tmp_path / "nothing.txt"), r"nothing\.txt: no such file or folder.*known: builtin, c4, wikitext2$"),
        (str(tmp_path), f"^{tmp_path.name}: no text file in this folder; known kinds: .txt, .jsonl, .json, .parquet$"),
        (__file__, r"^test_datasets\.py: unknown kind of text file '\.py'; use one of \.txt"),
    ]
    for source, message in cases:
        for load in (calibrate, evaluate):
            with pytest.raises(RequestError, match=message):
                load(source)


def test_a_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(RequestError, match=r"holds metadata\.jsonl, .*; ask about it with eval --vqa"):
        calibrate(str(tmp_path))


HOSTILE: list[tuple[str, bytes, str]] = [
    ("empty.txt", b"", r"^empty\.txt: the file is empty"),
    ("blank.txt", b" \n\n", r"^blank\.txt: the file is empty"),
    ("empty.jsonl", b"\n\n", r"^empty\.jsonl: the file is empty"),
    ("latin.txt", b"abc\xe9def", r"^latin\.txt: not UTF-8 at byte 3; convert the file"),
    ("latin.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"^latin\.jsonl, line 2: not UTF-8; convert"),
    ("cut.jsonl", b'{"text": "a"}\n\n{"text": "b', r"^cut\.jsonl, line 3: not valid JSON \(Unterminated string"),
    ("deep.json", b"[" * 200_000, r"^deep\.json, line 1: not valid JSON"),
    ("list.json", b'[{"text": "a"}]', r"^list\.json, line 1: found a JSON list; each line must hold one object"),
    ("named.jsonl", b'{"body": "a", "id": 3}', r"^named\.jsonl, line 1: no field 'text'; fields found: body, id;"),
    ("bare.jsonl", b"{}", r"^bare\.jsonl, line 1: no field 'text'; fields found: none;"),
    ("null.jsonl", b'{"text": null}', r"^null\.jsonl, line 1: the field 'text' holds a NoneType; it must be a string"),
    ("bad.parquet", b"PAR1 and then nothing PAR1", r"^bad\.parquet: (not a readable parquet file|cannot be read)"),
    ("none.parquet", b"", r"^none\.parquet: (not a readable parquet file|cannot be read)"),
]


@pytest.mark.parametrize(("name", "content", "message"), HOSTILE, ids=[name for name, _, _ in HOSTILE])
def test_hostile_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet")
    (tmp_path / name).write_bytes(content)
    for load in (calibrate, evaluate):
        with pytest.raises(FileError, match=message) as caught:
            load(str(tmp_path / name))
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)


def test_hostile_parquet_tables(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    for table, message in [
        ({"body": ["a"], "n": [1]}, r"^t\.parquet: no column 'text'; columns found: body, n"),
        ({"text": ["a", None]}, r"^t\.parquet, row 2: 'text' holds a NoneType; it must be a string"),
        ({"text": []}, r"^t\.parquet: the file is empty"),
    ]:
        parquet.write_table(arrow.table(table), tmp_path / "t.parquet")
        with pytest.raises(FileError, match=message):
            calibrate(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize(
    ("n_samples", "seq_len", "advice"),
    [
        (128, 10, "docs: 3 full chunks of 10 tokens (30 tokens in all), n_samples is 128; lower n_samples to 3, or"),
        (4, 10, "n_samples is 4; lower n_samples to 3 or seq_len to 7, or pass more text"),
        (2, 31, "docs: 0 full chunks of 31 tokens (30 tokens in all), n_samples is 2; lower seq_len to 15, or"),
        (31, 31, "n_samples is 31; pass more text"),
    ],
)
def test_too_little_text_says_what_fits(tmp_path: Path, n_samples: int, seq_len: int, advice: str) -> None:
    source = write_jsonl(tmp_path / "docs.jsonl", ["a" * 14, "b" * 14])
    with pytest.raises(RequestError, match=re.escape(advice)):
        load_calibration(source, TOKENIZER, n_samples=n_samples, seq_len=seq_len)


def test_too_little_text_for_one_window(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(RequestError, match=r"^short: 3 tokens, less than one window of seq_len 8; lower seq_len to 3"):
        load_evaluation(str(tmp_path / "short.txt"), TOKENIZER, 8)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "docs.jsonl", TEXTS)
    highest = int(load_calibration(source, TOKENIZER, n_samples=2, seq_len=16).input_ids.max())
    load_calibration(source, TOKENIZER, n_samples=2, seq_len=16, vocab_size=highest + 1)
    message = f"^docs: token id {highest} is outside the model's vocabulary of {highest}; the tokenizer belongs"
    with pytest.raises(RequestError, match=message):
        load_calibration(source, TOKENIZER, n_samples=2, seq_len=16, vocab_size=highest)
    with pytest.raises(RequestError, match=r"outside the model's vocabulary of 5;"):
        load_evaluation(source, TOKENIZER, 16, vocab_size=5)


def calibrate(source: str) -> Calibration:
    return load_calibration(source, TOKENIZER, n_samples=100, seq_len=8)


def evaluate(source: str) -> object:
    return load_evaluation(source, TOKENIZER, 8)
