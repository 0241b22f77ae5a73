"""transform=restore: a low-rank tuning between two passes, for any solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    Events,
    Interrupted,
    dense_model,
    logits,
    quantized_weights,
    sha256_of,
    small_run,
)
from tiny_models import tiny_model
from torch import nn

import quantkit
from quantkit.errors import NumericalError
from quantkit.formats.safetensors_io import write_tensors
from quantkit.pipeline.journal import work_folder
from quantkit.pipeline.restore import FILE, LowRank, Restored, attached, tune
from quantkit.recipe import resolve

SETTINGS = ["transform=restore", "restore_steps=4", "restore_lr=1e-2", "restore_rank=8"]


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    return tiny_model("llama", models)


def restored_run(source: Path, output: Path, text: Path, method: str = "gptq", **options: Any) -> Any:
    return small_run(source, output, text, method, **{"settings": SETTINGS, **options})


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llama", "rtn", {}),
        ("opt", "gptq", {}),
        ("qwen3_moe", "gptq", {}),
        ("llama", "ptq161", {"bits": 1.6, "group_size": None}),
        ("gemma2", "littlebit", {"bits": 1.0, "group_size": None}),
    ],
)
def test_every_solver_may_follow(
    family: str, method: str, options: dict[str, Any], models: Path, text: Path, tmp_path: Path
) -> None:
    source = tiny_model(family, models)
    events = Events()
    result = restored_run(source, tmp_path / "out", text, method, listener=events, **options)
    packed = quantkit.load(result.output, dtype="float32")
    weights = {name: item.dequantize() for name, item in quantized_weights(result.output).items()}
    torch.testing.assert_close(logits(packed), logits(dense_model(source, weights)), rtol=0, atol=1e-4)
    (said,) = (note for note in events.notes if "held-out loss" in note)
    assert said.startswith("transform=restore: 4 steps, held-out loss ")
    assert not work_folder(result.output).exists()


def test_the_tuning_lowers_the_loss_and_moves_the_second_pass(source: Path, text: Path, tmp_path: Path) -> None:
    events = Events()
    settings = ["transform=restore", "restore_steps=20", "restore_lr=1e-2"]
    restored = small_run(source, tmp_path / "restored", text, settings=settings, listener=events)
    (said,) = (note for note in events.notes if "held-out loss" in note)
    before, after = map(float, said.rpartition("loss ")[2].split(" -> "))
    assert after < before
    plain = small_run(source, tmp_path / "plain", text)
    assert restored.bpw == plain.bpw
    ours, theirs = (quantized_weights(run.output)["model.layers.0.mlp.up_proj"] for run in (restored, plain))
    assert not torch.equal(ours.codes, theirs.codes)


class Interrupting(Events):
    """Ends the run at the n-th beginning of a block, or when the tuning is reported."""

    def __init__(self, block: int | None) -> None:
        super().__init__()
        self.block = block

    def block_started(self, index: int, n_linears: int) -> None:
        super().block_started(index, n_linears)
        if sum(event[0] == "block_started" for event in self.seen) - 1 == self.block:
            raise Interrupted

    def note(self, text: str) -> None:
        super().note(text)
        if self.block is None and "held-out loss" in text:
            raise Interrupted


@pytest.mark.parametrize("block", [1, 3, None], ids=["first pass", "second pass", "tuning"])
def test_a_run_that_was_interrupted_ends_in_the_same_bytes(
    block: int | None, source: Path, text: Path, tmp_path: Path
) -> None:
    whole = sha256_of(restored_run(source, tmp_path / "whole", text).output)
    with pytest.raises(Interrupted):
        restored_run(source, tmp_path / "again", text, listener=Interrupting(block))
    assert (work_folder(tmp_path / "again") / FILE).exists() is (block == 3)
    again = restored_run(source, tmp_path / "again", text)
    assert again.resumed_blocks == (1 if block == 3 else 0)
    assert sha256_of(again.output) == whole


def test_adapters_add_nothing_at_first_and_what_they_merge_to_later() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(6, 4)
    adapter = LowRank(linear, 3, generator).eval()
    inputs = torch.randn(5, 6, generator=generator)
    with attached({"a": linear}, {"a": adapter}):
        assert torch.equal(linear(inputs), nn.functional.linear(inputs, linear.weight, linear.bias))
        adapter.up.data = torch.randn(4, 3, generator=generator)
        merged = nn.functional.linear(inputs, linear.weight + adapter.delta(), linear.bias)
        torch.testing.assert_close(linear(inputs), merged)
    assert torch.equal(linear(inputs), nn.functional.linear(inputs, linear.weight, linear.bias))


def test_restored_weights_are_read_in_place_of_the_sources(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / FILE, {"layer.weight": weight})
    restored = Restored(tmp_path / FILE)
    assert set(restored.touched) == {"layer.weight"}
    assert torch.equal(restored("layer.weight", torch.zeros(2, 3)), weight)


def test_a_tuning_that_diverges_is_an_error() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 9)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            hidden = torch.nn.functional.one_hot(input_ids % 4, 4).float() * float("nan")
            return type("Output", (), {"logits": self.linear(hidden)})

    model = Model()
    adapters = {"linear": LowRank(model.linear, 2, torch.Generator().manual_seed(0))}
    recipe = resolve("gptq", settings=SETTINGS)
    with pytest.raises(NumericalError, match="transform=restore: the tuning diverged; use a lower --set restore_lr"):
        tune(model, adapters, torch.arange(12).reshape(2, 6) % 9, recipe, 0)
