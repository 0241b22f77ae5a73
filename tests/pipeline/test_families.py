"""Every family, quantized, packed and loaded, computes what the original computes with the dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    Interrupted,
    StopAfter,
    dense_model,
    logits,
    quantized_weights,
    sha256_of,
    small_run,
    token_ids,
)
from tiny_models import FAMILIES, build, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

import quantkit
from quantkit.formats.checkpoint import find_tensors, read_tensor, write_tensors
from quantkit.formats.files import read_json
from quantkit.runtime.packed_linear import PackedLinear

LINEARS = {"phi3": 4, "opt": 6, "gpt_neox": 4, "qwen3_moe": 16}  # of one block; 7 in the other families


def assert_computes_with_its_weights(source: Path, output: Path) -> PreTrainedModel:
    """The packed model against the dense one with the same weights; returns the packed one."""
    weights = {name: packed.dequantize() for name, packed in quantized_weights(output).items()}
    packed, dense = quantkit.load(output, dtype="float32"), dense_model(source, weights)
    # float32 sums in another order: 2**-24 per operation, grown by two blocks; observed 2e-5 on logits of size 5
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=1e-4)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(packed.generate(token_ids(1), **settings), dense.generate(token_ids(1), **settings))
    return packed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "settings"),
    [("rtn", {"bits": 8}), ("gptq", {"bits": 3}), ("slim", {"bits": 2, "group_size": 16})],
    ids=["rtn", "gptq", "slim"],
)
def test_family(family: str, method: str, settings: dict[str, Any], models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model(family, models)
    result = small_run(source, tmp_path / "out", text, method, **settings)
    assert len(result.modules) == 2 * LINEARS.get(family, 7)
    packed = assert_computes_with_its_weights(source, result.output)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == len(result.modules)
    assert all(0 < module.relative_error < 1 for module in result.modules)
    if method == "rtn":
        original = logits(dense_model(source, {}))
        errors = torch.tensor([module.relative_error for module in result.modules])
        # outlier columns of 4 standard deviations widen a group's range to about 20: 20 / 255 / sqrt(12)
        assert errors.max() < 0.023
        # independent errors add up in squares; a softmax may double them
        assert (logits(packed) - original).norm() / original.norm() < 2 * errors.norm()


def test_slim_mixes_widths_in_some_module(models: Path, text: Path, tmp_path: Path) -> None:
    """So that the runs above also stand for segments, group orders and 1-bit zeros."""
    source = tiny_model("llama", models)
    result = small_run(source, tmp_path / "out", text, "slim", bits=2, group_size=16)
    widths = [set(weight.bits) for weight in quantized_weights(result.output).values()]
    assert {1, 2, 3} in widths


@pytest.mark.parametrize(
    "settings",
    [
        ["act_order=full"],
        ["act_order=group", "symmetric=true"],
        ["sequential=true", "grid=mse"],
        ["solver=rtn", "grid=hessian"],
        ["allocator=sba", "criterion=kl", "grid=sqc"],
    ],
    ids=",".join,
)
def test_combinations(settings: list[str], models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", models)
    result = small_run(source, tmp_path / "out", text, settings=settings, group_size=16)
    assert_computes_with_its_weights(source, result.output)


def test_one_group_per_row(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", models)
    result = small_run(source, tmp_path / "out", text, group_size=0)
    assert {weight.group_size for weight in quantized_weights(result.output).values()} == {64, 128}
    assert_computes_with_its_weights(source, result.output)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_on_a_gpu(family: str, models: Path, text: Path, tmp_path: Path) -> None:
    """The stored weights compute on the CPU too, and a run that was resumed has the bytes of one that was not."""
    source = tiny_model(family, models, seed=1)
    result = small_run(source, tmp_path / "out", text, device="cuda")
    assert_computes_with_its_weights(source, result.output)
    with pytest.raises(Interrupted):
        small_run(source, tmp_path / "again", text, device="cuda", listener=StopAfter(1))
    again = small_run(source, tmp_path / "again", text, device="cuda")
    assert again.resumed_blocks == 1
    assert sha256_of(again.output) == sha256_of(result.output)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied: bool, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path, tie_word_embeddings=tied)
    assert ("lm_head.weight" in find_tensors(source)) is not tied
    result = small_run(source, tmp_path / "out", text)
    assert_computes_with_its_weights(source, result.output)


def test_tied_embeddings_stored_under_the_other_name(text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_tensors(source / "model.safetensors", tensors)
    result = small_run(source, tmp_path / "out", text)
    assert_computes_with_its_weights(source, result.output)


def test_shards_change_nothing(models: Path, text: Path, tmp_path: Path) -> None:
    """A sharded source gives the same file; a sharded output the same model."""
    whole = tiny_model("llama", models)
    model = build("llama")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 5
    first = small_run(whole, tmp_path / "first", text).output
    second = small_run(tmp_path / "sharded", tmp_path / "second", text).output
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert not (second / "model.safetensors.index.json").exists()
    third = small_run(tmp_path / "sharded", tmp_path / "third", text, max_shard_bytes=40_000)
    shards = list(third.output.glob("*.safetensors"))
    assert len(shards) > 2
    assert read_json(third.output / "model.safetensors.index.json")["metadata"]["total_size"] == third.size_bytes
    assert torch.equal(logits(quantkit.load(third.output)), logits(quantkit.load(first)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_source_dtypes(dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path, dtype=dtype)
    result = small_run(source, tmp_path / "out", text)
    kept = find_tensors(result.output)["model.norm.weight"]
    assert kept.torch_dtype == dtype
    assert_computes_with_its_weights(source, result.output)
    assert quantkit.load(result.output).dtype == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_calibration_in_half_precision(dtype: str, text: Path, tmp_path: Path) -> None:
    """The codes are solved for the stored weights all the same, up to the rounding of ``dtype``."""
    source = tiny_model("llama", tmp_path)
    result = small_run(source, tmp_path / "out", text, dtype=dtype, bits=8)
    assert_computes_with_its_weights(source, result.output)
    assert max(module.relative_error for module in result.modules) < 0.01


def test_a_checkpoint_of_the_model_without_its_head_prefix(text: Path, tmp_path: Path) -> None:
    """Saved from the base class: ``layers.0...`` for what the language model calls ``model.layers.0...``."""
    source = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): read_tensor(ref) for name, ref in find_tensors(source).items()}
    write_tensors(source / "model.safetensors", tensors)
    result = small_run(source, tmp_path / "out", text)
    assert "layers.0.self_attn.q_proj.codes_3b" in find_tensors(result.output)
    assert result.modules[0].name == "model.layers.0.self_attn.q_proj"
    assert_computes_with_its_weights(source, result.output)


def test_experts_with_other_names_in_the_files(text: Path, tmp_path: Path) -> None:
    source = tiny_model("mixtral", tmp_path)
    stored = find_tensors(source)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in stored
    result = small_run(source, tmp_path / "out", text)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.codes_3b" in find_tensors(result.output)
    assert "model.layers.0.mlp.experts.0.gate_proj" in {module.name for module in result.modules}
    assert_computes_with_its_weights(source, result.output)


def test_experts_stored_as_one_stack(models: Path, text: Path, tmp_path: Path) -> None:
    """The same codes as from a checkpoint that stores expert by expert."""
    apart = tiny_model("qwen3_moe", models)
    stacked = tiny_model("qwen3_moe", tmp_path)
    write_tensors(stacked / "model.safetensors", dict(build("qwen3_moe").state_dict()))
    assert "model.layers.0.mlp.experts.gate_up_proj" in find_tensors(stacked)
    outputs = [small_run(source, tmp_path / f"out{i}", text).output for i, source in enumerate((apart, stacked))]
    first, second = (folder / "model.safetensors" for folder in outputs)
    assert first.read_bytes() == second.read_bytes()
    assert_computes_with_its_weights(stacked, outputs[1])
