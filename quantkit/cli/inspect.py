"""``quantkit inspect``: what a packed folder holds, module by module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantkit.cli.options import Debug, Json
from quantkit.cli.screen import print_json, print_pairs, results, size, table

if TYPE_CHECKING:
    from quantkit.formats.checkpoint import Checkpoint

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that quantkit quantize has written.")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare every file with its SHA-256 in checksums.json.")]


def inspect(folder: Folder, verify: Verify = False, as_json: Json = False, debug: Debug = False) -> None:
    """Show what is inside a packed folder: formats, widths, bytes, errors."""
    from quantkit.formats.checkpoint import open_folder, verify_checksums

    checkpoint = open_folder(folder)
    if verify:
        verify_checksums(folder)
    described = describe(checkpoint) | ({"verified": True} if verify else {})
    if as_json:
        print_json(described)
    else:
        _show(described)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that ``--json`` prints."""
    from quantkit.formats.accounting import QUANTIZED, account, is_end

    quantization, errors = checkpoint.quantization_config, _relative_errors(checkpoint.folder)
    modules = [
        {
            "name": module.name,
            "format": module.spec.format,
            "shape": [module.spec.out_features, module.spec.in_features],
            "bytes": module.spec.n_bytes,
            "bpw": module.spec.bpw,
            "relative_error": errors.get(module.name),
        }
        | {key: value for key, value in module.spec.to_json().items() if key not in ("out_features", "in_features")}
        for module in sorted(checkpoint.modules.values(), key=lambda module: _natural(module.name))
    ]
    total = account(checkpoint.modules.values(), checkpoint.tensors.values())
    n_weights = sum(item.spec.n_weights for item in checkpoint.modules.values() if not is_end(item.name))
    return {
        "folder": str(checkpoint.folder),
        "method": (quantization.get("recipe") or {}).get("method"),
        "quantkit_version": quantization.get("quantkit_version"),
        "format_version": quantization["format_version"],
        "calibration": quantization.get("calibration"),
        "bpw": 8 * total.bytes[QUANTIZED] / n_weights,
        "bits_per_parameter": total.bits_per_parameter,
        "size_bytes": total.n_bytes,
        "bytes": total.bytes,
        "modules": modules,
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _relative_errors(folder: Path) -> dict[str, float]:
    """By module, from ``report.json``; a folder from elsewhere may have none."""
    from quantkit.formats.files import read_json

    path = folder / "report.json"
    rows = read_json(path).get("modules", []) if path.is_file() else []
    return {row["name"]: row["relative_error"] for row in rows if "relative_error" in row}


def _show(described: dict[str, Any]) -> None:
    screen = results()
    numbers = ("group size", "bytes", "bpw", "relative error")
    made = table("module", "format", "shape", "bits", *numbers, numbers=numbers)
    for module in described["modules"]:
        error = module["relative_error"]
        made.add_row(
            module["name"],
            module["format"],
            " x ".join(str(length) for length in module["shape"]),
            _bits(module),
            str(module.get("group_size", "")),
            f"{module['bytes']:,}",
            f"{module['bpw']:.3f}",
            "" if error is None else f"{error:.4f}",
        )
    screen.print(made, "")
    calibration = described["calibration"] or {}
    rows = [("folder", described["folder"]), ("method", described["method"] or "unknown")]
    rows.append(("calibration", calibration.get("protocol", "none")))
    rows.append(("bits per weight", f"{described['bpw']:.3f} in the quantized layers"))
    rows += [(kind, size(n_bytes)) for kind, n_bytes in described["bytes"].items() if n_bytes or kind == "quantized"]
    rows.append(
        ("in all", f"{size(described['size_bytes'])}, {described['bits_per_parameter']:.3f} bits per parameter")
    )
    if described.get("verified"):
        rows.append(("checksums", "all files match"))
    print_pairs(screen, rows)


def _bits(module: dict[str, Any]) -> str:
    """One width alone, several with their numbers of groups: ``2 (3 groups) + 4 (3 groups)``; or ranks."""
    if module["format"] == "sign_factors":
        return " + ".join(f"rank {rank}" for rank in module["ranks"])
    if module["format"] == "sign_salient":
        salient = module["salient"]
        return "1" if salient is None else f"1 + {_bits(salient)} in {salient['in_features']} columns"
    if module["format"] == "low_rank":
        return f"rank {module['down']['out_features']}: {_bits(module['down'])}, {_bits(module['up'])}"
    segments = module["segments"]
    if len(segments) == 1:
        return str(segments[0][0])
    return " + ".join(f"{bits} ({count} group{'s' if count > 1 else ''})" for bits, count in segments)
