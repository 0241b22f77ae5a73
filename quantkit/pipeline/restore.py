"""transform=restore: weights that are easier to quantize, by a short low-rank tuning that starts from quantized ones.

Paper      PTQ1.61, arXiv:2502.13179, preprocessing, and the authors' settings: a first quantization; low-rank adapters
           on its dequantized weights, trained to predict text (rank 64, scaled by 16 / rank, dropout 0.1, AdamW at
           1e-4, two sequences a step, warm-up and cosine); merged; then quantized again.
Deviates   Text is the calibration set of the run, of which an eighth is held out to say what the tuning did. All
           linears that are quantized have adapters (the authors leave out the attention's output), with any solver.
Memory     one model with the activations of a backward: nothing for models that fill the machine.
Resume     first pass and tuning leave one file in the work folder. Killed before it is there, the first pass goes on
           from its last block and the tuning begins anew, with the same numbers on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantkit.errors import NumericalError
from quantkit.formats.safetensors_io import TensorRef, read_header, read_tensor, write_tensors
from quantkit.formats.storage import spec_from_json, unpack
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline.distill import learning_rate, sample_indices
from quantkit.pipeline.journal import Journal
from quantkit.recipe import Recipe

FILE = "restored.safetensors"  # of the work folder
_FIRST = "first"  # of the work folder: the journal of the first pass
_ALPHA, _DROPOUT, _SEQUENCES = 16.0, 0.1, 2

FirstPass = Callable[[Journal], None]
Note = Callable[[str], None]


class Restored:
    """The `Transform` of a skeleton whose linears have the tuned weights of a file."""

    def __init__(self, path: Path) -> None:
        self._refs = read_header(path)
        self.touched = frozenset(self._refs)
        self.outside: Sequence[TensorRef] = ()
        self.extra_bytes = self.multiplications = 0
        self.config_changes: dict[str, Any] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        return read_tensor(self._refs[name]).to(tensor.device)

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        return {}

    def write_outside(self, folder: Path) -> list[TensorRef]:
        return []


def restore(
    skeleton: Skeleton,
    input_ids: Tensor,
    recipe: Recipe,
    seed: int,
    folder: Path,
    device: torch.device,
    first_pass: FirstPass,
    note: Note,
) -> Restored:
    """The tuned weights: as they are in the work folder already, or of a first pass and a tuning.

    Args:
        skeleton: on the meta device, without a transform; left like that.
        input_ids: int64 ``[n_samples, seq_len]``, the text of the tuning.
        folder: the work folder of the run.
        first_pass: quantizes the model into the journal that it is given.

    Raises:
        NumericalError: the tuning diverged.
    """
    path = folder / FILE
    if not path.exists():
        with Journal(folder / _FIRST, {}, overwrite=False) as first:
            note("transform=restore: a first pass, then a tuning, then the pass that counts")
            first_pass(first)
            write_tensors(path, _tuned(skeleton, input_ids, recipe, seed, first, device, note))
            first.remove()
    return Restored(path)


def _tuned(
    skeleton: Skeleton, input_ids: Tensor, recipe: Recipe, seed: int, first: Journal, device: torch.device, note: Note
) -> dict[str, Tensor]:
    """Merged weights in the dtype of the source, by runtime name."""
    skeleton.load_model(device, torch.float32)
    try:
        names = _put_quantized(skeleton, first)
        linears = {name: skeleton.model.get_submodule(name) for name in names}
        generator = torch.Generator().manual_seed(seed)
        adapters = {name: LowRank(linear, recipe.restore_rank, generator) for name, linear in linears.items()}
        with attached(linears, adapters):
            before, after = tune(skeleton.model, adapters, input_ids.to(device), recipe, seed)
        note(f"transform=restore: {recipe.restore_steps} steps, held-out loss {before:.4f} -> {after:.4f}")
        merged = {}
        for name, linear in linears.items():
            key = f"{name}.weight"
            weight = linear.get_parameter("weight").data + adapters[name].delta()
            merged[key] = weight.to(skeleton.tensors[skeleton.source_name(key)].torch_dtype).cpu()
        return merged
    finally:
        skeleton.release_surroundings()


def _put_quantized(skeleton: Skeleton, first: Journal) -> list[str]:
    """Replace the weights of the quantized linears by their dequantized ones; their names."""
    names = []
    for block in first.finished[: len(skeleton.blocks)]:  # a vision tower may follow
        refs = read_header(first.folder / block.file)
        for name, entry in block.modules.items():
            spec = spec_from_json(entry["spec"])
            stored = {key: read_tensor(refs[f"{entry['prefix']}.{key}"]) for key in spec.tensor_layout()}
            target = skeleton.model.get_submodule(name).get_parameter("weight")
            target.data = unpack(spec, stored).dequantize().to(target)
            names.append(name)
    return names


class LowRank(nn.Module):
    """What is added to a linear: ``alpha / rank * up down x``; nothing at the start."""

    def __init__(self, linear: nn.Module, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = linear.get_parameter("weight")
        out_features, in_features = weight.shape
        down = (2 * torch.rand(rank, in_features, generator=generator) - 1) / in_features**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(out_features, rank))
        self.scale = _ALPHA / rank

    def forward(self, inputs: Tensor) -> Tensor:
        dropped = F.dropout(inputs, _DROPOUT, self.training)
        return self.scale * F.linear(F.linear(dropped, self.down), self.up)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """``[out, in]``."""
        return self.scale * (self.up @ self.down)


@contextmanager
def attached(linears: Mapping[str, nn.Module], adapters: Mapping[str, LowRank]) -> Iterator[None]:
    """Inside this context the linears give the sum of their own outputs and their adapters'."""

    def hook(adapter: LowRank) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda module, inputs, output: output + adapter(inputs[0])

    handles = [linears[name].register_forward_hook(hook(adapter)) for name, adapter in adapters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tune(
    model: nn.Module, adapters: Mapping[str, LowRank], input_ids: Tensor, recipe: Recipe, seed: int
) -> tuple[float, float]:
    """Train the adapters to predict the next token.

    Args:
        input_ids: int64 ``[n_samples, seq_len]``; the last eighth is held out, where there are two or more.

    Returns:
        The loss on what is held out, in nats per token, before and after.
    """
    n_held = len(input_ids) // 8 or (1 if len(input_ids) > 1 else 0)
    training, held = input_ids[: len(input_ids) - n_held], input_ids[-max(n_held, 1) :]

    def loss_of(row: Tensor) -> Tensor:
        logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0, :-1]
        return F.cross_entropy(logits.float(), row[1:])

    def held_loss() -> float:
        for adapter in adapters.values():
            adapter.eval()
        with torch.no_grad():
            return sum(float(loss_of(row)) for row in held) / len(held)

    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.restore_lr, weight_decay=0.0)
    before = held_loss()
    on_gpu = [input_ids.device] if input_ids.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_gpu), torch.enable_grad():
        torch.manual_seed(seed)  # of dropout
        for adapter in adapters.values():
            adapter.train()
        for step in range(recipe.restore_steps):
            optimizer.param_groups[0]["lr"] = learning_rate(step, recipe.restore_steps, recipe.restore_lr)
            optimizer.zero_grad()
            for index in sample_indices(_SEQUENCES * step, _SEQUENCES, len(training), seed):
                (loss_of(training[index]) / _SEQUENCES).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    after = held_loss()
    if not after < float("inf"):
        raise NumericalError("transform=restore: the tuning diverged; use a lower --set restore_lr")
    return before, after
