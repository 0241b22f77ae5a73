"""The training stage of a run: from the blocks that the walk has packed to packed blocks with trained signs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.algorithms.littlebit import folded
from quantkit.algorithms.sign_refinement import balanced
from quantkit.calib.datasets import Calibration
from quantkit.errors import RequestError
from quantkit.formats.files import write_json
from quantkit.formats.safetensors_io import read_header, read_tensor, write_tensors
from quantkit.formats.sign_factors import SignFactors
from quantkit.formats.storage import pack, spec_from_json, unpack
from quantkit.models.skeleton import Skeleton
from quantkit.models.structure import Linear
from quantkit.pipeline.distill import Distillation, split_samples
from quantkit.pipeline.factorize import from_stored, ranks_of, to_stored
from quantkit.pipeline.journal import FinishedBlock, Journal, finished_blocks, work_folder
from quantkit.pipeline.prepare import compute_dtype, read_calibration, sequence_length
from quantkit.pipeline.request import Listener, QuantizeRequest
from quantkit.pipeline.sign_linear import SignLinear
from quantkit.pipeline.solve import relative_error
from quantkit.pipeline.team import Team
from quantkit.recipe import Recipe

FILE = "training.json"  # of the work folder: the losses, for the report
REST = "trained.safetensors"  # of the work folder: trained tensors that are not quantized


def training_set(request: QuantizeRequest, skeleton: Skeleton) -> Calibration:
    """The calibration set, or more of the same text.

    Raises:
        RequestError: pictures, or a single sequence; and as `read_calibration`.
    """
    n_samples = request.recipe.train_samples or request.n_samples
    text = read_calibration(replace(request, n_samples=n_samples), skeleton, sequence_length(skeleton, request))
    if not isinstance(text, Calibration):
        raise RequestError("refine=qat trains on text; give --calib text, or use --set refine=signs with pictures")
    split_samples(text.input_ids)
    return text


def training_memory(skeleton: Skeleton, recipe: Recipe, seq_len: int) -> int:
    """Bytes at most: float weights, latents with gradient and moments, and what a backward pass keeps, all float32."""
    linears = [linear for block in skeleton.blocks for linear in block.linears]
    weights = sum(int(parameter.numel()) for parameter in skeleton.model.parameters())
    kept = 3 * sum(item.in_features + item.out_features for item in linears)  # inputs, products, scaled products
    vocabulary: int = skeleton.config.get_text_config(decoder=True).vocab_size
    trained = _n_latents(linears, recipe) + _n_rest(skeleton, recipe)
    return 4 * (weights + 4 * trained + recipe.batch * seq_len * (kept + 6 * vocabulary))


def training_scratch(skeleton: Skeleton, recipe: Recipe) -> int:
    """Bytes on disk: the best parameters, and a checkpoint with moments twice while it is replaced."""
    linears = [linear for block in skeleton.blocks for linear in block.linears]
    return 28 * (_n_latents(linears, recipe) + _n_rest(skeleton, recipe))


def _n_latents(linears: Sequence[Linear], recipe: Recipe) -> int:
    ranks = ranks_of(linears, recipe)
    totals = {name: rank.rank * rank.n_paths for name, rank in ranks.items()}
    return sum(totals[linear.name] * (linear.in_features + linear.out_features) for linear in linears)


def _n_rest(skeleton: Skeleton, recipe: Recipe) -> int:
    return sum(parameter.numel() for parameter in rest_of(skeleton.model, recipe.also_train))


def training_multiplications(skeleton: Skeleton, recipe: Recipe, seq_len: int) -> float:
    """Of all steps: the teacher's pass, and three of the student's, whose products are as large as its bits."""
    weights = sum(linear.n_weights for block in skeleton.blocks for linear in block.linears)
    bits = recipe.bits if recipe.bpw is None else recipe.bpw
    return 2.0 * recipe.steps * recipe.accumulate * recipe.batch * seq_len * weights * (1 + 3 * bits)


def train(
    request: QuantizeRequest,
    skeleton: Skeleton,
    text: Calibration,
    journal: Journal,
    listener: Listener,
    device: torch.device,
) -> None:
    """The leader's part: train, pack, and put the trained blocks into the journal's place of the others."""
    team = _team(skeleton, device)
    with _students(request, skeleton, journal.finished, team.device) as linears:
        listener.training_started(request.recipe.steps)
        distillation = _distillation(request, skeleton, text, team)
        with torch.enable_grad():
            distillation.run(journal.folder, listener.trained)
        for index, block in enumerate(skeleton.blocks):
            names = [linear.name for linear in block.linears]
            _store(journal, index, {name: linears[name] for name in names})
        _store_rest(journal, skeleton, distillation.rest)
        write_json(journal.folder / FILE, _summary(distillation))


def follow(request: QuantizeRequest, skeleton: Skeleton, device: torch.device) -> None:
    """The part of the other processes of a launch: wait for the walk, take their share of the training, end."""
    text = training_set(request, skeleton)
    team = _team(skeleton, device)
    folder = work_folder(request.output)
    with _students(request, skeleton, finished_blocks(folder), team.device):
        _distillation(request, skeleton, text, team).run(folder, lambda *numbers: None)


def _team(skeleton: Skeleton, device: torch.device) -> Team:
    experts = any(".experts." in linear.path for block in skeleton.blocks for linear in block.linears)
    return Team(device, sparse=experts)


def _distillation(request: QuantizeRequest, skeleton: Skeleton, text: Calibration, team: Team) -> Distillation:
    modules = [skeleton.block_module(index) for index in range(len(skeleton.blocks))]
    return Distillation(skeleton.model, modules, text.input_ids, request.recipe, request.seed, team)


@contextmanager
def _students(
    request: QuantizeRequest, skeleton: Skeleton, finished: Sequence[FinishedBlock], device: torch.device
) -> Iterator[dict[str, SignLinear]]:
    """The whole model on the device, with a `SignLinear` for each quantized linear; afterwards as it was, on meta."""
    folder = work_folder(request.output)
    skeleton.load_model(device, compute_dtype(request, skeleton, device))
    model, originals, linears = skeleton.model, {}, {}
    generator = torch.Generator().manual_seed(request.seed)
    for block in finished[: len(skeleton.blocks)]:  # a vision tower may follow
        refs = read_header(folder / block.file)
        for name, entry in block.modules.items():
            spec = spec_from_json(entry["spec"])
            stored = unpack(spec, {key: read_tensor(refs[f"{entry['prefix']}.{key}"]) for key in spec.tensor_layout()})
            assert isinstance(stored, SignFactors)
            originals[name] = model.get_submodule(name)
            linears[name] = SignLinear(originals[name], from_stored(stored, device), generator)
            _put(model, name, linears[name])
    for parameter in rest_of(model, request.recipe.also_train):
        parameter.data = parameter.data.float()  # as the latents: small updates vanish in bfloat16
        parameter.requires_grad_(True)
    try:
        yield linears
    finally:
        for name, linear in originals.items():
            _put(model, name, linear)
        model.requires_grad_(False)
        skeleton.release_surroundings()


def rest_of(model: nn.Module, also_train: str) -> list[nn.Parameter]:
    """What is trained beside the factors: the vectors of norms; with ``all`` embedding and head too."""
    if also_train == "none":
        return []
    linears = (nn.Linear, SignLinear)
    found = [
        parameter
        for module in model.modules()
        if not isinstance(module, linears)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 1
    ]
    if also_train == "all":
        tables = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
        found += [table.weight for table in tables]
    return list(dict.fromkeys(found))  # tied ones once


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _store(journal: Journal, index: int, linears: dict[str, SignLinear]) -> None:
    """The block's file again, with the trained signs and scales."""
    block = journal.finished[index]
    tensors: dict[str, Tensor] = {
        name: read_tensor(ref) for name, ref in read_header(journal.folder / block.file).items()
    }
    entries: dict[str, dict[str, Any]] = {}
    for name, linear in linears.items():
        stored = to_stored(balanced(folded(linear.factors())))
        entry = block.modules[name]
        tensors |= {f"{entry['prefix']}.{key}": tensor.cpu() for key, tensor in pack(stored).items()}
        error = relative_error(linear.weight.float(), stored.dequantize(), None)
        entries[name] = {"prefix": entry["prefix"], "spec": stored.spec().to_json(), "relative_error": error}
    journal.replace_block(index, tensors, entries)


def _store_rest(journal: Journal, skeleton: Skeleton, rest: dict[str, nn.Parameter]) -> None:
    """Norms, embedding and head as trained, under the names and in the dtypes of the source."""
    refs = {name: skeleton.tensors[skeleton.source_name(name)] for name in rest}
    tensors = {ref.name: rest[name].detach().to(ref.torch_dtype).cpu() for name, ref in refs.items()}
    if tensors:
        write_tensors(journal.folder / REST, tensors)


def _summary(distillation: Distillation) -> dict[str, Any]:
    """For ``report.json``: the losses at every check, the training loss as a mean since the one before."""
    progress = distillation.progress
    rows, last = [], 0
    for step, held_out in progress.checks:
        recent = progress.losses[last:step]
        rows.append({"step": step, "loss": sum(recent) / len(recent) if recent else None, "held_out_loss": held_out})
        last = step
    best = min(range(len(rows)), key=lambda row: progress.checks[row][1])
    return {"training": {"steps": progress.step, "kept_step": rows[best]["step"], "checks": rows}}
