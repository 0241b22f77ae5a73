"""The quantkit model folder: what `quantize` writes and `load` trusts (docs/format.md has it field by field).

    config.json      the model's own, plus "quantization_config": {"quant_method": "quantkit", "format_version": 1,
                     "modules": {RUNTIME_NAME: {"prefix": TENSOR_PREFIX, "spec": {...}}}, ...}
    *.safetensors    PREFIX.codes_2b, PREFIX.scales, ... per packed module, and PREFIX.weight: the tripwire
    checksums.json   SHA-256 of every other file

The tripwire is a float16 tensor of shape [0] where another reader expects the dense weight. Without it, transformers
without quantkit would report a missing weight, initialize it at random, and go on; with it, the shape check fails.
Modules inside mixture-of-experts blocks have none: the models' own converters stack whatever ends in ``.weight`` there.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import FileError
from quantkit.formats import storage
from quantkit.formats.files import read_json, write_json
from quantkit.formats.safetensors_io import (
    TensorRef,
    find_tensors,
    read_header,
    read_tensor,
    write_model,
    write_tensors,
)
from quantkit.formats.spec import Spec

__all__ = [
    "FORMAT_VERSION",
    "TRIPWIRE",
    "Checkpoint",
    "PackedModule",
    "TensorRef",
    "check_tensors",
    "check_values",
    "find_tensors",
    "has_tripwire",
    "open_folder",
    "parse_modules",
    "read_header",
    "read_tensor",
    "verify_checksums",
    "write_checksums",
    "write_model",
    "write_tensors",
]

QUANT_METHOD = "quantkit"
FORMAT_VERSION = 1
TRIPWIRE = "weight"
CHECKSUMS_FILE = "checksums.json"
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class PackedModule:
    """One entry of ``quantization_config["modules"]``."""

    name: str  # as the model calls it at run time
    prefix: str  # as the files call its tensors
    spec: Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened and checked quantkit folder; no tensor has been read yet."""

    folder: Path
    config: dict[str, Any]
    quantization_config: dict[str, Any]
    modules: dict[str, PackedModule]
    tensors: dict[str, TensorRef]

    def read_module(self, name: str) -> dict[str, Tensor]:
        """The stored tensors of a packed module, checked. Raises `FileError` for values no writer produces."""
        module = self.modules[name]
        tensors = {key: read_tensor(self.tensors[f"{module.prefix}.{key}"]) for key in module.spec.tensor_layout()}
        check_values(name, module.spec, tensors)
        return tensors


def has_tripwire(name: str) -> bool:
    """Whether the packed module of this runtime name stores the zero-element ``weight``.

    >>> has_tripwire("model.layers.0.mlp.down_proj"), has_tripwire("model.layers.0.mlp.experts.7.down_proj")
    (True, False)
    """
    return _EXPERT.search(name) is None


def open_folder(folder: Path) -> Checkpoint:
    """Open a quantkit folder and check everything that costs no tensor read.

    Raises:
        FileError: no such folder, not a quantkit folder, a newer ``format_version``, unknown or missing fields of a
            module, a damaged or missing shard, a module's tensor missing, superfluous, or of the wrong dtype or shape.
    """
    if not folder.is_dir():
        raise FileError(f"no folder {folder}")
    config = read_json(folder / "config.json")
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise FileError(f"{folder}: not a quantkit folder (config.json has no quantization_config of quantkit)")
    modules = parse_modules(quantization)
    tensors = find_tensors(folder)
    check_tensors(modules, tensors)
    return Checkpoint(folder=folder, config=config, quantization_config=quantization, modules=modules, tensors=tensors)


def parse_modules(quantization: dict[str, Any]) -> dict[str, PackedModule]:
    """The packed modules that a ``quantization_config`` describes, by runtime name.

    Raises:
        FileError: ``format_version`` missing or newer, no modules, or an entry with unknown, missing or wrong fields.
    """
    version = quantization.get("format_version")
    if type(version) is not int or version < 1:
        raise FileError(f"quantization_config: format_version is {version!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise FileError(
            f"format_version {version} is newer than this quantkit reads ({FORMAT_VERSION}); update quantkit"
        )
    entries = quantization.get("modules")
    if not isinstance(entries, dict) or not entries:
        raise FileError("quantization_config: no modules; the file is damaged or not complete")
    modules = {name: _parse_module(name, entry) for name, entry in entries.items()}
    owners: dict[str, str] = {}
    for name, module in modules.items():
        other = owners.setdefault(module.prefix, name)
        if other != name:
            raise FileError(f"quantization_config: modules {other} and {name} share the prefix {module.prefix}")
    return modules


def _parse_module(name: str, entry: Any) -> PackedModule:
    where = f"quantization_config: module {name}"
    if not isinstance(entry, dict) or set(entry) != {"prefix", "spec"}:
        fields = sorted(entry) if isinstance(entry, dict) else entry
        raise FileError(f"{where}: expected the fields prefix and spec, found {fields}")
    prefix, spec = entry["prefix"], entry["spec"]
    if not isinstance(prefix, str) or not prefix or not isinstance(spec, dict):
        raise FileError(f"{where}: prefix must be a name and spec an object")
    try:
        return PackedModule(name, prefix, storage.spec_from_json(spec))
    except FileError as error:
        raise FileError(f"{where}: {error}") from None
    except (TypeError, ValueError) as error:
        raise FileError(f"{where}: a field of its spec has the wrong type ({error})") from error


def check_tensors(modules: dict[str, PackedModule], tensors: dict[str, TensorRef]) -> None:
    """Check that each packed module owns exactly its layout, the tripwire where it has one, and possibly a bias.

    Raises:
        FileError: a tensor of a module that is missing, superfluous, or of the wrong dtype or shape; by name.
    """
    present: dict[str, dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        prefix, _, key = name.rpartition(".")
        present.setdefault(prefix, {})[key] = ref
    for module in modules.values():
        layout = dict(module.spec.tensor_layout())
        if has_tripwire(module.name):
            layout[TRIPWIRE] = (torch.float16, (0,))
        found = present.get(module.prefix, {})
        for key, (dtype, shape) in layout.items():
            if key not in found:
                raise FileError(f"tensor {module.prefix}.{key} is missing; the folder is not complete, copy it again")
            _check_tensor(found[key], dtype, shape)
        for key in sorted(set(found) - set(layout) - {"bias"}):
            path = found[key].path
            raise FileError(f"{path}: tensor {module.prefix}.{key} does not belong to its packed module")
        if "bias" in found:
            _check_tensor(found["bias"], found["bias"].torch_dtype, (module.spec.out_features,))


def _check_tensor(ref: TensorRef, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if ref.torch_dtype != dtype or ref.shape != shape:
        required = f"{str(dtype).removeprefix('torch.')} {list(shape)}"
        found = f"{str(ref.torch_dtype).removeprefix('torch.')} {list(ref.shape)}"
        raise FileError(f"{ref.path}: tensor {ref.name} is {found}, its module description requires {required}")


def check_values(name: str, spec: Spec, tensors: dict[str, Tensor]) -> None:
    """Refuse stored values that no writer of the format produces. Raises `FileError` with the module's name."""
    try:
        storage.check(spec, tensors)
    except FileError as error:
        raise FileError(f"{name}: {error}") from None


def write_checksums(folder: Path) -> None:
    """Write ``checksums.json``: the SHA-256 of every file in the folder and below, hidden ones excepted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in names if name != CHECKSUMS_FILE and not any(p.startswith(".") for p in name.split("/"))]
    write_json(folder / CHECKSUMS_FILE, {name: _sha256(folder / name) for name in kept})


def verify_checksums(folder: Path) -> None:
    """Compare every file with ``checksums.json``; of files that it does not list, only weights are refused.

    Raises:
        FileError: no (or a broken) ``checksums.json``, a listed file that is missing, a file that differs, weights
            that are not listed; by name.
    """
    if not (folder / CHECKSUMS_FILE).is_file():
        raise FileError(f"{folder}: no {CHECKSUMS_FILE} to compare with; quantkit quantize writes it")
    checksums = read_json(folder / CHECKSUMS_FILE)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in checksums:
            raise FileError(f"{path}: not listed in {CHECKSUMS_FILE}; it was added or changed later")
    for name, expected in sorted(checksums.items()):
        relative = Path(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise FileError(f"{folder / CHECKSUMS_FILE}: {name!r} is not inside the folder")
        if not (folder / relative).is_file():
            raise FileError(f"{folder / relative}: no such file, but {CHECKSUMS_FILE} lists it; copy the folder again")
        if _sha256(folder / relative) != expected:
            raise FileError(
                f"{folder / relative}: SHA-256 differs from {CHECKSUMS_FILE}; the file was changed or damaged"
            )


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
