"""The final folder: assembled in the work folder, then renamed into place whole. It holds no times and no paths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calib.pictures import CalibrationSet
from quantkit.errors import FileError
from quantkit.formats.accounting import Account, account
from quantkit.formats.checkpoint import FORMAT_VERSION, QUANT_METHOD, PackedModule, write_checksums, write_model
from quantkit.formats.files import read_json, write_json
from quantkit.formats.safetensors_io import TensorRef, read_header
from quantkit.formats.storage import spec_from_json
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline.allocate import FILE as ALLOCATION
from quantkit.pipeline.journal import Journal, refuse_existing
from quantkit.pipeline.outside import FILE as OUTSIDE
from quantkit.pipeline.outside import OutsideMatrix
from quantkit.pipeline.request import QuantizeRequest
from quantkit.pipeline.train import FILE as TRAINING
from quantkit.pipeline.train import REST as TRAINED_REST

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_REPLACED = ("config.json", "model.safetensors.index.json", "recipe.json", "report.json", "checksums.json")


def assemble(
    skeleton: Skeleton,
    journal: Journal,
    request: QuantizeRequest,
    calibration: CalibrationSet | None,
    outside: Sequence[OutsideMatrix],
    outside_entries: dict[str, dict[str, Any]],
) -> Account:
    """Write the output folder and remove the work folder; returns where the bytes of the tensors went.

    Raises:
        FileError: the disk is full or not writable; the work folder stays, and the same command goes on from it.
    """
    folder = journal.folder / "final"
    linears = {name: entry for block in journal.finished for name, entry in block.modules.items()}
    modules = linears | outside_entries
    refs = _tensor_refs(skeleton, journal, linears, outside)
    quantization = _quantization_config(request, calibration, linears, modules)
    packed = [PackedModule(name, entry["prefix"], spec_from_json(entry["spec"])) for name, entry in modules.items()]
    written = account(packed, refs)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_model(folder, refs, request.max_shard_bytes)
        _copy_companions(skeleton.folder, folder, request.trust_remote_code)
        write_json(folder / "recipe.json", request.recipe.to_json())
        report = _report(modules, quantization["bpw"], written)
        write_json(folder / "report.json", report | _block_errors(skeleton, journal) | _decisions(journal))
        card = _model_card(skeleton.folder, request, quantization["bpw"], written)
        (folder / "README.md").write_text(card, encoding="utf-8")
        config = read_json(skeleton.folder / "config.json")
        changes = skeleton.transform.config_changes if skeleton.transform else {}
        write_json(folder / "config.json", config | changes | {"quantization_config": quantization})
        write_checksums(folder)
        refuse_existing(request.output, request.overwrite)  # once more: the run may have taken days
        _put_in_place(folder, request.output, journal.folder / "replaced")
    except OSError as error:
        raise FileError(
            f"cannot write {request.output}: {error.strerror}; the same command goes on from here"
        ) from error
    journal.remove()
    return written


def _put_in_place(folder: Path, output: Path, replaced: Path) -> None:
    """Rename, after everything is on disk; what was there is moved aside in one step, never deleted piece by piece."""
    for path in (*folder.iterdir(), folder):
        _sync(path)
    if output.exists():
        os.replace(output, replaced)
    os.replace(folder, output)
    _sync(Path(os.path.abspath(output)).parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensor_refs(
    skeleton: Skeleton, journal: Journal, linears: dict[str, dict[str, Any]], outside: Sequence[OutsideMatrix]
) -> list[TensorRef]:
    """Source tensors; packed ones instead of each quantized weight, and changed ones where a transform changed them."""
    replaced = {f"{entry['prefix']}.weight" for entry in linears.values()}
    replaced |= {ref.name for matrix in outside for ref in matrix.replaced}
    files = [block.file for block in journal.finished] + ([OUTSIDE] if outside else [])
    written = [ref for file in files for ref in read_header(journal.folder / file).values()]
    if skeleton.transform is not None:
        replaced |= {skeleton.source_name(name) for name in skeleton.transform.touched}
        written += skeleton.transform.write_outside(journal.folder)
    if (journal.folder / TRAINED_REST).exists():
        trained = read_header(journal.folder / TRAINED_REST)
        replaced |= trained.keys()
        written += trained.values()
    kept = [ref for name, ref in skeleton.tensors.items() if name not in replaced]
    return sorted(kept + written, key=lambda ref: ref.name)


def _quantization_config(
    request: QuantizeRequest,
    calibration: CalibrationSet | None,
    linears: dict[str, dict[str, Any]],
    modules: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    specs = [spec_from_json(entry["spec"]) for entry in linears.values()]
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "quantkit_version": __version__,
        "bpw": 8 * sum(spec.n_bytes for spec in specs) / sum(spec.n_weights for spec in specs),
        "recipe": request.recipe.to_json(),
        "calibration": calibration.to_json() if calibration else None,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "modules": {name: {"prefix": entry["prefix"], "spec": entry["spec"]} for name, entry in modules.items()},
    }


def _report(modules: dict[str, dict[str, Any]], bpw: float, written: Account) -> dict[str, Any]:
    rows = []
    for name, entry in modules.items():
        spec = spec_from_json(entry["spec"])
        measured = {key: entry[key] for key in ("relative_error", "damping") if key in entry}
        rows.append(
            {"name": name, "format": entry["spec"]["format"], "bpw": spec.bpw, "bytes": spec.n_bytes} | measured
        )
    return {
        "bpw": bpw,  # of the blocks' linears
        "bytes": written.bytes,
        "bits_per_parameter": written.bits_per_parameter,  # of the whole model
        "modules": rows,
    }


def _block_errors(skeleton: Skeleton, journal: Journal) -> dict[str, Any]:
    """What quantizing each block does to image and to text tokens; nothing without pictures."""
    rows = [{"name": skeleton.blocks[block.index].name, **block.errors} for block in journal.finished if block.errors]
    return {"blocks": rows} if rows else {}


def _decisions(journal: Journal) -> dict[str, Any]:
    """What an allocator saw and decided, and how a training went; nothing where there was neither."""
    allocation, training = journal.folder / ALLOCATION, journal.folder / TRAINING
    found = read_json(training) if training.exists() else {}
    if allocation.exists():
        found["allocation"] = {
            key: value for key, value in read_json(allocation).items() if key not in ("widths", "group_sizes")
        }
    return found


def _copy_companions(source: Path, target: Path, trust_remote_code: bool) -> None:
    """Tokenizer, processor, generation config, chat template, licence: everything but weights."""
    patterns = (*_COPIED, "*.py") if trust_remote_code else _COPIED
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_file() and path.name not in _REPLACED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _model_card(source: Path, request: QuantizeRequest, bpw: float, written: Account) -> str:
    recipe = request.recipe
    name = Path(request.model).name if request.model != "demo" else "quantkit demo"
    licence = _licence(source)
    header = ["---", "library_name: transformers", "tags:", "- quantkit", "- quantized"]
    header += [f"license: {licence}"] if licence else []
    header += ["base_model_relation: quantized", "---"]
    settings = ", ".join(
        f"{key}={value}" for key, value in recipe.to_json().items() if key not in ("method", "bits", "bpw")
    )
    places = ", ".join(f"{kind} {n_bytes / 1e6:.1f} MB" for kind, n_bytes in written.bytes.items() if n_bytes)
    body = f"""
# {name}, {recipe.method}, {recipe.budget_name}

Quantized by quantkit: {bpw:.3f} stored bits per weight in the quantized layers (codes, scales, zeros, index),
{written.n_bytes / 1e6:.1f} MB of tensors in all ({places}), {written.bits_per_parameter:.3f} bits per parameter of the
whole model. Settings: {settings}.

```python
import quantkit

model = quantkit.load("THIS_FOLDER")
```

Per-layer errors are in `report.json`, the recipe in `recipe.json`, SHA-256 sums in `checksums.json`.
"""
    return "\n".join(header) + "\n" + body


def _licence(source: Path) -> str | None:
    """The base model's licence, from its card's metadata."""
    card = source / "README.md"
    if not card.is_file():
        return None
    for line in card.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
        if line.startswith("license:"):
            return line.partition(":")[2].strip() or None
    return None
