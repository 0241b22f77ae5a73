"""Everything that can be known before a weight is read: what will be quantized, to how many bytes, at what cost."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from quantkit.algorithms.ptq161 import n_salient
from quantkit.errors import FileError, QuantkitError, RequestError
from quantkit.formats.accounting import QUANTIZED, Account, kind_of
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.safetensors_io import TensorRef
from quantkit.formats.spec import Spec
from quantkit.models.skeleton import Skeleton
from quantkit.models.structure import Block, Linear
from quantkit.pipeline.allocate import needs_activations
from quantkit.pipeline.attend import attention_bytes
from quantkit.pipeline.budget import budget_of, check_factorized, planned_spec
from quantkit.pipeline.factorize import ranks_of, sign_factors_spec
from quantkit.pipeline.journal import work_folder
from quantkit.pipeline.measure import stream_bytes
from quantkit.pipeline.outside import OutsideMatrix, outside_matrices
from quantkit.pipeline.request import QuantizeRequest
from quantkit.pipeline.train import training_memory, training_multiplications, training_scratch
from quantkit.pipeline.vision import rounded_linears, vision_recipe
from quantkit.recipe import Recipe

_BASE_BYTES = 540 << 20  # the interpreter with torch and transformers loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do. Bytes are exact for uniform widths; for mixed ones they are the most that the run may take.

    With an allocator over blocks or linears, each module stands with its highest width, and the sum with the budget.
    """

    modules: tuple[tuple[str, Spec], ...]
    skipped: tuple[tuple[str, str], ...]
    n_blocks: int
    bpw: float
    quantized_bytes: int
    other_bytes: int
    original_bytes: int
    peak_memory_bytes: int
    scratch_bytes: int  # of the work folder: finished blocks, transformed tensors, hidden states offloaded to disk
    seconds: float
    transform_bytes: int = 0  # more than the source has, for an output head that can no longer share the embedding
    outside: tuple[tuple[str, Spec], ...] = ()  # embedding and head, where they are quantized too
    account: Account = field(default_factory=Account)  # of the whole output
    at_most: bool = False  # bytes and bpw are a bound: widths are decided when the model has been looked at

    @property
    def output_bytes(self) -> int:
        return self.quantized_bytes + self.other_bytes

    def to_json(self) -> dict[str, Any]:
        modules = [
            {"name": name, "shape": [spec.out_features, spec.in_features]}
            | ({"bits": spec.segments[-1][0]} if isinstance(spec, GroupedIntSpec) else {"format": spec.format})
            | {"bpw": spec.bpw, "bytes": spec.n_bytes}
            for name, spec in (*self.modules, *self.outside)
        ]
        return {
            "dry_run": True,
            "modules": modules,
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
            "n_blocks": self.n_blocks,
            "bpw": self.bpw,
            "at_most": self.at_most,
            "size_bytes": self.output_bytes,
            "bytes": self.account.bytes,
            "bits_per_parameter": self.account.bits_per_parameter,
            "original_bytes": self.original_bytes,
            "transform_bytes": self.transform_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": float(f"{self.seconds:.2g}"),
        }


def make_plan(skeleton: Skeleton, request: QuantizeRequest, seq_len: int, device: torch.device) -> Plan:
    """Check every linear against the recipe and add up.

    Raises:
        RequestError: no linears, or a group size that does not divide one of them.
        FileError: the files lack the weight of one of them.
    """
    linears = [linear for block in skeleton.blocks for linear in block.linears]
    if not linears:
        raise RequestError(f"{type(skeleton.model).__name__}: its blocks hold no linear layers to quantize")
    recipe = request.recipe
    check_factorized(linears, recipe)
    budget = budget_of(linears, recipe) if recipe.mixes_widths else None
    vision = rounded_linears(skeleton, recipe)
    vision_modules = [(linear.name, planned_spec(linear, vision_recipe(linear, recipe))) for linear in vision]
    concrete = recipe.at(budget.hi) if budget else recipe
    modules = _planned_modules(linears, concrete)
    states = _hidden_bytes(skeleton, request, seq_len)
    quantized = budget.n_bytes if budget else sum(spec.n_bytes for _, spec in modules)
    quantized += sum(spec.n_bytes for _, spec in vision_modules)
    modules += tuple(vision_modules)
    matrices = outside_matrices(skeleton, recipe)
    total = _account(skeleton, [*linears, *vision], matrices, quantized)
    packed = {f"{matrix.name}.weight" for matrix in matrices} | {f"{linear.name}.weight" for linear in vision}
    outside = [(name, "outside the decoder blocks") for name in _other_matrices(skeleton) if name not in packed]
    transform = skeleton.transform
    scratch = quantized + sum(matrix.spec.n_bytes for matrix in matrices)
    scratch += sum(ref.n_bytes for ref in transform.outside) if transform else 0
    restored = recipe.transform == "restore"
    if restored:
        scratch += quantized + sum(
            skeleton.tensors[skeleton.source_name(f"{item.name}.weight")].n_bytes for item in linears
        )
    if recipe.trains:
        scratch += training_scratch(skeleton, recipe)
    return Plan(
        modules=modules,
        skipped=tuple(item for block in skeleton.blocks for item in block.skipped) + tuple(outside),
        n_blocks=len(skeleton.blocks),
        bpw=8 * quantized / sum(spec.n_weights for _, spec in modules),
        quantized_bytes=quantized,
        other_bytes=total.n_bytes - quantized,
        outside=tuple((matrix.name, matrix.spec) for matrix in matrices),
        account=total,
        original_bytes=sum(ref.n_bytes for ref in skeleton.tensors.values()),
        peak_memory_bytes=max(
            _peak_memory(skeleton, request, seq_len),
            _outside_memory(matrices),
            _tuning_memory(skeleton, linears, recipe, seq_len) if restored else 0,
            _BASE_BYTES + training_memory(skeleton, recipe, seq_len) if recipe.trains else 0,
        )
        + (0 if request.offload == "disk" else states)
        + stream_bytes(recipe, len(skeleton.blocks), request.n_samples, seq_len, _hidden_size(skeleton)),
        scratch_bytes=scratch + (states if request.offload == "disk" else 0),
        seconds=_estimate_seconds(skeleton, request, seq_len, device),
        transform_bytes=transform.extra_bytes if transform else 0,
        at_most=recipe.allocator != "uniform",
    )


def _planned_modules(linears: Sequence[Linear], recipe: Recipe) -> tuple[tuple[str, Spec], ...]:
    if recipe.stores_signs:
        ranks = ranks_of(linears, recipe)
        sizes = ((linear.out_features, linear.in_features, ranks[linear.name]) for linear in linears)
        return tuple((linear.name, sign_factors_spec(*size)) for linear, size in zip(linears, sizes, strict=True))
    return tuple((linear.name, planned_spec(linear, recipe)) for linear in linears)


def _account(skeleton: Skeleton, linears: list[Linear], matrices: tuple[OutsideMatrix, ...], quantized: int) -> Account:
    """Where the bytes of the output will go."""
    total = Account()
    total.add(QUANTIZED, quantized, sum(linear.n_weights for linear in linears))
    replaced = {skeleton.source_name(f"{linear.name}.weight") for linear in linears}
    for matrix in matrices:
        total.add(kind_of(matrix.name), matrix.spec.n_bytes, matrix.spec.n_weights)
        replaced |= {ref.name for ref in matrix.replaced}
    changed: Sequence[TensorRef] = skeleton.transform.outside if skeleton.transform else ()
    if skeleton.transform:  # inside the blocks it changes no size
        replaced |= {skeleton.source_name(name) for name in skeleton.transform.touched if not skeleton.in_blocks(name)}
    kept = [ref for ref in skeleton.tensors.values() if ref.name not in replaced]
    for ref in (*kept, *changed):
        total.add(kind_of(ref.name), ref.n_bytes, math.prod(ref.shape))
    return total


def _other_matrices(skeleton: Skeleton) -> list[str]:
    parameters = skeleton.model.named_parameters()
    return [name for name, parameter in parameters if parameter.ndim >= 2 and not skeleton.in_blocks(name)]


def _peak_memory(skeleton: Skeleton, request: QuantizeRequest, seq_len: int) -> int:
    """Beside the hidden states: the parts around the blocks, and later a block with what its widest linear needs."""
    linears = [linear for block in skeleton.blocks for linear in block.linears]
    widest = max(linear.n_weights for linear in linears)
    block = max(sum(linear.n_weights for linear in block.linears) for block in skeleton.blocks)
    copies = 24 * widest  # of a weight that is being solved: working copy, codes, grid, dequantized
    if not request.recipe.needs_calibration:
        return _BASE_BYTES + 4 * block + copies
    most_inputs = max(linear.in_features for linear in linears)
    factors = 60 * most_inputs * most_inputs  # of a Hessian: float64 ones and float32 copies; 57 were measured
    activations = 16 * seq_len * max(max(linear.in_features, linear.out_features) for linear in linears)
    held = 4 * block + max(map(_hessian_bytes, skeleton.blocks))
    if request.recipe.solver == "ptq161":
        copies = 64 * widest + (1 << 29)  # normal equations of all rows, and rows that try several scales at once
    training = _training_bytes(skeleton, seq_len) if request.recipe.block_steps else 0
    walk = _n_streams(request.recipe) * held + max(activations, copies + factors, training)
    modules = map(skeleton.block_module, range(len(skeleton.blocks)))
    walk += max(attention_bytes(module, request.recipe, seq_len) for module in modules)
    return _BASE_BYTES + max(_surroundings_bytes(skeleton) + activations, walk)


def _outside_memory(matrices: tuple[OutsideMatrix, ...]) -> int:
    """A table as it is stored, its codes twice, and a piece of it in work."""
    tables = [matrix.replaced[0].n_bytes + 3 * matrix.spec.n_weights for matrix in matrices]
    return _BASE_BYTES + max(tables, default=0) + (24 << 24 if tables else 0)


def _training_bytes(skeleton: Skeleton, seq_len: int) -> int:
    """Of a block whose scales are trained: weights as they are assembled, gradients, and what a backward needs."""
    return max(
        4 * sum(5 * item.n_weights + 3 * seq_len * (item.in_features + item.out_features) for item in block.linears)
        for block in skeleton.blocks
    )


def _tuning_memory(skeleton: Skeleton, linears: Sequence[Linear], recipe: Recipe, seq_len: int) -> int:
    """Of transform=restore: the whole model, adapters with gradients and moments, and what a backward needs."""
    weights = sum(4 * int(parameter.numel()) for parameter in skeleton.model.parameters())
    features = sum(item.in_features + item.out_features for item in linears)
    vocabulary: int = skeleton.config.get_text_config(decoder=True).vocab_size
    return _BASE_BYTES + weights + 4 * features * (4 * recipe.restore_rank + 3 * seq_len) + 12 * seq_len * vocabulary


def _n_streams(recipe: Recipe) -> int:
    """Models that run side by side: what aims at the float model needs its block, inputs and hidden states too."""
    return 2 if recipe.follows_float_model else 1


def _hessian_bytes(block: Block) -> int:
    """Linears of one parent that read as many features share their input, as q, k and v or gate and up do."""
    inputs = {(linear.path.rpartition(".")[0], linear.in_features) for linear in block.linears}
    return sum(4 * in_features * in_features for _, in_features in inputs)


def _surroundings_bytes(skeleton: Skeleton) -> int:
    """What runs before the blocks, in float32; an output head of its own is never loaded."""
    model = skeleton.model
    head = model.get_output_embeddings()
    unused = () if head is None or head.weight is model.get_input_embeddings().weight else (head.weight,)
    parameters = [parameter for name, parameter in model.named_parameters() if not skeleton.in_blocks(name)]
    return sum(4 * int(item.numel()) for item in parameters if not any(item is other for other in unused))


def _hidden_bytes(skeleton: Skeleton, request: QuantizeRequest, seq_len: int) -> int:
    if not request.recipe.needs_calibration:
        return 0
    n_kept = 2 if request.recipe.block_steps else 0  # what a block should put out, for both streams
    return 4 * request.n_samples * seq_len * _hidden_size(skeleton) * (_n_streams(request.recipe) + n_kept)


def _hidden_size(skeleton: Skeleton) -> int:
    found: int = skeleton.config.get_text_config(decoder=True).hidden_size
    return found


def _estimate_seconds(skeleton: Skeleton, request: QuantizeRequest, seq_len: int, device: torch.device) -> float:
    """Multiplications of the run over the speed of one matrix product measured now."""
    linears = [linear for block in skeleton.blocks for linear in block.linears]
    tokens = request.n_samples * seq_len
    turning = 2 * skeleton.transform.multiplications if skeleton.transform else 0
    rounding = sum((60.0 + turning) * linear.n_weights for linear in linears)
    if not request.recipe.needs_calibration:
        return 2 * rounding / _multiplications_per_second(device)
    n_forwards = 2 + (request.recipe.mixes_widths and needs_activations(request.recipe))
    forward = n_forwards * sum(2.0 * tokens * linear.n_weights for linear in linears)
    gram = sum(2.0 * tokens * linear.in_features**2 for linear in linears) / 2  # about half of the inputs are shared
    solve = sum(2.0 * linear.n_weights * linear.in_features + 3.0 * linear.in_features**3 for linear in linears)
    candidates = 135 if request.recipe.grid_name == "hessian" else 40
    group = request.recipe.group_size or max(linear.in_features for linear in linears)
    search = sum(2.0 * candidates * linear.n_weights * group for linear in linears)
    if request.recipe.solver == "ptq161":
        search = sum(_sign_multiplications(linear, request.recipe, candidates) for linear in linears)
    # A step is a forward and a backward of one block; candidates of signs are tried in the loop, not in a search.
    n_weights = sum(linear.n_weights for linear in linears)
    train = 6.0 * request.recipe.block_steps * seq_len * n_weights
    if request.recipe.stores_signs:
        search = sum(_flip_multiplications(linear, request.recipe) for linear in linears)
    if request.recipe.trains:
        train += training_multiplications(skeleton, request.recipe, seq_len)
    once = forward + gram + solve + search + rounding + train
    if request.recipe.allocator == "casp":
        once += forward + solve + search + rounding  # each block is solved once more, on the original model
    if request.recipe.transform == "restore":
        once = 2 * once + 12.0 * request.recipe.restore_steps * seq_len * n_weights
    return once / _multiplications_per_second(device)


def _sign_multiplications(linear: Linear, recipe: Recipe, candidates: int) -> float:
    """Grids of salient channels; signs under eight scales; and per round four products with the Hessian."""
    k = n_salient(linear.in_features, recipe.bits, recipe.salient_bits)
    products = (8 if recipe.compensate else 0) + 4 * recipe.refine_rounds
    return 2.0 * linear.out_features * (candidates * k**2 + products * linear.in_features**2)


def _flip_multiplications(linear: Linear, recipe: Recipe) -> float:
    """Per round of sign factors: about 80 products of the Gram matrix of their ranks with each column."""
    bits = recipe.bits if recipe.bpw is None else recipe.bpw
    rank = bits * linear.n_weights / (linear.in_features + linear.out_features)
    return 2.0 * recipe.rounds_of_signs * rank**2 * (80 * linear.in_features + linear.out_features)


def _multiplications_per_second(device: torch.device) -> float:
    size = 256 if device.type == "cpu" else 4096  # a few milliseconds, and enough work for the device
    square = torch.ones(size, size, device=device)
    square @ square
    began = time.perf_counter()
    (square @ square).sum().item()
    return size**3 / max(time.perf_counter() - began, 1e-6)  # counted as two operations each, of which half is reached


@dataclass(frozen=True, slots=True)
class Room:
    """What the machine has to offer, in bytes."""

    disk: int
    memory: float  # infinite where it is not the CPU's memory that is used


def measure_room(output: Path, device: torch.device) -> Room:
    """Free disk where ``output`` will be (what an unfinished run of it holds counts as free), and free memory."""
    whole = output.absolute()
    existing = next(parent for parent in (whole, *whole.parents) if parent.exists())
    held = sum(path.stat().st_size for path in work_folder(output).rglob("*") if path.is_file())
    memory = psutil.virtual_memory().available if device.type == "cpu" else math.inf
    return Room(shutil.disk_usage(existing).free + held, memory)


def check_room(plan: Plan, output: Path, room: Room) -> None:
    """Raises `FileError` or `QuantkitError` when disk or memory cannot hold what the plan needs."""
    need = plan.output_bytes + plan.scratch_bytes
    if room.disk < need:
        raise FileError(
            f"not enough disk for {output}: {_mib(need)} MiB needed, {room.disk >> 20} MiB free; "
            "free some or choose another folder with -o"
        )
    if room.memory < plan.peak_memory_bytes:
        raise QuantkitError(
            f"not enough memory: about {_mib(plan.peak_memory_bytes)} MiB needed, {int(room.memory) >> 20} MiB "
            "available; use --offload disk, fewer --n-samples or a shorter --seq-len"
        )


def _mib(n_bytes: int) -> int:
    return -(-n_bytes >> 20)
