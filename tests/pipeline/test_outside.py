"""embedding_bits and head_bits: one packed table or two, exact bytes apart by kind, and every way of loading them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import quantkit as command
from packed_models import edit_config
from packed_weights import random_weight
from quantized_models import (
    Interrupted,
    StopAfter,
    logits,
    quantized_weights,
    sha256_of,
    small_request,
    small_run,
    token_ids,
)
from tiny_models import HIDDEN, VOCAB, build_llava, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantkit
from quantkit.errors import FileError, NumericalError, RequestError
from quantkit.formats.checkpoint import find_tensors, open_folder, read_tensor, write_tensors
from quantkit.formats.files import read_json, write_json
from quantkit.formats.grouped_int import pack
from quantkit.pipeline import dry_run, run
from quantkit.runtime.packed_embedding import PackedEmbedding, TiedHead
from quantkit.runtime.packed_linear import PackedLinear

BOTH = ["embedding_bits=8", "head_bits=8"]
TABLE = {bits: VOCAB * HIDDEN * bits // 8 + VOCAB * (2 + bits / 8) for bits in (4, 8)}  # one group of 64 columns


@pytest.fixture(scope="module")
def tied(models: Path) -> Path:
    return tiny_model("llama", models, seed=1, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(models: Path) -> Path:
    return tiny_model("llama", models, seed=2)


@pytest.fixture(scope="module")
def packed(tied: Path, text: Path, models: Path) -> Path:
    return small_run(tied, models / "packed", text, settings=BOTH).output


def dense_equal(source: Path, folder: Path) -> PreTrainedModel:
    """The original model with every stored weight, embedding and head too, dequantized."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, weight in quantized_weights(folder).items():
        model.get_submodule(name).weight.data.copy_(weight.dequantize())
    return model


FAMILIES = ["llama", "gemma", "gemma3", "opt", "gpt_neox", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_with_the_stored_tables_and_save_them_again(
    family: str, models: Path, text: Path, tmp_path: Path
) -> None:
    source = tiny_model(family, models)
    output = small_run(source, tmp_path / "out", text, "rtn", settings=BOTH).output
    model = quantkit.load(output)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead | PackedLinear)
    # float32 sums in another order: 2**-24 per operation, grown by two blocks; observed 2e-5 on logits of size 5
    torch.testing.assert_close(logits(model), logits(dense_equal(source, output)), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert torch.equal(logits(quantkit.load(tmp_path / "again")), logits(model))


def test_a_tied_table_is_stored_once_and_used_by_both(packed: Path) -> None:
    modules = open_folder(packed).modules
    assert "model.embed_tokens" in modules
    assert not [name for name in find_tensors(packed) if "lm_head" in name]
    model = quantkit.load(packed)
    head = model.get_output_embeddings()
    assert isinstance(head, TiedHead)
    assert not dict(head.named_parameters())
    assert "tied to the packed embedding" in repr(head)
    model.tie_weights()
    assert model.get_output_embeddings() is head
    table = quantized_weights(packed)["model.embed_tokens"].dequantize()
    rows = model.get_input_embeddings()(token_ids())
    assert torch.equal(rows, table[token_ids()])
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(x), x @ table.t(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("embedding_bits", "head_bits"), [(8, 4), (0, 8), (4, 0)])
def test_untied_ones_are_set_apart(
    embedding_bits: int, head_bits: int, untied: Path, text: Path, tmp_path: Path
) -> None:
    settings = [f"embedding_bits={embedding_bits}", f"head_bits={head_bits}"]
    result = small_run(untied, tmp_path / "out", text, "rtn", settings=settings)
    sixteen = 4 * VOCAB * HIDDEN  # float32 in these models
    assert result.bytes["embeddings"] == (TABLE[embedding_bits] if embedding_bits else sixteen)
    assert result.bytes["head"] == (TABLE[head_bits] if head_bits else sixteen)
    assert result.bpw == pytest.approx(3 + 19 / 32)  # of the blocks' linears, whatever is around them
    model = quantkit.load(result.output)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding) is bool(embedding_bits)
    assert isinstance(model.get_output_embeddings(), PackedLinear) is bool(head_bits)
    torch.testing.assert_close(logits(model), logits(dense_equal(untied, result.output)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_every_byte_has_a_place(which: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Plan, result, report and inspect say the same, and it is the file."""
    source = request.getfixturevalue(which)
    asked = small_request(source, tmp_path / "out", text, "rtn", settings=BOTH)
    plan, result = dry_run(asked), run(asked)
    tensors = find_tensors(result.output)
    assert sum(result.bytes.values()) == result.size_bytes == sum(ref.n_bytes for ref in tensors.values())
    report = read_json(result.output / "report.json")
    inspected = command("inspect", result.output, "--json").json
    planned = plan.to_json()
    for said in (planned, report, inspected, result.to_json()):
        assert said["bytes"] == result.bytes
        assert said["bpw"] == result.bpw == 3 + 19 / 32
        assert said["bits_per_parameter"] == 8 * result.size_bytes / n_parameters(source)
    assert planned["size_bytes"] == inspected["size_bytes"] == result.size_bytes
    assert result.bytes["embeddings"] == TABLE[8]
    assert result.bytes["head"] == (0 if which == "tied" else TABLE[8])
    assert result.bytes["norms"] == 4 * 5 * HIDDEN
    rows = {row["name"]: row["relative_error"] for row in report["modules"]}
    assert 0 < rows["model.embed_tokens"] < 0.01
    card = (result.output / "README.md").read_text()
    assert f"{result.bits_per_parameter:.3f} bits per parameter" in card
    assert dict(plan.skipped) == {}
    shown = command("inspect", result.output).stdout
    assert f"{result.bits_per_parameter:.3f} bits per parameter" in shown


def n_parameters(source: Path) -> int:
    return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(source).parameters())


def test_blocks_are_calibrated_on_the_stored_embedding(
    tied: Path, packed: Path, text: Path, models: Path, tmp_path: Path
) -> None:
    """The blocks' codes are those of a run on a model whose table was replaced by the stored one beforehand."""
    table = quantized_weights(packed)["model.embed_tokens"].dequantize()
    source = copy_of(tied, tmp_path / "replaced")
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    write_tensors(source / "model.safetensors", tensors | {"model.embed_tokens.weight": table})
    other = quantized_weights(small_run(source, tmp_path / "other", text).output)
    plain = quantized_weights(small_run(tied, tmp_path / "plain", text).output)
    ours = quantized_weights(packed)
    assert all(torch.equal(ours[name].codes, weight.codes) for name, weight in other.items())
    assert not all(torch.equal(ours[name].codes, weight.codes) for name, weight in plain.items())


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_correction_aims_at_the_model_with_its_own_embedding(tied: Path, text: Path, tmp_path: Path) -> None:
    """Both streams start from one table unless it is quantized; a coarse table makes the targets differ."""
    settings = ["embedding_bits=4", "head_bits=4"]
    plain = quantized_weights(small_run(tied, tmp_path / "a", text, settings=settings).output)
    aimed = quantized_weights(small_run(tied, tmp_path / "b", text, settings=[*settings, "correction=1"]).output)
    first = "model.layers.0.self_attn.q_proj"  # with equal streams a correction changes nothing in the first linears
    assert not torch.equal(plain[first].codes, aimed[first].codes)
    same = quantized_weights(small_run(tied, tmp_path / "c", text).output)
    also = quantized_weights(small_run(tied, tmp_path / "d", text, settings=["correction=1"]).output)
    assert torch.equal(same[first].codes, also[first].codes)


def test_resumed_run_gives_the_same_bytes(tied: Path, packed: Path, text: Path, tmp_path: Path) -> None:
    asked = small_request(tied, tmp_path / "packed", text, settings=BOTH)
    with pytest.raises(Interrupted):
        run(asked, StopAfter(1))
    assert run(asked).resumed_blocks == 1
    assert sha256_of(tmp_path / "packed") == sha256_of(packed)


def test_other_dtypes_and_generation(packed: Path) -> None:
    model = quantkit.load(packed, dtype="bfloat16")
    assert model.get_input_embeddings()(token_ids()).dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    model.to(torch.float32)
    assert model.get_input_embeddings()(token_ids()).dtype == torch.float32
    made = model.generate(token_ids(), max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 28)


def test_offloaded_table(packed: Path, tmp_path: Path) -> None:
    """The head calls the embedding, so the hooks that bring its tensors from disk serve both."""
    places = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        packed, device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / "offload", offload_buffers=True
    )
    assert model.model.embed_tokens.codes_8b.is_meta
    assert torch.equal(logits(model), logits(quantkit.load(packed)))


def test_table_that_the_files_hold_under_the_name_of_the_head(tied: Path, text: Path, tmp_path: Path) -> None:
    source = copy_of(tied, tmp_path / "source")
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write_tensors(source / "model.safetensors", tensors)
    output = small_run(source, tmp_path / "out", text, "rtn", settings=BOTH).output
    assert not [name for name in find_tensors(output) if "lm_head" in name]
    torch.testing.assert_close(logits(quantkit.load(output)), logits(dense_equal(source, output)), rtol=0, atol=1e-4)


def test_vision_language_model(text: Path, tmp_path: Path) -> None:
    """Names in the files differ from those of the modules."""
    build_llava().save_pretrained(tmp_path / "llava")
    tiny = tiny_model("llama", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "llava" / name).write_bytes((tiny / name).read_bytes())
    output = small_run(tmp_path / "llava", tmp_path / "out", text, "rtn", settings=BOTH).output
    model = quantkit.load(output)
    assert isinstance(model.get_input_embeddings(), PackedEmbedding)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def unpacked(folder: Path, target: Path) -> Path:
    """The same model as an ordinary folder of float32 tensors."""
    target.mkdir()
    checkpoint = open_folder(folder)
    prefixes = tuple(f"{module.prefix}." for module in checkpoint.modules.values())
    tensors = {name: read_tensor(ref) for name, ref in checkpoint.tensors.items() if not name.startswith(prefixes)}
    for name, weight in quantized_weights(folder).items():
        tensors[f"{checkpoint.modules[name].prefix}.weight"] = weight.dequantize()
    write_tensors(target / "model.safetensors", tensors)
    write_json(target / "config.json", {k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
    return target


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize(("embedding_bits", "head_bits"), [(8, 8), (8, 4), (0, 8), (4, 0)])
def test_rotated_stream(
    embedding_bits: int,
    head_bits: int,
    which: str,
    text: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """A rotation changes both in different ways: they are two matrices then, each rounded or written as it is."""
    source = request.getfixturevalue(which)
    settings = ["transform=hadamard", f"embedding_bits={embedding_bits}", f"head_bits={head_bits}"]
    asked = small_request(source, tmp_path / "out", text, "rtn", bits=8, settings=settings)
    plan, result = dry_run(asked), run(asked)
    assert plan.output_bytes == result.size_bytes
    assert plan.account.bytes == result.bytes
    assert plan.account.bits_per_parameter == result.bits_per_parameter
    sixteen = 4 * VOCAB * HIDDEN  # float32 in these models
    assert result.bytes["embeddings"] == (TABLE[embedding_bits] if embedding_bits else sixteen)
    assert result.bytes["head"] == (TABLE[head_bits] if head_bits else sixteen)
    plain = find_tensors(small_run(source, tmp_path / "plain", text, "rtn", settings=["transform=hadamard"]).output)
    tables = {name: table for name, table in quantized_weights(result.output).items() if "layers" not in name}
    assert len(tables) == bool(embedding_bits) + bool(head_bits)
    for name, table in tables.items():
        rotated = read_tensor(plain[f"{name}.weight"])
        # Half a scale by rounding; as much where a rounded zero moves an end of the range; float16 scales: 255 / 2048
        bound = (0.5 + 0.5 + 0.125) * table.scales.repeat_interleave(table.group_size, 1)
        assert bool(((table.dequantize() - rotated).abs() <= bound).all())
    model = quantkit.load(result.output)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(quantkit.load(tmp_path / "again")), logits(model))
    dense = AutoModelForCausalLM.from_pretrained(unpacked(result.output, tmp_path / "dense"))
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)


# What must fail


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["embedding_bits=2"], r"embedding_bits is 0 \(16 bits, as it is\), 4 or 8, not 2"),
        (["head_bits=16"], r"head_bits is 0 \(16 bits, as it is\), 4 or 8, not 16"),
        (["embedding_bits=8"], "LlamaForCausalLM: embedding and head are one tensor here; .*, not 8 and 0"),
        (["embedding_bits=8", "head_bits=4"], "set embedding_bits and head_bits to the same, not 8 and 4"),
    ],
)
def test_senseless_settings(settings: list[str], message: str, tied: Path, text: Path, tmp_path: Path) -> None:
    for action in (dry_run, run):
        with pytest.raises(RequestError, match=message):
            action(small_request(tied, tmp_path / "out", text, "rtn", settings=settings))
    assert not list(tmp_path.iterdir())


def test_damaged_table_is_named(tied: Path, text: Path, tmp_path: Path) -> None:
    source = copy_of(tied, tmp_path / "source")
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["model.embed_tokens.weight"][3, 3] = float("nan")
    write_tensors(source / "model.safetensors", tensors)
    with pytest.raises(NumericalError, match=r"model\.embed_tokens: the weight holds NaN or Inf"):
        small_run(source, tmp_path / "out", text, "rtn", settings=BOTH)


def test_tables_that_the_config_ties_and_the_files_do_not(tied: Path, text: Path, tmp_path: Path) -> None:
    source = copy_of(tied, tmp_path / "source")
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_tensors(source / "model.safetensors", tensors)
    with pytest.raises(RequestError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight, which the"):
        small_run(source, tmp_path / "out", text, "rtn", settings=BOTH)


def test_embedding_of_several_widths_is_refused(packed: Path, tmp_path: Path) -> None:
    folder = copy_of(packed, tmp_path / "folder")
    weight = random_weight(0, VOCAB, 32, (8, 4))
    name = "model.embed_tokens"
    tensors = {key: read_tensor(ref) for key, ref in find_tensors(folder).items()}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    tensors |= {f"{name}.{key}": tensor for key, tensor in pack(weight).items()}
    write_tensors(folder / "model.safetensors", tensors | {f"{name}.weight": torch.empty(0, dtype=torch.float16)})
    modules = read_json(folder / "config.json")["quantization_config"]["modules"]
    edit_config(folder, modules=modules | {name: {"prefix": name, "spec": weight.spec().to_json()}})
    with pytest.raises(
        FileError, match=r"module model\.embed_tokens is an embedding, which is stored in one width only"
    ):
        quantkit.load(folder)
