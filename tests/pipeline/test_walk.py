"""The loop over blocks: which inputs a block is solved for, in which stages, and what does not change the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_models import (
    SMALL,
    Events,
    dense_model,
    dense_weight,
    quantized_weights,
    sha256_of,
    small_request,
    small_run,
)
from tiny_models import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from quantkit.calib.datasets import load_calibration
from quantkit.calib.statistics import InputStatistics
from quantkit.errors import RequestError
from quantkit.formats.files import read_json
from quantkit.models.structure import Linear
from quantkit.pipeline import default_output, run
from quantkit.pipeline.solve import solve_linear
from quantkit.recipe import Recipe


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return tiny_model("llama", models, num_hidden_layers=3)


@pytest.fixture(scope="module")
def plain(llama: Path, text: Path, models: Path) -> Path:
    """An undisturbed run."""
    return small_run(llama, models / "plain", text).output


def hessians(
    model: PreTrainedModel, names: list[str], text: Path, n_samples: int = 4, seq_len: int = 32
) -> dict[str, Tensor]:
    """(2 / n_tokens) X^T X of the inputs of some linears, sample by sample through the whole model."""
    samples = load_calibration(str(text), tiny_tokenizer(), n_samples=n_samples, seq_len=seq_len).input_ids
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        hook = lambda module, args, name=name: inputs[name].append(args[0].flatten(0, -2))  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        for sample in samples:
            model(sample.unsqueeze(0), use_cache=False)
    stacked = {name: torch.cat(rows).double() for name, rows in inputs.items()}
    return {name: (2 / len(x) * x.t() @ x).float() for name, x in stacked.items()}


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    error = weight - quantized
    return float(((error @ hessian * error).sum() / (weight @ hessian * weight).sum()).sqrt())


def reported_errors(folder: Path) -> dict[str, float]:
    return {row["name"]: row["relative_error"] for row in read_json(folder / "report.json")["modules"]}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "opt", "gpt_neox", "phi3", "qwen3_moe"])
def test_a_block_sees_what_the_quantized_blocks_before_it_make(
    family: str, models: Path, text: Path, tmp_path: Path
) -> None:
    """The literal way: a dense model with its first block replaced, all of it at once, hooks on its second block."""
    source = tiny_model(family, models)
    sizes = {"n_samples": 3, "seq_len": 96}  # longer than Gemma's sliding window of 64
    output = small_run(source, tmp_path / "out", text, **sizes).output
    quantized = {name: packed.dequantize() for name, packed in quantized_weights(output).items()}
    first = {name: weight for name, weight in quantized.items() if ".0." in name.partition("layers")[2][:3]}
    second = [name for name in quantized if name not in first and ".experts." not in name]
    assert first
    assert second
    model = dense_model(source, first)
    expected = hessians(model, second, text, **sizes)
    original = hessians(dense_model(source, {}), second, text, **sizes)
    reported = reported_errors(output)
    for name in second:
        weight = dense_weight(model, name)
        assert reported[name] == pytest.approx(relative_error(weight, quantized[name], expected[name]), rel=1e-4)
        assert reported[name] != pytest.approx(relative_error(weight, quantized[name], original[name]), rel=1e-3)


def test_codes_are_those_of_the_solver_on_these_hessians(llama: Path, plain: Path, text: Path) -> None:
    stored = quantized_weights(plain)
    done = {name: packed.dequantize() for name, packed in stored.items() if "layers.2." not in name}
    names = [name for name in stored if "layers.2." in name]
    model = dense_model(llama, done)
    for name, hessian in hessians(model, names, text).items():
        weight = dense_weight(model, name)
        linear = Linear(name, name, *weight.shape)
        statistics = InputStatistics(linear.in_features, n_tokens=2, gram=hessian)  # so that hessian() is this one
        solved = solve_linear(linear, weight, statistics, Recipe(bits=3, group_size=SMALL["group_size"])).weight
        # the Hessian's sums run in another order here: a code exactly between two levels may fall to the other side
        assert (solved.codes == stored[name].codes).float().mean() > 0.99, name


def test_sequential_solves_a_block_in_stages(llama: Path, plain: Path, text: Path, tmp_path: Path) -> None:
    """First the linears that read the block's input, as ever; the others see the quantized ones before them."""
    staged = small_run(llama, tmp_path / "staged", text, settings=["sequential=true"]).output
    at_once, in_stages = quantized_weights(plain), quantized_weights(staged)
    stages = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    reported = reported_errors(staged)
    done: dict[str, Tensor] = {}
    for stage in stages:
        names = [name for name in in_stages if ".layers.0." in name and name.rpartition(".")[2] in stage]
        model = dense_model(llama, done)
        for name, hessian in hessians(model, names, text).items():
            quantized = in_stages[name].dequantize()
            expected = relative_error(dense_weight(model, name), quantized, hessian)
            assert reported[name] == pytest.approx(expected, rel=1e-4), name
            assert torch.equal(in_stages[name].codes, at_once[name].codes) is (stage is stages[0]), name
            done[name] = quantized


def test_sequential_takes_all_experts_side_by_side(models: Path, text: Path, tmp_path: Path) -> None:
    """One stage for the gates and ups of all experts, one for their downs, whichever the first sample reaches."""
    source = tiny_model("qwen3_moe", models, seed=1, num_experts=8)
    events = Events()
    small_run(source, tmp_path / "out", text, settings=["sequential=true"], listener=events)
    solved = [
        name for kind, name, *_ in events.seen if kind == "linear_done" and ".0." in name.partition("layers")[2][:3]
    ]
    kinds = ["down" if name.endswith("down_proj") else "in" if ".experts." in name else "attention" for name in solved]
    assert kinds == ["attention"] * 4 + ["in"] * 16 + ["down"] * 8


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_offload_changes_no_byte(offload: str, llama: Path, plain: Path, text: Path, tmp_path: Path) -> None:
    assert sha256_of(small_run(llama, tmp_path / "out", text, offload=offload).output) == sha256_of(plain)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_same_request_same_bytes_whatever_the_output_is_called(
    llama: Path, plain: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    again = small_run(llama, Path("other/name"), text).output
    assert sha256_of(again) == sha256_of(plain)
    for path in plain.iterdir():
        if path.suffix in (".json", ".md"):
            content = path.read_text()
            assert str(plain.parent) not in content, path
            assert "plain" not in content, path


def test_the_listener_hears_every_step(llama: Path, text: Path, tmp_path: Path) -> None:
    events = Events()
    result = run(small_request(llama, tmp_path / "out", text), events)
    names = [module.name for module in result.modules]
    expected: list[tuple[object, ...]] = [("started", 3, 0)]
    for index in range(3):
        expected.append(("block_started", index, 7))
        expected += [("linear_done", name) for name in names[7 * index : 7 * index + 7]]
        expected.append(("block_done", index))
    assert events.seen == expected
    assert events.notes == []


def test_result_says_what_was_done(llama: Path, text: Path, tmp_path: Path) -> None:
    result = small_run(llama, tmp_path / "out", text)
    said = result.to_json()
    assert set(said) == {
        "output",
        "method",
        "bpw",
        "size_bytes",
        "bytes",
        "bits_per_parameter",
        "original_bytes",
        "seconds",
        "peak_rss_bytes",
        "resumed_blocks",
        "modules",
    }
    assert said["output"] == str(tmp_path / "out")
    assert said["method"] == "gptq"
    assert said["resumed_blocks"] == 0
    assert 0 < said["seconds"] < 600
    assert 50 << 20 < said["peak_rss_bytes"] < 64 << 30
    assert set(said["modules"][0]) == {"name", "format", "bpw", "relative_error"}
    # 3 bits, and per group of 32 a scale of 16 and a zero of 3 bits
    assert said["bpw"] == pytest.approx(3 + 19 / 32)


def test_default_output_is_named_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some").mkdir()
    monkeypatch.chdir(tmp_path / "some")
    recipe = Recipe(method="gptq", bits=3)
    assert default_output("models/llama/", recipe) == Path("llama-gptq-3b")
    assert default_output("org/name", recipe) == Path("name-gptq-3b")
    assert default_output(".", recipe) == Path("some-gptq-3b")


def test_seq_len_defaults_to_the_context_and_may_not_exceed_it(llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"seq_len 257 exceeds the model's context of 256 tokens"):
        small_run(llama, tmp_path / "out", text, seq_len=257)
    output = small_run(llama, tmp_path / "out", text, seq_len=None, n_samples=1).output
    assert read_json(output / "config.json")["quantization_config"]["calibration"]["seq_len"] == 256
