"""PTQ1.61 from a model folder to a packed one: every family, true bits, trained scales, the same bytes after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    Events,
    Interrupted,
    StopAfter,
    dense_model,
    logits,
    quantized_weights,
    sha256_of,
    small_request,
    small_run,
)
from tiny_models import FAMILIES, tiny_model

import quantkit
from quantkit.formats.checkpoint import open_folder
from quantkit.formats.sign_salient import SignSalient
from quantkit.pipeline import QuantizeResult, dry_run

PTQ161: dict[str, Any] = {"bits": 1.6, "group_size": None}
ALONE = ["correction=0.0", "sequential=false"]  # no float model beside
TRAINED = ["block_steps=6", "correction=0.5", "sequential=true"]


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    return tiny_model("llama", models, num_hidden_layers=3)


@pytest.fixture(scope="module")
def trained(source: Path, text: Path, models: Path) -> QuantizeResult:
    return ptq161_run(source, models / "trained", text, TRAINED)


def ptq161_run(
    source: Path, output: Path, text: Path, settings: list[str] | tuple[str, ...] = (), **options: Any
) -> QuantizeResult:
    return small_run(source, output, text, "ptq161", settings=settings, **{**PTQ161, **options})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_with_its_stored_weights(family: str, models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model(family, models)
    settings = TRAINED if family in ("gemma2", "phi3", "qwen3_moe") else []  # two masks, fused linears, experts
    result = ptq161_run(source, tmp_path / "out", text, settings)
    assert {module.format for module in result.modules} == {"sign_salient"}
    assert all(0 < module.relative_error < 1 for module in result.modules)
    dense = dense_model(source, {name: item.dequantize() for name, item in quantized_weights(result.output).items()})
    packed = quantkit.load(result.output, dtype="float32")
    # float32 sums in another order: 2**-24 per operation, grown by two blocks; observed 2e-5 on logits of size 5
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bits", "salient_bits"), [(1, 4), (1.3, 4), (1.6, 2), (1.6, 4), (2, 8)])
def test_the_plan_the_result_and_the_file_agree_to_the_byte(
    bits: float, salient_bits: int, source: Path, text: Path, tmp_path: Path
) -> None:
    settings = [f"salient_bits={salient_bits}", "refine=0", *ALONE]
    options = {**PTQ161, "bits": bits, "settings": settings}
    plan = dry_run(small_request(source, tmp_path / "out", text, "ptq161", **options))
    result = small_run(source, tmp_path / "out", text, "ptq161", **options)
    checkpoint = open_folder(result.output)
    n_bytes = n_weights = 0
    for module in checkpoint.modules.values():
        for name in module.spec.tensor_layout():
            n_bytes += checkpoint.tensors[f"{module.prefix}.{name}"].n_bytes
        n_weights += module.spec.n_weights
    assert plan.quantized_bytes == n_bytes
    assert plan.bpw == result.bpw == 8 * n_bytes / n_weights
    assert plan.output_bytes == result.size_bytes


def test_salient_channels_are_a_share_of_each_input(source: Path, text: Path, tmp_path: Path) -> None:
    result = ptq161_run(source, tmp_path / "out", text, ["refine=0", *ALONE])
    for weight in quantized_weights(result.output).values():
        assert isinstance(weight, SignSalient)
        assert weight.salient_mask is not None
        assert int(weight.salient_mask.sum()) == round(0.6 * len(weight.salient_mask))


def test_training_lowers_the_loss_of_every_block_and_says_so(source: Path, text: Path, tmp_path: Path) -> None:
    class Trained(Events):
        def scales_trained(self, step: int, n_steps: int, loss: float) -> None:
            self.seen.append(("scales_trained", step, n_steps))

    events = Trained()
    ptq161_run(source, tmp_path / "out", text, ["block_steps=6"], listener=events)
    notes = [note for note in events.notes if "scales trained" in note]
    assert len(notes) == 3
    assert notes[0].startswith("model.layers.0: scales trained for 6 steps, held-out loss ")
    for note in notes:
        before, after = map(float, note.rpartition("loss ")[2].split(" -> "))
        assert after <= before
    assert [event for event in events.seen if event[0] == "scales_trained"] == 3 * [
        ("scales_trained", 3, 6),
        ("scales_trained", 6, 6),
    ]
    assert sum(event[0] == "linear_done" for event in events.seen) == 21


def test_the_papers_recipe_is_a_matter_of_settings(source: Path, text: Path, tmp_path: Path) -> None:
    paper = ["salience=absmax", "compensate=false", "refine=0", "grid=minmax", "block_scales=paper", "block_steps=6"]
    paper += [*ALONE, "salient_bits=4"]
    result = ptq161_run(source, tmp_path / "out", text, paper)
    for weight in quantized_weights(result.output).values():
        assert weight.salient.bits == (4,)


def test_compensation_pays_in_every_linear(source: Path, text: Path, tmp_path: Path) -> None:
    """Of the first block, whose inputs are the same in both runs."""
    runs = [
        ptq161_run(source, tmp_path / name, text, settings)
        for name, settings in (("ours", ALONE), ("plain", [*ALONE, "compensate=false", "refine=0"]))
    ]
    for ours, plain in list(zip(*(run.modules for run in runs), strict=True))[:7]:
        assert ours.relative_error < plain.relative_error


def test_a_run_that_was_interrupted_ends_in_the_same_bytes(
    source: Path, text: Path, tmp_path: Path, trained: QuantizeResult
) -> None:
    with pytest.raises(Interrupted):
        ptq161_run(source, tmp_path / "again", text, TRAINED, listener=StopAfter(1))
    again = ptq161_run(source, tmp_path / "again", text, TRAINED)
    assert again.resumed_blocks == 1
    assert sha256_of(again.output) == sha256_of(trained.output)


def test_a_run_that_ends_amid_gradient_steps_ends_in_the_same_bytes(
    source: Path, text: Path, tmp_path: Path, trained: QuantizeResult
) -> None:
    class StopInTraining(Events):
        n_told = 0

        def scales_trained(self, step: int, n_steps: int, loss: float) -> None:
            self.n_told += 1
            if self.n_told == 3:  # the first epoch of the second block
                raise Interrupted

    with pytest.raises(Interrupted):
        ptq161_run(source, tmp_path / "again", text, TRAINED, listener=StopInTraining())
    again = ptq161_run(source, tmp_path / "again", text, TRAINED)
    assert again.resumed_blocks == 1
    assert sha256_of(again.output) == sha256_of(trained.output)


def test_targets_on_disk_change_nothing(source: Path, text: Path, tmp_path: Path, trained: QuantizeResult) -> None:
    result = ptq161_run(source, tmp_path / "out", text, TRAINED, offload="disk")
    assert sha256_of(result.output) == sha256_of(trained.output)


def test_a_rotated_model_goes_through(source: Path, text: Path, tmp_path: Path) -> None:
    result = ptq161_run(source, tmp_path / "out", text, ["transform=hadamard", "block_steps=3", *ALONE])
    packed = quantkit.load(result.output, dtype="float32")
    assert torch.isfinite(logits(packed)).all()
