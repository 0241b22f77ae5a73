"""safetensors files, read and written as plain byte ranges.

    bytes 0..7          n, unsigned 64-bit little-endian: length of the header
    bytes 8..8+n-1      JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}
    bytes 8+n..         the tensors, row-major little-endian, back to back; offsets count from here

Why not the safetensors package: a memory map counts as resident memory page by page, so that streaming a large model
through it looks (and under a memory limit behaves) like loading it; a plain read into a fresh buffer does not. Writing
ourselves allows streaming from file to file, fsync before the rename, and one named error per kind of damage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats.files import read_json, replace_file, write_json

DTYPES: dict[str, torch.dtype] = {  # in the order of the safetensors package, whose files this module reproduces
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_RANKS = {name: rank for rank, name in enumerate(DTYPES)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
_COPY_BYTES = 1 << 24  # scratch of a file-to-file copy

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where the bytes of one tensor are. ``dataclasses.replace(ref, name=...)`` renames it for `write_model`."""

    name: str
    path: Path
    dtype: str  # safetensors spelling: "BF16"
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    n_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


def read_header(path: Path) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file, in file order, after checking the whole header against the file's size.

    Raises:
        FileError: no such file, truncated, broken JSON, repeated name, unknown dtype, offsets that overlap, leave a gap
            or disagree with dtype and shape; names the file and, where there is one, the tensor.
    """
    try:
        with open(path, "rb") as file:
            n_file = file.seek(0, 2)
            file.seek(0)
            start, entries = _read_entries(path, file, n_file)
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    refs = [_parse_entry(path, name, entry, start) for name, entry in entries.items() if name != "__metadata__"]
    refs.sort(key=lambda ref: (ref.offset, ref.offset + ref.n_bytes))
    _check_contiguous(path, refs, start, n_file)
    return {ref.name: ref for ref in refs}


def _read_entries(path: Path, file: BinaryIO, n_file: int) -> tuple[int, dict[str, Any]]:
    """The absolute offset of the data and the parsed header."""
    n_header = int.from_bytes(file.read(8), "little")
    if n_file < 8 or n_header > min(n_file - 8, _MAX_HEADER_BYTES):
        raise FileError(f"{path}: not a safetensors file, or truncated inside its header ({n_file} bytes)")
    try:
        entries = json.loads(file.read(n_header), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: the safetensors header is broken ({error}); the file is damaged") from error
    if not isinstance(entries, dict):
        raise FileError(f"{path}: the safetensors header is not a JSON object; the file is damaged")
    return 8 + n_header, entries


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"name {repeated!r} appears twice")
    return content


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorRef:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{where}: expected the fields dtype, shape, data_offsets; the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileError(f"{where}: dtype {dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    sizes_ok = isinstance(shape, list) and all(map(_is_count, shape))
    offsets_ok = isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))
    if not sizes_ok or not offsets_ok or offsets[0] > offsets[1]:
        raise FileError(f"{where}: shape {shape} or data_offsets {offsets} make no sense; the file is damaged")
    n_bytes = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != n_bytes:
        found = offsets[1] - offsets[0]
        raise FileError(f"{where}: {dtype} {shape} needs {n_bytes} bytes, its data_offsets hold {found}")
    return TensorRef(name, path, dtype, tuple(shape), start + offsets[0], n_bytes)


def _check_contiguous(path: Path, refs: list[TensorRef], start: int, n_file: int) -> None:
    if refs and refs[0].offset != start:
        raise FileError(f"{path}: gap of {refs[0].offset - start} bytes before tensor {refs[0].name}")
    for before, after in pairwise(refs):
        gap = after.offset - (before.offset + before.n_bytes)
        if gap < 0:
            raise FileError(f"{path}: tensors {before.name} and {after.name} overlap by {-gap} bytes")
        if gap > 0:
            raise FileError(f"{path}: gap of {gap} bytes before tensor {after.name}")
    end = refs[-1].offset + refs[-1].n_bytes if refs else start
    if n_file < end:
        cut = next(ref.name for ref in refs if ref.offset + ref.n_bytes > n_file)
        raise FileError(f"{path}: truncated: {n_file} bytes, {end} required (tensor {cut} is cut); copy the file again")
    if n_file > end:
        raise FileError(f"{path}: {n_file - end} bytes follow the last tensor; the file is damaged")


def read_tensor(ref: TensorRef) -> Tensor:
    """The tensor, in a fresh CPU buffer of its own. Raises `FileError` when the file is gone or has become shorter."""
    buffer = torch.empty(ref.n_bytes, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with open(ref.path, "rb", buffering=0) as file:
            file.seek(ref.offset)
            done = 0
            while done < ref.n_bytes:  # one read call returns at most 2 GiB
                n_read = file.readinto(view[done:])
                if not n_read:
                    raise FileError(f"{ref.path}: truncated inside tensor {ref.name}; copy the file again")
                done += n_read
    except OSError as error:
        raise FileError(f"{ref.path}: tensor {ref.name} cannot be read: {error.strerror}") from error
    return buffer.view(ref.torch_dtype).reshape(ref.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; the same tensors give the same bytes, in whatever order they come.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    assert sys.byteorder == "little", "safetensors is little-endian"
    refs = []
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.dtype.itemsize
        refs.append(TensorRef(name, path, _NAMES[tensor.dtype], tuple(tensor.shape), 0, n_bytes))
    refs.sort(key=_file_order)
    header = _header_bytes(refs)
    with replace_file(path, len(header) + sum(ref.n_bytes for ref in refs)) as file:
        file.write(header)
        for ref in refs:
            file.write(_bytes_of(tensors[ref.name]))


def row_pieces(ref: TensorRef, n_numbers: int) -> list[TensorRef]:
    """A matrix as consecutive pieces of whole rows, each of about so many numbers."""
    n_rows, *rest = ref.shape
    per_piece = max(1, n_numbers // max(1, prod(rest)))
    row_bytes = prod(rest) * ref.torch_dtype.itemsize
    pieces = []
    for start in range(0, n_rows, per_piece):
        rows = min(per_piece, n_rows - start)
        shape, offset = (rows, *rest), ref.offset + start * row_bytes
        pieces.append(replace(ref, shape=shape, offset=offset, n_bytes=rows * row_bytes))
    return pieces


def write_pieces(path: Path, ref: TensorRef, pieces: Iterable[Tensor]) -> None:
    """Write one tensor to a safetensors file of its own, piece by piece.

    Args:
        ref: its name, dtype and shape.
        pieces: of that dtype; one after the other they are the tensor.

    Raises:
        FileError: the disk is full or the folder cannot be written.
    """
    header = _header_bytes([ref])
    with replace_file(path, len(header) + ref.n_bytes) as file:
        file.write(header)
        for piece in pieces:
            assert piece.dtype == ref.torch_dtype, ref.name
            file.write(_bytes_of(piece))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _file_order(ref: TensorRef) -> tuple[int, str]:
    """Wide dtypes first, so that every tensor is aligned to its own size: readers view mapped bytes as numbers."""
    return -_RANKS[ref.dtype], ref.name


def _header_bytes(refs: Iterable[TensorRef]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for ref in refs:
        begin, end = end, end + ref.n_bytes
        entries[ref.name] = {"dtype": ref.dtype, "shape": list(ref.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # data starts on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write_model(folder: Path, refs: Sequence[TensorRef], max_shard_bytes: int) -> list[Path]:
    """Stream tensors from their files into the safetensors file(s) of a model folder.

    Args:
        folder: exists already; files of the same names are replaced.
        refs: in the order of the model; consecutive tensors share a shard. Names must differ.
        max_shard_bytes: a larger total is split; a single tensor is never split.

    Returns:
        The written files: ``model.safetensors``, or the shards followed by ``model.safetensors.index.json``.

    Raises:
        FileError: a name given twice, a source file that is gone or shorter than its header said, disk full.
    """
    shards = _split(refs, max_shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    n_left = sum(ref.n_bytes for ref in refs)
    for name, shard in zip(names, shards, strict=True):
        _copy_shard(folder / name, shard, n_left)
        n_left -= sum(ref.n_bytes for ref in shard)
    written = [folder / name for name in names]
    if len(shards) > 1:
        weight_map = {ref.name: name for name, shard in zip(names, shards, strict=True) for ref in shard}
        total = sum(ref.n_bytes for ref in refs)
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append(folder / INDEX_FILE)
    return written


def _split(refs: Sequence[TensorRef], max_shard_bytes: int) -> list[list[TensorRef]]:
    shards: list[list[TensorRef]] = [[]]
    seen: set[str] = set()
    n_bytes = 0
    for ref in refs:
        if ref.name in seen:
            raise FileError(f"tensor {ref.name} would be written twice (second from {ref.path})")
        seen.add(ref.name)
        if shards[-1] and n_bytes + ref.n_bytes > max_shard_bytes:
            shards.append([])
            n_bytes = 0
        shards[-1].append(ref)
        n_bytes += ref.n_bytes
    return shards


def _copy_shard(path: Path, refs: list[TensorRef], n_left: int) -> None:
    ordered = sorted(refs, key=_file_order)
    with replace_file(path, n_left) as file:
        file.write(_header_bytes(ordered))
        for ref in ordered:
            _copy_bytes(ref, file)


def _copy_bytes(ref: TensorRef, target: BinaryIO) -> None:
    try:
        source = open(ref.path, "rb", buffering=0)  # noqa: SIM115 - its errors are not those of the target
    except OSError as error:
        raise FileError(f"{ref.path}: tensor {ref.name} cannot be read: {error.strerror}") from error
    with source:
        source.seek(ref.offset)
        left = ref.n_bytes
        while left:
            chunk = source.read(min(left, _COPY_BYTES))
            if not chunk:
                raise FileError(f"{ref.path}: truncated inside tensor {ref.name}; copy the file again")
            target.write(chunk)
            left -= len(chunk)


def find_tensors(folder: Path) -> dict[str, TensorRef]:
    """Every tensor of a model folder: ``model.safetensors``, or the shards that its index lists.

    Raises:
        FileError: no weights, a missing shard, a shard without a tensor that the index promises, or the reverse.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise FileError(f"{folder}: no weights ({SINGLE_FILE} or {INDEX_FILE}); only safetensors are read")
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index}: no weight_map; the file is damaged")
    tensors: dict[str, TensorRef] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise FileError(f"{index}: shard name {shard!r} is not a .safetensors file of this folder")
        if not (folder / shard).is_file():
            raise FileError(f"{folder / shard}: no such file, but {INDEX_FILE} lists it; copy the folder again")
        header = read_header(folder / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        if listed != set(header):
            name = min(listed ^ set(header))
            state = "lists it, the shard has no such tensor" if name in listed else "does not list it for this shard"
            raise FileError(f"{folder / shard}: tensor {name}: {INDEX_FILE} {state}")
        tensors.update(header)
    return tensors
