"""littlebit through the pipeline: sign factors on disk, trained or not, at their real size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    Interrupted,
    StopAfter,
    dense_model,
    dense_weight,
    logits,
    quantized_weights,
    sha256_of,
    token_ids,
)
from tiny_models import FAMILIES, tiny_model

import quantkit
from quantkit.algorithms.hessian import damped, without_dead_columns
from quantkit.algorithms.littlebit import Rank
from quantkit.algorithms.sign_refinement import aligned_start, refine_factors
from quantkit.calib.statistics import InputStatistics
from quantkit.errors import RequestError
from quantkit.formats.checkpoint import open_folder
from quantkit.formats.files import read_json
from quantkit.formats.safetensors_io import read_header, read_tensor
from quantkit.formats.sign_factors import SignFactors
from quantkit.models.structure import Linear
from quantkit.pipeline import Listener, QuantizeRequest, QuantizeResult, dry_run, run
from quantkit.pipeline.factorize import factorize_linear, to_stored
from quantkit.pipeline.journal import work_folder
from quantkit.recipe import resolve
from quantkit.runtime.packed_linear import PackedLinear

TRAINING = ["refine=qat", "sign_rounds=0", "steps=6", "batch=2", "check_every=2", "lr=4e-3"]


def request(
    model: Path, output: Path, text: Path, *settings: str, bits: float = 1.25, **options: Any
) -> QuantizeRequest:
    values = {"calib": str(text), "n_samples": 6, "seq_len": 32, **options}
    return QuantizeRequest(
        model=str(model), output=output, recipe=resolve("littlebit", bits=bits, settings=settings), **values
    )


def littlebit(model: Path, output: Path, text: Path, *settings: str, **options: Any) -> QuantizeResult:
    listener = options.pop("listener", None)
    return run(request(model, output, text, *settings, **options), listener)


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return tiny_model("llama", models)


@pytest.fixture(scope="module")
def trained(llama: Path, text: Path, models: Path) -> QuantizeResult:
    """An undisturbed run with training."""
    return littlebit(llama, models / "trained", text, *TRAINING)


def assert_computes_with_its_weights(source: Path, output: Path) -> None:
    """The packed model against the original with the stored factors multiplied out, and the norms of the file."""
    weights = {name: packed.dequantize() for name, packed in quantized_weights(output).items()}
    packed, dense = quantkit.load(output, dtype="float32"), dense_model(source, weights)
    refs = read_header(output / "model.safetensors")
    for name, parameter in dense.named_parameters():
        if name in refs and refs[name].shape == tuple(parameter.shape):
            parameter.data.copy_(read_tensor(refs[name]))
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    # float32 sums in another order, grown by two blocks; the logits are of size 5
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=2e-4)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(packed.generate(token_ids(1), **settings), dense.generate(token_ids(1), **settings))


def stored_bytes(folder: Path) -> int:
    checkpoint = open_folder(folder)
    names = {f"{module.prefix}.{key}" for module in checkpoint.modules.values() for key in module.spec.tensor_layout()}
    return sum(ref.n_bytes for name, ref in checkpoint.tensors.items() if name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model(family, models, seed=2)
    bits = 1.6 if family == "qwen3_moe" else 1.25  # experts of 32 x 64: their scales alone take 0.75
    result = littlebit(source, tmp_path / "out", text, "sign_rounds=1", bits=bits)
    assert_computes_with_its_weights(source, result.output)
    assert result.bpw <= bits
    assert {module.format for module in result.modules} == {"sign_factors"}
    assert all(0 < module.relative_error < 1 for module in result.modules)


@pytest.mark.parametrize("family", ["opt", "gemma3", "qwen3_moe"])
def test_training_a_family(family: str, models: Path, text: Path, tmp_path: Path) -> None:
    """With biases, soft caps and windows, and experts that get no token in some step."""
    source = tiny_model(family, models, seed=2)
    bits = 1.6 if family == "qwen3_moe" else 1.25
    settings = ["refine=qat", "sign_rounds=0", "steps=3", "batch=1", "check_every=3", "lr=1e-2"]
    result = littlebit(source, tmp_path / "out", text, *settings, bits=bits)
    assert_computes_with_its_weights(source, result.output)


def test_bits_out_of_reach_are_refused_before_anything_is_written(llama: Path, text: Path, tmp_path: Path) -> None:
    message = r"^0.3 bits per weight is less than these layers can be stored in: .* use --bits 0\.\d+ or more$"
    for carry_out in (dry_run, run):
        with pytest.raises(RequestError, match=message):
            carry_out(request(llama, tmp_path / "out", text, bits=0.3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [["refine=none"], ["sign_rounds=1"], ["paths=1", "sign_rounds=1"]], ids=",".join)
@pytest.mark.parametrize("bits", [0.9, 1.4])
def test_the_plan_is_the_file_to_the_byte(
    bits: float, settings: list[str], llama: Path, text: Path, tmp_path: Path
) -> None:
    plan = dry_run(request(llama, tmp_path / "out", text, *settings, bits=bits))
    result = littlebit(llama, tmp_path / "out", text, *settings, bits=bits)
    assert plan.bpw == result.bpw <= bits
    assert plan.output_bytes == result.size_bytes
    assert not plan.at_most
    assert stored_bytes(result.output) == plan.quantized_bytes
    n_weights = sum(spec.n_weights for _, spec in plan.modules)
    assert result.bpw == 8 * stored_bytes(result.output) / n_weights
    assert {spec.to_json()["format"] for _, spec in plan.modules} == {"sign_factors"}
    if settings == ["paths=1", "sign_rounds=1"]:
        assert all(len(weight.ranks) == 1 for weight in quantized_weights(result.output).values())


def test_the_plan_of_a_training_counts_its_memory_disk_and_time(llama: Path, text: Path, tmp_path: Path) -> None:
    """Float weights, four float32 numbers for each sign, activations and logits of a batch; more for more."""
    plain = dry_run(request(llama, tmp_path / "out", text))
    small, large = (
        dry_run(request(llama, tmp_path / "out", text, "refine=qat", f"batch={batch}", "steps=2000"))
        for batch in (1, 64)
    )
    assert plain.peak_memory_bytes < large.peak_memory_bytes
    assert large.peak_memory_bytes - small.peak_memory_bytes > 4 * 63 * 32 * 6 * 288  # logits of 63 more sequences
    n_signs = sum(sum(spec.ranks) * (spec.in_features + spec.out_features) for _, spec in plain.modules)
    model = dense_model(llama, {})
    n_norms = sum(part.numel() for name, part in model.named_parameters() if "norm" in name)
    assert small.scratch_bytes - plain.scratch_bytes == 28 * (n_signs + n_norms)
    assert large.seconds > small.seconds > plain.seconds
    more = dry_run(request(llama, tmp_path / "out", text, "refine=qat", "batch=1", "steps=2000", "also_train=all"))
    n_rest = sum(part.numel() for name, part in model.named_parameters() if "proj" not in name and "norm" not in name)
    assert more.scratch_bytes - small.scratch_bytes == 28 * n_rest
    assert more.peak_memory_bytes - small.peak_memory_bytes == 16 * n_rest
    assert small.output_bytes == plain.output_bytes


def test_refinement_is_that_of_the_algorithm() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(24, 40, generator=generator), torch.randn(200, 40, generator=generator)
    inputs[:, 3] = 0
    statistics = InputStatistics(40, n_tokens=200, gram=inputs.t() @ inputs)
    solved = factorize_linear(Linear("a.b", "b", 24, 40), weight, statistics, resolve("littlebit"), Rank(8, 2))
    hessian = statistics.hessian()
    assert hessian is not None
    target, live = without_dead_columns(weight, hessian)
    metric = damped(live, 0.01)
    expected = to_stored(refine_factors(target, metric, aligned_start(target, metric, Rank(8, 2)), 4))
    assert torch.equal(solved.weight.dequantize(), expected.dequantize())
    outputs = inputs @ (weight - solved.weight.dequantize()).t()
    assert solved.relative_error == pytest.approx(float(outputs.norm() / (inputs @ weight.t()).norm()), rel=1e-4)


def test_an_expert_that_no_token_reached_is_fitted_to_its_weights() -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    linear = Linear("a.b", "b", 24, 40)
    by_identity = InputStatistics(40, n_tokens=2, gram=torch.eye(40))
    for statistics in (None, InputStatistics(40)):
        solved = factorize_linear(linear, weight, statistics, resolve("littlebit"), Rank(8, 1))
        same = factorize_linear(linear, weight, by_identity, resolve("littlebit"), Rank(8, 1))
        assert torch.equal(solved.weight.dequantize(), same.weight.dequantize())


def test_errors_name_the_linear() -> None:
    weight = torch.full((24, 40), float("nan"))
    with pytest.raises(quantkit.errors.NumericalError, match=r"^a\.b: the weight holds NaN or Inf"):
        factorize_linear(Linear("a.b", "b", 24, 40), weight, None, resolve("littlebit"), Rank(8, 1))


# --- training -----------------------------------------------------------------------------------------------------


def test_a_trained_model_computes_from_its_packed_signs(llama: Path, trained: QuantizeResult) -> None:
    assert_computes_with_its_weights(llama, trained.output)
    report = read_json(trained.output / "report.json")
    checks = report["training"]["checks"]
    assert [row["step"] for row in checks] == [0, 2, 4, 6]
    best = min(checks, key=lambda row: row["held_out_loss"])
    assert report["training"]["kept_step"] == best["step"] > 0
    assert report["training"]["steps"] == 6


def test_training_changes_signs_and_no_byte_count(
    llama: Path, text: Path, trained: QuantizeResult, tmp_path: Path
) -> None:
    start = littlebit(llama, tmp_path / "out", text, "sign_rounds=0")
    assert start.size_bytes == trained.size_bytes
    before, after = quantized_weights(start.output), quantized_weights(trained.output)
    turned = []
    for name, weight in before.items():
        other = after[name]
        assert isinstance(weight, SignFactors)
        assert isinstance(other, SignFactors)
        assert weight.spec() == other.spec()
        turned.append(float((weight.u_signs != other.u_signs).float().mean()))
    assert 0 < sum(turned) / len(turned) < 0.5


def test_errors_of_trained_linears_are_their_weights_own(llama: Path, trained: QuantizeResult) -> None:
    model = dense_model(llama, {})
    stored = quantized_weights(trained.output)
    for module in trained.modules:
        weight = dense_weight(model, module.name)
        expected = (weight - stored[module.name].dequantize()).norm() / weight.norm()
        assert module.relative_error == pytest.approx(float(expected), rel=1e-5)


class StopAtStep(Listener):
    """Ends a run when some steps of training are kept."""

    def __init__(self, step: int) -> None:
        self.step = step

    def training_started(self, n_steps: int) -> None:
        if self.step == 0:
            raise Interrupted

    def trained(self, step: int, n_steps: int, loss: float, held_out_loss: float) -> None:
        if step == self.step:
            raise Interrupted


@pytest.mark.parametrize("step", [0, 2, 4, 6])
def test_a_resumed_training_gives_the_same_bytes(
    step: int, llama: Path, text: Path, trained: QuantizeResult, tmp_path: Path
) -> None:
    """And the same losses, which are in report.json."""
    with pytest.raises(Interrupted):
        littlebit(llama, tmp_path / "out", text, *TRAINING, listener=StopAtStep(step))
    again = littlebit(llama, tmp_path / "out", text, *TRAINING)
    assert again.resumed_blocks == 2
    assert sha256_of(again.output) == sha256_of(trained.output)


def test_a_run_that_ended_in_its_walk_trains_as_well(
    llama: Path, text: Path, trained: QuantizeResult, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        littlebit(llama, tmp_path / "out", text, *TRAINING, listener=StopAfter(1))
    again = littlebit(llama, tmp_path / "out", text, *TRAINING)
    assert again.resumed_blocks == 1
    assert sha256_of(again.output) == sha256_of(trained.output)


def test_other_training_settings_do_not_resume(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        littlebit(llama, tmp_path / "out", text, *TRAINING, listener=StopAtStep(0))
    with pytest.raises(RequestError, match=r"other settings \(recipe\.lr: 0\.004 then, 0\.002 now\)"):
        littlebit(llama, tmp_path / "out", text, *TRAINING[:-1], "lr=2e-3")
    with pytest.raises(RequestError, match=r"recipe.train_samples: None then, 8 now; training\.fingerprint: "):
        littlebit(llama, tmp_path / "out", text, *TRAINING, "train_samples=8")


def test_more_text_for_training_than_for_calibration(llama: Path, text: Path, tmp_path: Path) -> None:
    request_ = request(llama, tmp_path / "out", text, *TRAINING, "train_samples=20")
    with pytest.raises(Interrupted):
        run(request_, StopAtStep(2))
    settings = read_json(work_folder(request_.output) / "run.json")
    assert (settings["calibration"]["n_samples"], settings["training"]["n_samples"]) == (6, 20)


def test_a_single_sequence_cannot_be_trained_on(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds out one calibration sequence and trains on the others: give 2"):
        littlebit(llama, tmp_path / "out", text, *TRAINING, n_samples=1)


def test_norms_and_embedding_are_stored_as_they_were_trained(llama: Path, text: Path, tmp_path: Path) -> None:
    """In the source's dtype and under its names; a resumed run, the best checkpoint included, gives the same bytes."""
    settings = (*TRAINING, "also_train=all")
    whole = littlebit(llama, tmp_path / "whole", text, *settings)
    with pytest.raises(Interrupted):
        littlebit(llama, tmp_path / "out", text, *settings, listener=StopAtStep(4))
    again = littlebit(llama, tmp_path / "out", text, *settings)
    assert sha256_of(again.output) == sha256_of(whole.output)
    before, after = (read_header(folder / "model.safetensors") for folder in (llama, again.output))
    packed = quantkit.load(again.output, dtype="float32").state_dict()
    unquantized = [name for name in before if "proj" not in name]
    assert any("norm" in name for name in unquantized)
    assert any("embed" in name for name in unquantized)
    for name in unquantized:
        old, new = read_tensor(before[name]), read_tensor(after[name])
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        assert not torch.equal(old, new), name
        assert torch.equal(packed[name], new.float()), name


# --- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "littlebit works at 0.05 to 2 bits, not 3"),
        ({"bits": 0.01}, "littlebit works at 0.05 to 2 bits, not 0.01"),
        ({"bpw": 2.5}, "littlebit works at 0.05 to 2 bits, not 2.5"),
        ({"group_size": 32}, "group_size is about codes on a grid; solver=littlebit stores sign factors"),
        ({"settings": ["symmetric=true"]}, "symmetric is about codes on a grid"),
        ({"settings": ["act_order=full"]}, "act_order is about codes on a grid"),
        ({"settings": ["correction=0.5"]}, "correction is about codes on a grid"),
        ({"settings": ["grid=mse"]}, "grid is about codes on a grid"),
        ({"settings": ["allocator=lim"]}, "allocator is about codes on a grid"),
        ({"settings": ["refine=2"]}, "refine is one of none, signs, qat with solver=littlebit, not 2"),
        ({"settings": ["refine=gat"]}, "refine is one of none, signs, qat with solver=littlebit, not 'gat'"),
        ({"settings": ["paths=3"]}, "paths is 1, or 2 with the residual, not 3"),
        ({"settings": ["sign_rounds=-1"]}, "sign_rounds is a number of rounds, 0 to 100, not -1"),
        ({"settings": ["steps=10"]}, "steps is a setting of training; add --set refine=qat"),
        ({"settings": ["refine=qat", "steps=0"]}, "steps must be at least 1, not 0"),
        ({"settings": ["refine=qat", "lr=0"]}, "lr is a learning rate above 0, at most 1, not 0"),
        ({"settings": ["refine=qat", "patience=-1"]}, "intermediate and patience cannot be negative"),
        ({"settings": ["refine=qat", "train_samples=1"]}, "train_samples must be at least 2 (one is held out), not 1"),
        ({"settings": ["also_train=all"]}, "also_train is a setting of training; add --set refine=qat"),
        ({"settings": ["refine=qat", "also_train=head"]}, "unknown also_train 'head'"),
        (
            {"settings": ["refine=qat", "also_train=all", "embedding_bits=8", "head_bits=8"]},
            "also_train=all trains embedding and head in 16 bits, not 8 or 4: use also_train=norms",
        ),
        (
            {"settings": ["refine=qat", "transform=hadamard"]},
            "transform=hadamard does not go with refine=qat, which trains the model as it is",
        ),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve("littlebit", **settings)
    assert str(caught.value).startswith(message)


def test_names_and_settings_of_littlebit_elsewhere() -> None:
    with pytest.raises(RequestError, match="refine is a number of rounds, not 'qat'; names go with --method"):
        resolve("gptq", settings=["refine=qat"])
    with pytest.raises(RequestError, match=r"^paths is a setting of solver=littlebit; use --method littlebit$"):
        resolve("gptq", settings=["paths=1"])
    with pytest.raises(RequestError, match=r"^bits must be 1 to 8, not 0\.5; --method littlebit goes below 1$"):
        resolve("gptq", bits=0.5)


def test_stored_bits_and_bits_are_the_same_budget(llama: Path, text: Path, tmp_path: Path) -> None:
    by_bits = dry_run(request(llama, tmp_path / "out", text, bits=1.1))
    recipe = resolve("littlebit", bpw=1.1)
    assert dry_run(QuantizeRequest(model=str(llama), output=tmp_path / "out", recipe=recipe, calib=str(text))).bpw == (
        by_bits.bpw
    )


@pytest.mark.parametrize(
    ("settings", "rounds"), [([], 4), (["refine=qat"], 1), (["refine=qat", "sign_rounds=3"], 3), (["sign_rounds=0"], 0)]
)
def test_few_rounds_before_training(settings: list[str], rounds: int) -> None:
    assert resolve("littlebit", settings=settings).rounds_of_signs == rounds


@pytest.mark.parametrize(
    ("settings", "peak"), [({"bits": 1.0}, 4e-4), ({"bits": 0.1}, 4e-3), ({"bpw": 0.5}, 8e-4), ({"lr": 1e-3}, 1e-3)]
)
def test_fewer_bits_are_trained_at_a_higher_rate(settings: dict[str, float], peak: float) -> None:
    more = ["refine=qat", *(f"{name}={value}" for name, value in settings.items())]
    assert resolve("littlebit", settings=more).highest_lr == pytest.approx(peak)


@pytest.mark.parametrize(("refine", "needed"), [("none", False), ("signs", True), ("qat", True)])
def test_only_the_start_needs_no_text(refine: str, needed: bool) -> None:
    assert resolve("littlebit", settings=[f"refine={refine}"]).needs_calibration is needed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu(llama: Path, text: Path, tmp_path: Path) -> None:
    result = littlebit(llama, tmp_path / "out", text, *TRAINING, device="cuda")
    assert_computes_with_its_weights(llama, result.output)
    assert read_json(result.output / "report.json")["training"]["steps"] == 6
