"""Where calibration and evaluation text comes from: names, files and folders, read one document at a time.

A source is one of

- ``builtin``: text that every CPython carries (`quantkit.demo.corpus`), no download;
- ``wikitext2`` or ``c4``: hub data sets, read through the optional package ``datasets``;
- a file: ``.txt`` (the whole file is one document), ``.jsonl`` or ``.json`` (one object per line, field ``text``),
  ``.parquet`` (column ``text``);
- a folder of such files, read in the order of their names; other files and subfolders in it are left alone.

The names win over files of the same name; write ``./c4`` for a file that is called ``c4``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import FileError, RequestError, did_you_mean, first_line

NAMES = ("builtin", "wikitext2", "c4")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
TEXT_FIELD = "text"

# Arguments of `datasets.load_dataset`, by data set and use. The files are those of the GPTQ line of papers.
HUB_DATASETS: Mapping[str, Mapping[str, Any]] = {
    "wikitext2/calibration": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
    "wikitext2/evaluation": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
    "c4/calibration": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        "split": "train",
    },
    "c4/evaluation": {
        "path": "allenai/c4",
        "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        "split": "validation",
    },
}


def source_name(source: str) -> str:
    """The label of a source: the name of a data set, a file's stem, or a folder's name. Reads no text.

    Raises:
        RequestError: `source` is neither a known name nor a text file or folder that can be read as text.
    """
    if source in NAMES:
        return source
    path = Path(source)
    if path.is_dir():
        _folder_files(path)
        return path.resolve().name
    if not path.is_file():
        hint = did_you_mean(source, NAMES)
        raise RequestError(f"{source}: no such file or folder, and no data set of that name; {hint}")
    if path.suffix.lower() not in SUFFIXES:
        kinds = ", ".join(SUFFIXES)
        raise RequestError(f"{path.name}: unknown kind of text file {path.suffix!r}; use one of {kinds}")
    return path.stem


def local_documents(source: str) -> Iterator[str]:
    """Documents of a file, or of a folder's files in the order of their names, read as they are asked for.

    Raises:
        RequestError: see `source_name`.
        FileError: a file that is empty, not UTF-8, not JSON, or without the field ``text``; names the line.
    """
    source_name(source)
    path = Path(source)
    for file in _folder_files(path) if path.is_dir() else [path]:
        read = {".txt": _txt_documents, ".parquet": _parquet_documents}.get(file.suffix.lower(), _jsonl_documents)
        n_documents = 0
        try:
            for text in read(file):
                n_documents += 1
                yield text
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise FileError(f"{file.name}: cannot be read ({reason})") from error
        if n_documents == 0:
            raise FileError(f"{file.name}: the file is empty; it must hold at least one document")


def builtin_documents(split: Literal["train", "heldout"]) -> list[str]:
    """Documents of the text that CPython carries."""
    # Imported here: a run on the user's own text needs no standard library sources.
    from quantkit.demo import corpus

    return corpus.documents(split)


def hub_rows(key: str, hub: Mapping[str, Mapping[str, Any]]) -> Any:
    """The rows of a hub data set: a `datasets.Dataset` with the column ``text``.

    Args:
        key: an entry of `hub`, such as ``c4/calibration``.
        hub: arguments of `datasets.load_dataset` for each entry.

    Raises:
        RequestError: the package ``datasets`` is not installed.
        FileError: the data set is not in the local cache and cannot be fetched.
    """
    name = key.partition("/")[0]
    datasets = _import_optional("datasets", f"the data set {name}")
    try:
        rows = datasets.load_dataset(**hub[key])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"{name}: cannot be fetched from the Hugging Face hub ({reason}); "
            "connect once to fill its cache, or pass a local .txt, .jsonl or .parquet file, or builtin"
        ) from error
    if TEXT_FIELD not in rows.column_names:
        raise FileError(f"{name}: no column {TEXT_FIELD!r}; its columns are {', '.join(rows.column_names)}")
    return rows


def _folder_files(folder: Path) -> list[Path]:
    if (folder / "metadata.jsonl").is_file():
        raise RequestError(
            f"{folder.name}: holds metadata.jsonl, a set of pictures for vision-language models, "
            "which is no text; ask about it with eval --vqa, or pass a text file or a folder of text files"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES)
    if not files:
        raise RequestError(f"{folder.name}: no text file in this folder; known kinds: {', '.join(SUFFIXES)}")
    return files


def _txt_documents(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise FileError(f"{path.name}: not UTF-8 at byte {error.start}; convert the file to UTF-8") from error
    if text.strip():
        yield text


def _jsonl_documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name}, line {number}"
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise FileError(f"{where}: not UTF-8; convert the file to UTF-8") from error
            if text.strip():
                yield _text_field(text, where)


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{where}: not valid JSON ({error}); each line must hold one JSON object") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise FileError(f"{where}: found a JSON {kind}; each line must hold one object with the field 'text'")
    if TEXT_FIELD not in record:
        found = ", ".join(record) or "none"
        raise FileError(f"{where}: no field 'text'; fields found: {found}; rename the one that holds the text")
    text = record[TEXT_FIELD]
    if not isinstance(text, str):
        raise FileError(f"{where}: the field 'text' holds a {type(text).__name__}; it must be a string")
    return text


def _parquet_documents(path: Path) -> Iterator[str]:
    parquet = _import_optional("pyarrow.parquet", f"{path.name}: reading parquet")
    arrow = _import_optional("pyarrow", f"{path.name}: reading parquet")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if TEXT_FIELD not in columns:
                found = ", ".join(columns) or "none"
                raise FileError(f"{path.name}: no column 'text'; columns found: {found}")
            row = 0
            for batch in file.iter_batches(columns=[TEXT_FIELD], batch_size=1024):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise FileError(f"{path.name}, row {row}: 'text' holds a {kind}; it must be a string")
                    yield text
    except arrow.ArrowException as error:
        raise FileError(f"{path.name}: not a readable parquet file ({first_line(error)}); write it again") from error


def _import_optional(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise RequestError(f'{what} needs the package {package}; pip install "quantkit[data]"') from error
