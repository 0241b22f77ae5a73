"""Everything that can be known before a weight is read: what will be quantized, to how many bytes, at what cost."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.errors import FileError, QuantkitError, RequestError
from quantkit.formats.grouped_int import GroupedIntSpec, check_group_size
from quantkit.models.skeleton import Skeleton
from quantkit.models.structure import Linear
from quantkit.pipeline.request import QuantizeRequest
from quantkit.recipe import Recipe

_BASE_BYTES = 600 << 20  # the interpreter with torch and transformers loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do. Sizes of mixed-width modules assume as many narrow as wide groups (never more)."""

    modules: tuple[tuple[str, GroupedIntSpec], ...]
    skipped: tuple[tuple[str, str], ...]
    n_blocks: int
    bpw: float
    quantized_bytes: int
    other_bytes: int
    original_bytes: int
    peak_memory_bytes: int
    seconds: float

    @property
    def output_bytes(self) -> int:
        return self.quantized_bytes + self.other_bytes

    def to_json(self) -> dict[str, Any]:
        modules = [
            {"name": name, "shape": [spec.out_features, spec.in_features], "bits": spec.segments[-1][0]}
            | {"bpw": spec.bpw, "bytes": spec.n_bytes}
            for name, spec in self.modules
        ]
        return {
            "dry_run": True,
            "modules": modules,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "n_blocks": self.n_blocks,
            "bpw": self.bpw,
            "size_bytes": self.output_bytes,
            "original_bytes": self.original_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": round(self.seconds, 1),
        }


def make_plan(skeleton: Skeleton, request: QuantizeRequest, seq_len: int, device: torch.device) -> Plan:
    """Check every linear against the recipe and add up.

    Raises:
        RequestError: no linears, or a group size that does not divide one of them.
    """
    linears = [linear for block in skeleton.blocks for linear in block.linears]
    if not linears:
        raise RequestError(f"{type(skeleton.model).__name__}: its blocks hold no linear layers to quantize")
    modules = tuple((linear.name, _planned_spec(linear, request.recipe)) for linear in linears)
    quantized = sum(spec.n_bytes for _, spec in modules)
    original = sum(ref.n_bytes for ref in skeleton.tensors.values())
    replaced = sum(skeleton.tensors[skeleton.source_name(f"{linear.name}.weight")].n_bytes for linear in linears)
    outside = [(name, "outside the decoder blocks") for name in _other_matrices(skeleton)]
    return Plan(
        modules=modules,
        skipped=tuple(item for block in skeleton.blocks for item in block.skipped) + tuple(outside),
        n_blocks=len(skeleton.blocks),
        bpw=8 * quantized / sum(spec.n_weights for _, spec in modules),
        quantized_bytes=quantized,
        other_bytes=original - replaced,
        original_bytes=original,
        peak_memory_bytes=_peak_memory(skeleton, request, seq_len),
        seconds=_estimate_seconds(skeleton, request, seq_len, device),
    )


def _planned_spec(linear: Linear, recipe: Recipe) -> GroupedIntSpec:
    group_size = check_group_size(linear.in_features, recipe.group_size, linear.name)
    return GroupedIntSpec(
        out_features=linear.out_features,
        in_features=linear.in_features,
        group_size=group_size,
        segments=((recipe.bits, linear.in_features // group_size),),
        symmetric=recipe.symmetric,
    )


def _other_matrices(skeleton: Skeleton) -> list[str]:
    inside = f"{skeleton.block_list}."
    return [
        name
        for name, parameter in skeleton.model.named_parameters()
        if parameter.ndim >= 2 and not name.startswith(inside)
    ]


def _peak_memory(skeleton: Skeleton, request: QuantizeRequest, seq_len: int) -> int:
    """One block in float32 twice (weights and working copies), its Hessians, the hidden states, the widest activation."""
    widest_block = max(sum(linear.n_weights for linear in block.linears) for block in skeleton.blocks)
    inputs = {linear.in_features for block in skeleton.blocks for linear in block.linears}
    widest = max(max(linear.in_features, linear.out_features) for block in skeleton.blocks for linear in block.linears)
    hidden = min(inputs)
    states = 0 if request.offload == "disk" else 4 * request.n_samples * seq_len * hidden
    surroundings = 4 * sum(
        parameter.numel()
        for name, parameter in skeleton.model.named_parameters()
        if not name.startswith(f"{skeleton.block_list}.")
    )
    walk = 8 * widest_block + sum(4 * size * size for size in inputs) + 24 * max(inputs) ** 2 + 16 * seq_len * widest
    return _BASE_BYTES + states + max(surroundings, walk)


def _estimate_seconds(skeleton: Skeleton, request: QuantizeRequest, seq_len: int, device: torch.device) -> float:
    """Multiplications of the run over the speed of one matrix product measured now."""
    linears = [linear for block in skeleton.blocks for linear in block.linears]
    tokens = request.n_samples * seq_len
    rounding = sum(60.0 * linear.n_weights for linear in linears)
    if not request.recipe.needs_calibration:
        return 2 * rounding / _multiplications_per_second(device)
    forward = sum(4.0 * tokens * linear.n_weights for linear in linears)
    gram = sum(2.0 * tokens * linear.in_features**2 for linear in linears) / 2  # about half of the inputs are shared
    solve = sum(2.0 * linear.n_weights * linear.in_features + 3.0 * linear.in_features**3 for linear in linears)
    candidates = 135 if request.recipe.grid_name == "hessian" else 40
    group = request.recipe.group_size or max(linear.in_features for linear in linears)
    search = sum(2.0 * candidates * linear.n_weights * group for linear in linears)
    return (forward + gram + solve + search + rounding) / _multiplications_per_second(device)


def _multiplications_per_second(device: torch.device) -> float:
    square = torch.ones(1024, 1024, device=device)
    square @ square
    began = time.perf_counter()
    (square @ square).sum().item()
    return float(2 * 1024**3 / max(time.perf_counter() - began, 1e-6)) * 0.5  # a run reaches about half of it


def check_room(plan: Plan, output: Path, device: torch.device) -> None:
    """Raises `FileError` or `QuantkitError` when disk or memory cannot hold what the plan needs."""
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    need = plan.output_bytes + plan.quantized_bytes
    if free < need:
        raise FileError(
            f"not enough disk for {output}: {need >> 20} MiB needed, {free >> 20} MiB free; "
            "free some or choose another folder with -o"
        )
    available = psutil.virtual_memory().available
    if device.type == "cpu" and plan.peak_memory_bytes > available:
        raise QuantkitError(
            f"not enough memory: about {plan.peak_memory_bytes >> 20} MiB needed, {available >> 20} MiB available; "
            "use --offload disk, fewer --n-samples or a shorter --seq-len"
        )
