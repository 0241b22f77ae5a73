"""Small quantization runs, and the oracle for what they compute: the original model with the dequantized weights."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit.formats.checkpoint import open_folder
from quantkit.formats.storage import unpack
from quantkit.pipeline import Listener, QuantizeRequest, QuantizeResult, quantize
from quantkit.pipeline.request import ModuleReport
from quantkit.recipe import resolve

SMALL: dict[str, Any] = {"group_size": 32, "n_samples": 4, "seq_len": 32}


def calibration_text(folder: Path, n_bytes: int = 2000) -> Path:
    """A text file of seeded noise over a few letters; the tests' tokenizer makes one token of a byte."""
    letters = random.Random(0)
    path = folder / "calibration.txt"
    path.write_text("".join(letters.choice("abcdefgh ijklmno, pqr.\n") for _ in range(n_bytes)), encoding="utf-8")
    return path


def small_run(model: Path, output: Path, text: Path, method: str | None = "gptq", **options: Any) -> QuantizeResult:
    """`quantize` with the settings of `SMALL`, each of which ``options`` may replace."""
    return quantize(model, output, method=method, **{"bits": 3, "calib": str(text), **SMALL, **options})


def small_request(model: Path, output: Path, text: Path, method: str = "gptq", **options: Any) -> QuantizeRequest:
    """The request that `small_run` carries out."""
    values = {"bits": 3, "calib": str(text), **SMALL, **options}
    keys = ("bits", "group_size", "settings")
    recipe = resolve(method, **{key: values.pop(key) for key in keys if key in values})
    return QuantizeRequest(model=str(model), output=output, recipe=recipe, **values)


def sha256_of(folder: Path) -> dict[str, str]:
    """Of every file in the folder and below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def quantized_weights(folder: Path) -> dict[str, Any]:
    """Runtime module name to the quantized weight, as stored in a quantkit folder."""
    checkpoint = open_folder(folder)
    return {name: unpack(module.spec, checkpoint.read_module(name)) for name, module in checkpoint.modules.items()}


def dense_model(source: Path, weights: dict[str, Tensor], kind: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The original model in float32 with some weights replaced, loaded by transformers alone."""
    model = kind.from_pretrained(source, dtype=torch.float32)
    for name, weight in weights.items():
        target = dense_weight(model, name)
        assert target.shape == weight.shape, name
        target.data.copy_(weight)
    return model


def dense_weight(model: PreTrainedModel, name: str) -> Tensor:
    """The weight of a linear, or the part of the stacked experts that is one: a view."""
    experts, found, linear = name.partition(".experts.")
    if not found:
        return model.get_submodule(name).weight.data
    index, part = linear.split(".")
    stacked = model.get_submodule(f"{experts}.experts")
    if part == "down_proj":
        return stacked.down_proj.data[int(index)]
    gate, up = stacked.gate_up_proj.data[int(index)].chunk(2)
    return gate if part == "gate_proj" else up


def token_ids(rows: int = 2, length: int = 24) -> Tensor:
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


class Events(Listener):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.notes: list[str] = []

    def started(self, n_blocks: int, n_resumed: int) -> None:
        self.seen.append(("started", n_blocks, n_resumed))

    def block_started(self, index: int, n_linears: int) -> None:
        self.seen.append(("block_started", index, n_linears))

    def linear_done(self, report: ModuleReport) -> None:
        self.seen.append(("linear_done", report.name))

    def block_done(self, index: int, seconds: float) -> None:
        self.seen.append(("block_done", index))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Interrupted(Exception):
    """Raised by `StopAfter`."""


class StopAfter(Listener):
    """Ends a run after some blocks, as an error in the next one would."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks

    def block_started(self, index: int, n_linears: int) -> None:
        if index == self.n_blocks:
            raise Interrupted
