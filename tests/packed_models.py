"""Packed folders made by plain rounding, without the pipeline: what the formats and runtime tests load."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.checkpoint import find_tensors, has_tripwire, read_tensor, write_checksums, write_tensors
from quantkit.formats.files import read_json, write_json
from quantkit.formats.grouped_int import GroupedInt, symmetric_zero
from quantkit.formats.spec import QuantizedWeight
from quantkit.formats.storage import pack

_NOT_LINEAR = re.compile(r"norm|embed|(mlp|moe)\.gate\.weight$|rotary")


@dataclass(frozen=True)
class PackedFolders:
    """The same model twice: packed, and with the dequantized weights as ordinary float32 tensors."""

    packed: Path
    dense: Path


def round_to_nearest(weight: Tensor, bits: tuple[int, ...], *, symmetric: bool = False) -> GroupedInt:
    """Min-max rounding of ``[out, in]`` with ``bits[g]`` for column group g; one bit keeps the group's mean."""
    out_features, in_features = weight.shape
    grouped = weight.float().reshape(out_features, len(bits), in_features // len(bits))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    mean = grouped.mean(-1)
    width = torch.tensor(bits).expand_as(low)
    span = torch.where(width == 1, 2 * (grouped - mean.unsqueeze(-1)).abs().mean(-1), high - low)
    if symmetric:
        span = 2 * grouped.abs().amax(-1)
    scales = (span / (2.0**width - 1)).clamp(min=1e-4).half().float()
    zeros = torch.where(width == 1, (0.5 - mean / scales).half().float(), (-low / scales).round())
    if symmetric:
        zeros = torch.tensor([symmetric_zero(b) for b in bits]).expand_as(low)
    zeros = torch.where(width == 1, zeros, zeros.clamp(min=torch.zeros_like(zeros), max=2.0**width - 1))
    codes = (grouped / scales.unsqueeze(-1) + zeros.unsqueeze(-1)).round()
    codes = codes.clamp(torch.zeros_like(codes), (2.0 ** width.unsqueeze(-1) - 1).expand_as(codes))
    return GroupedInt(
        codes=codes.to(torch.uint8).reshape(out_features, in_features),
        scales=scales.contiguous(),
        zeros=zeros.contiguous(),
        bits=bits,
        symmetric=symmetric,
    )


def pack_folder(
    source: Path,
    target: Path,
    *,
    bits: tuple[int, ...] = (4,),
    group_size: int = 32,
    symmetric: bool = False,
    head: bool = False,
    rename: tuple[tuple[str, str], ...] = (),
    only: str = "",
    quantize: Callable[[Tensor], QuantizedWeight] | None = None,
) -> PackedFolders:
    """Pack every block linear of a saved model.

    Args:
        source: a folder of `tiny_models.tiny_model`.
        target: gets the folders ``packed`` and ``dense``.
        bits: widths, dealt out to the column groups in turn.
        group_size: columns per group.
        symmetric: of all modules.
        head: pack ``lm_head`` too.
        rename: regular expressions from tensor prefix to runtime name, where the two differ.
        only: a regular expression that the names of packed tensors match.
        quantize: instead of rounding to nearest with the settings above.
    """
    packed_tensors: dict[str, Tensor] = {}
    dense_tensors: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for name, ref in find_tensors(source).items():
        tensor = read_tensor(ref)
        if not _is_packed(name, tensor, head) or not re.search(only, name):
            packed_tensors[name] = dense_tensors[name] = tensor
            continue
        prefix = name.removesuffix(".weight")
        runtime_name = prefix
        for pattern, replacement in rename:
            runtime_name = re.sub(pattern, replacement, runtime_name)
        n_groups = tensor.shape[1] // group_size
        widths = tuple(bits[g % len(bits)] for g in range(n_groups))
        rounded = quantize(tensor) if quantize else round_to_nearest(tensor, widths, symmetric=symmetric)
        packed_tensors |= {f"{prefix}.{key}": value for key, value in pack(rounded).items()}
        if has_tripwire(runtime_name):
            packed_tensors[name] = torch.empty(0, dtype=torch.float16)
        dense_tensors[name] = rounded.dequantize()
        modules[runtime_name] = {"prefix": prefix, "spec": rounded.spec().to_json()}
    folders = PackedFolders(target / "packed", target / "dense")
    for folder, tensors in ((folders.packed, packed_tensors), (folders.dense, dense_tensors)):
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        write_tensors(folder / "model.safetensors", tensors)
    config = read_json(source / "config.json")
    quantization = {"quant_method": "quantkit", "format_version": 1, "bpw": 0.0, "modules": modules}
    write_json(folders.packed / "config.json", config | {"quantization_config": quantization})
    write_checksums(folders.packed)
    return folders


def _is_packed(name: str, tensor: Tensor, head: bool) -> bool:
    if name in ("lm_head.weight", "embed_out.weight"):
        return head
    return "layers." in name and name.endswith(".weight") and tensor.ndim == 2 and not _NOT_LINEAR.search(name)


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of ``quantization_config``; ``None`` deletes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"] | fields
    config["quantization_config"] = {key: value for key, value in quantization.items() if value is not None}
    path.write_text(json.dumps(config))
