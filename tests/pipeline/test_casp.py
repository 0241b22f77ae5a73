"""CASP runs: factors for queries and keys, the planned width for everything else, never more bytes than asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import Events, Interrupted, StopAfter, dense_model, sha256_of, small_run
from tiny_models import FAMILIES, tiny_model
from tiny_vision import VISION_FAMILIES, WITH_PROCESSORS, picture_folder, picture_run, tiny_vision_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import quantkit
from quantkit.errors import RequestError
from quantkit.formats.checkpoint import find_tensors, open_folder
from quantkit.formats.files import read_json
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.low_rank import LowRankSpec
from quantkit.formats.storage import unpack
from quantkit.pipeline import QuantizeResult
from quantkit.pipeline.sparsity import Condition
from quantkit.recipe import resolve

HALF = ["keep_ratio=0.5"]  # a quarter of the tiny model's keys leaves no rank
EVERY = [*HALF, "factor_all=true"]


@pytest.fixture(scope="module")
def pictures(models: Path) -> Path:
    return picture_folder(models)


def assert_computes_with_its_weights(source: Path, output: Path, kind: Any) -> None:
    checkpoint = open_folder(output)
    weights = {
        name: unpack(module.spec, checkpoint.read_module(name)).dequantize()
        for name, module in checkpoint.modules.items()
    }
    packed, dense = quantkit.load(output, dtype="float32"), dense_model(source, weights, kind)
    ids = torch.randint(4, 260, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "settings",
    [
        EVERY,
        [*EVERY, "qk_bits=8", "lo=1", "hi=5"],
        [*EVERY, "base=slim", "criterion=kl"],
        [*EVERY, "base=refined", "image_weight=0.1"],
        [*HALF, "allocator=lim"],
    ],
    ids=str,
)
def test_casp(settings: list[str], models: Path, pictures: Path, tmp_path: Path) -> None:
    source = tiny_vision_model("llava", models)
    result = picture_run(source, tmp_path / "out", pictures, "casp", bits=2.5, settings=settings)
    assert_computes_with_its_weights(source, result.output, AutoModelForImageTextToText)
    report = read_json(result.output / "report.json")
    allocation = report["allocation"]
    widths = {unit["name"]: unit["bits"] for unit in allocation["units"]}
    for name, module in open_folder(result.output).modules.items():
        if name.endswith(("q_proj", "k_proj")):
            assert isinstance(module.spec, LowRankSpec)
            bits = {width for part in (module.spec.up, module.spec.down) for width, _ in part.segments}
            assert bits == {8 if "qk_bits=8" in settings else 3}
        else:
            assert isinstance(module.spec, GroupedIntSpec)
            planned = widths[name.rpartition(".")[0].rpartition(".")[0]]
            mean = sum(width * count for width, count in module.spec.segments) / sum(
                count for _, count in module.spec.segments
            )
            assert mean == planned  # slim's groups average to it
    # no more bytes than 2.5 bits everywhere take, and what is reported is what the file holds
    assert result.bpw <= allocation["budget_bpw"]
    packed = {module.prefix for module in open_folder(result.output).modules.values()}
    stored = sum(ref.n_bytes for name, ref in find_tensors(result.output).items() if name.rpartition(".")[0] in packed)
    n_weights = sum(module.spec.n_weights for module in open_folder(result.output).modules.values())
    assert result.bpw == pytest.approx(8 * stored / n_weights)
    assert allocation["condition"].keys() == {"attention_density", "image_redundancy", "image_share", "holds"}


def test_factors_where_they_pay(models: Path, pictures: Path, tmp_path: Path) -> None:
    """Where queries and keys have a low rank, factors lose next to nothing; where all directions matter, too much."""
    source = tiny_vision_model("llava", models)
    chosen = {}
    for rank in (2, None):
        model = AutoModelForImageTextToText.from_pretrained(source)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "language_model" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
                rows, columns = parameter.shape
                left = torch.randn(rows, rank or rows, generator=generator)
                parameter.data = left @ torch.randn(rank or rows, columns, generator=generator) / (rank or rows) ** 0.5
        folder = tmp_path / f"rank-{rank}"
        model.save_pretrained(folder)
        for file in source.iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).write_bytes(file.read_bytes())
        options: dict[str, Any] = {"bits": 2.5, "settings": [*HALF, "qk_bits=4", "base=gptq"]}
        result = picture_run(folder, tmp_path / f"out-{rank}", pictures, "casp", **options)
        allocation = read_json(result.output / "report.json")["allocation"]
        chosen[rank] = [unit["keep_ratio"] for unit in allocation["units"]]
        modules = open_folder(result.output).modules
        for unit, ratio in zip(allocation["units"], chosen[rank], strict=True):
            spec = modules[f"{unit['name']}.self_attn.q_proj"].spec
            assert isinstance(spec, LowRankSpec if ratio < 1 else GroupedIntSpec)
        assert 8 * sum(m.spec.n_bytes for m in modules.values()) <= allocation["budget_bpw"] * sum(
            m.spec.n_weights for m in modules.values()
        )
    assert max(chosen[2]) < 1
    assert set(chosen[None]) == {1}


def test_queries_and_keys_keep_their_biases(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen2", models)
    result = small_run(source, tmp_path / "out", text, "casp", bits=2.5, settings=EVERY)
    assert_computes_with_its_weights(source, result.output, AutoModelForCausalLM)
    assert "model.layers.0.self_attn.q_proj.bias" in find_tensors(result.output)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_vision_families(family: str, models: Path, pictures: Path, text: Path, tmp_path: Path) -> None:
    """Each is interrupted, resumed, and has the bytes of an undisturbed run, within the budget."""
    source = tiny_vision_model(family, models)
    with_pictures = family in WITH_PROCESSORS
    options: dict[str, Any] = {"method": "casp", "bits": 2.5, "settings": EVERY, "n_samples": 2}

    def run(output: Path, **more: Any) -> QuantizeResult:
        if with_pictures:
            return picture_run(source, output, pictures, **options, **more)
        return small_run(source, output, text, **options, **more)

    with pytest.raises(Interrupted):
        run(tmp_path / "out", listener=StopAfter(1))
    result = run(tmp_path / "out")
    assert result.resumed_blocks == 1
    assert sha256_of(result.output) == sha256_of(run(tmp_path / "whole").output)
    report = read_json(result.output / "report.json")
    assert result.bpw == report["bpw"] <= report["allocation"]["budget_bpw"]
    assert all(loss > 0 for unit in report["allocation"]["units"] for loss in unit["score"])
    assert_computes_with_its_weights(source, result.output, AutoModelForImageTextToText)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_families_have_losses_too(family: str, models: Path, text: Path, tmp_path: Path) -> None:
    """What follows the blocks is the model's own, whatever it is."""
    options: dict[str, Any] = {"bits": 2.5, "settings": ["keep_ratio=1", "solver=rtn", "grid=minmax"], "n_samples": 2}
    result = small_run(tiny_model(family, models), tmp_path / "out", text, "casp", **options)
    units = read_json(result.output / "report.json")["allocation"]["units"]
    assert all(loss > 0 for unit in units for loss in unit["score"])


def test_one_width_with_factors(models: Path, text: Path, tmp_path: Path) -> None:
    """Without an allocator the bytes that factors save are saved."""
    source = tiny_model("llama", models)
    plain = small_run(source, tmp_path / "plain", text)
    factors = small_run(source, tmp_path / "factors", text, settings=["keep_ratio=0.25", "keep_ratio=0.5"])
    assert factors.bpw < plain.bpw
    assert factors.size_bytes < plain.size_bytes
    assert_computes_with_its_weights(source, factors.output, AutoModelForCausalLM)


def test_resumed_bytes_are_those_of_an_undisturbed_run(models: Path, pictures: Path, tmp_path: Path) -> None:
    source = tiny_vision_model("llava", models)
    options: dict[str, Any] = {"method": "casp", "bits": 2.5, "settings": [*HALF, "qk_bits=2"]}
    whole = picture_run(source, tmp_path / "whole", pictures, **options)
    with pytest.raises(Interrupted):
        picture_run(source, tmp_path / "again", pictures, listener=StopAfter(1), **options)
    again = picture_run(source, tmp_path / "again", pictures, **options)
    assert again.resumed_blocks == 1
    assert sha256_of(again.output) == sha256_of(whole.output)


def test_it_says_where_the_condition_does_not_hold(models: Path, text: Path, tmp_path: Path) -> None:
    events = Events()
    small_run(tiny_model("llama", models), tmp_path / "out", text, "casp", bits=2.5, settings=HALF, listener=events)
    said = [note for note in events.notes if note.startswith("casp:")]
    assert len(said) == 1
    assert "does not hold: image tokens are 0% of all, the paper's figures begin at 54%" in said[0]
    assert said[0].endswith("compare with keep_ratio=1")


def test_the_verdict() -> None:
    holds = Condition(image_share=0.9, densities=[0.3, 0.5], redundancies=[0.4])
    assert holds.describe() == (
        "casp: image tokens 90%, attention density 40%, image tokens' mean cosine 0.40; "
        "the condition for low-rank queries and keys holds"
    )
    assert holds.to_json()["holds"] is True
    dense = Condition(image_share=0.9, densities=[0.8], redundancies=[0.1])
    assert dense.problems() == [
        "attention is not sparse (80% of it is not negligible)",
        "image tokens are not redundant (mean cosine 0.10)",
    ]
    unknown = Condition(image_share=0.9)
    assert unknown.problems() == ["the attention of its blocks could not be recomputed, so its sparsity is unknown"]


def test_fused_projections_are_refused(models: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="keep_ratio factorizes query and key projections, and this model has none"):
        small_run(tiny_model("phi3", models), tmp_path / "out", text, "casp", bits=2.5, settings=HALF)


def test_a_rank_of_nothing_is_refused(models: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"k_proj: keep_ratio=0\.25 leaves a rank of 5 of a 32 x 64 weight"):
        small_run(tiny_model("llama", models), tmp_path / "out", text, "casp", bits=2.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["keep_ratio=0"], "keep_ratio is a share of the weights, above 0 and at most 1, not 0"),
        (["keep_ratio=2"], "above 0 and at most 1, not 2"),
        (["qk_bits=9"], "qk_bits must be 1 to 8, not 9"),
        (["solver=boa"], "solver=boa rounds queries and keys head by head"),
        (["allocator=error"], "keep_ratio fixes what queries and keys store; use an allocator over blocks"),
        (["factor_all=true", "keep_ratio=1"], "factor_all leaves allocator=casp no choice"),
        (["factor_all=true", "allocator=lim"], "factor_all leaves allocator=casp no choice"),
        (["base=boa"], "base=boa cannot be combined"),
        (["reverse=true"], "allocator=casp weighs losses against bytes instead"),
        (["base=slim", "symmetric=true"], "allocator=sba with symmetric grids is not supported"),
        (["vision_bits=3"], "vision_bits must be 8 or 4, or none for 16 bits, not 3"),
        (["image_weight=0"], "image_weight must be above 0 and at most 1000, not 0"),
        (["image_weight=2", "tokens=text"], "tokens=text keeps one"),
        (["tokens=words"], "unknown tokens 'words'"),
    ],
    ids=str,
)
def test_senseless_settings(settings: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve("casp", settings=settings)


def test_base_is_a_part_of_allocating_methods() -> None:
    with pytest.raises(RequestError, match="base is the method below an allocator over blocks; use --method slim"):
        resolve("gptq", settings=["base=slim"])
    with pytest.raises(RequestError, match="this recipe gathers none"):
        resolve("rtn", settings=["tokens=text"])
    refined = resolve("casp", settings=["base=refined"])
    assert (refined.correction, refined.refine, refined.allocator, refined.keep_ratio) == (0.5, 2, "casp", 0.25)
    assert resolve("layerwise", settings=["base=slim"]).at(2).allocator == "sba"
    assert resolve("casp", settings=["base=slim"]).at(2).grid == "sqc"
