"""The final folder: assembled in the work folder, then renamed into place whole. It holds no times and no paths."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calib.pictures import CalibrationSet
from quantkit.errors import FileError
from quantkit.formats.checkpoint import FORMAT_VERSION, QUANT_METHOD, write_checksums, write_model
from quantkit.formats.files import read_json, write_json
from quantkit.formats.safetensors_io import TensorRef, read_header
from quantkit.formats.storage import spec_from_json
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline.allocate import FILE as ALLOCATION
from quantkit.pipeline.journal import Journal, refuse_existing
from quantkit.pipeline.request import QuantizeRequest

_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_REPLACED = ("config.json", "model.safetensors.index.json", "recipe.json", "report.json", "checksums.json")


def assemble(skeleton: Skeleton, journal: Journal, request: QuantizeRequest, calibration: CalibrationSet | None) -> int:
    """Write the output folder and remove the work folder; returns the bytes of the safetensors tensors.

    Raises:
        FileError: the disk is full or not writable; the work folder stays, and the same command goes on from it.
    """
    folder = journal.folder / "final"
    modules = {name: entry for block in journal.finished for name, entry in block.modules.items()}
    refs = _tensor_refs(skeleton, journal, modules)
    quantization = _quantization_config(request, calibration, modules)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_model(folder, refs, request.max_shard_bytes)
        _copy_companions(skeleton.folder, folder, request.trust_remote_code)
        write_json(folder / "recipe.json", request.recipe.to_json())
        report = _report(modules, quantization["bpw"]) | _block_errors(skeleton, journal) | _allocation(journal)
        write_json(folder / "report.json", report)
        card = _model_card(skeleton.folder, request, quantization["bpw"], refs)
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
    return sum(ref.n_bytes for ref in refs)


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


def _tensor_refs(skeleton: Skeleton, journal: Journal, modules: dict[str, dict[str, Any]]) -> list[TensorRef]:
    """Source tensors; packed ones instead of each quantized weight, and changed ones where a transform changed them."""
    replaced = {f"{entry['prefix']}.weight" for entry in modules.values()}
    packed = [ref for block in journal.finished for ref in read_header(journal.folder / block.file).values()]
    outside = []
    if skeleton.transform is not None:
        replaced |= {skeleton.source_name(name) for name in skeleton.transform.touched}
        outside = skeleton.transform.write_outside(journal.folder)
    kept = [ref for name, ref in skeleton.tensors.items() if name not in replaced]
    return sorted(kept + packed + outside, key=lambda ref: ref.name)


def _quantization_config(
    request: QuantizeRequest, calibration: CalibrationSet | None, modules: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    specs = [spec_from_json(entry["spec"]) for entry in modules.values()]
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


def _report(modules: dict[str, dict[str, Any]], bpw: float) -> dict[str, Any]:
    rows = []
    for name, entry in modules.items():
        spec = spec_from_json(entry["spec"])
        measured = {key: entry[key] for key in ("relative_error", "damping") if key in entry}
        rows.append(
            {"name": name, "format": entry["spec"]["format"], "bpw": spec.bpw, "bytes": spec.n_bytes} | measured
        )
    return {"bpw": bpw, "modules": rows}


def _block_errors(skeleton: Skeleton, journal: Journal) -> dict[str, Any]:
    """What quantizing each block does to image and to text tokens; nothing without pictures."""
    rows = [{"name": skeleton.blocks[block.index].name, **block.errors} for block in journal.finished if block.errors]
    return {"blocks": rows} if rows else {}


def _allocation(journal: Journal) -> dict[str, Any]:
    """What an allocator saw and decided; nothing where all widths are equal."""
    path = journal.folder / ALLOCATION
    if not path.exists():
        return {}
    return {"allocation": {key: value for key, value in read_json(path).items() if key != "widths"}}


def _copy_companions(source: Path, target: Path, trust_remote_code: bool) -> None:
    """Tokenizer, processor, generation config, chat template, licence: everything but weights."""
    patterns = (*_COPIED, "*.py") if trust_remote_code else _COPIED
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        if path.is_file() and path.name not in _REPLACED and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)


def _model_card(source: Path, request: QuantizeRequest, bpw: float, refs: list[TensorRef]) -> str:
    recipe = request.recipe
    name = Path(request.model).name if request.model != "demo" else "quantkit demo"
    licence = _licence(source)
    header = ["---", "library_name: transformers", "tags:", "- quantkit", "- quantized"]
    header += [f"license: {licence}"] if licence else []
    header += ["base_model_relation: quantized", "---"]
    settings = ", ".join(
        f"{key}={value}" for key, value in recipe.to_json().items() if key not in ("method", "bits", "bpw")
    )
    body = f"""
# {name}, {recipe.method}, {recipe.budget_name}

Quantized by quantkit: {bpw:.3f} stored bits per weight in the quantized layers (codes, scales, zeros, index),
{sum(ref.n_bytes for ref in refs) / 1e6:.1f} MB of tensors in all. Settings: {settings}.

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
