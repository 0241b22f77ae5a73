"""Packed folders through transformers: the same numbers, the same bytes again, and no silent failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_models import PackedFolders, edit_config, pack_folder
from tiny_models import FAMILIES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import quantkit.runtime.hf
from quantkit.errors import FileError
from quantkit.formats.checkpoint import find_tensors, open_folder, read_tensor, write_tensors
from quantkit.formats.files import read_json, write_json
from quantkit.formats.grouped_int import unpack
from quantkit.models.experts import UnfusedExperts
from quantkit.runtime.packed_linear import PackedLinear

MIXED = (2, 4, 3, 1)


def token_ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(folder: Path) -> PackedFolders:
    return pack_folder(tiny_model("llama", folder), folder / "llama", bits=MIXED)


@pytest.fixture(scope="module")
def moe(folder: Path) -> PackedFolders:
    return pack_folder(tiny_model("qwen3_moe", folder), folder / "moe", bits=(3,))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_with_the_packed_weights_and_saves_them_again(family: str, tmp_path: Path) -> None:
    folders = pack_folder(tiny_model(family, tmp_path), tmp_path, bits=MIXED)
    model, info = AutoModelForCausalLM.from_pretrained(folders.packed, output_loading_info=True)
    assert not any(info.values())
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert set(packed) == set(open_folder(folders.packed).modules)
    dense = AutoModelForCausalLM.from_pretrained(folders.dense)
    # float32 sums in another order: 2**-24 per operation, grown by two blocks; observed 2e-5 on logits of size 5
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "model.safetensors"
    assert again.read_bytes() == (folders.packed / "model.safetensors").read_bytes()
    first, second = (read_json(path / "config.json") for path in (folders.packed, tmp_path / "again"))
    assert second["quantization_config"] == first["quantization_config"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(reloaded), logits(model))


class DenseLinear(nn.Module):
    """The same product from a float32 weight: what `PackedLinear` must equal up to the order of summation."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.register_buffer("dense", unpack(packed.spec, packed.stored_tensors()).dequantize())
        self.bias = packed.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.dense, bias).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_no_error_of_its_own(llama: PackedFolders, dtype: torch.dtype) -> None:
    """The packed model is closer to its dense equal in this dtype than the dtype is to float32."""
    model = AutoModelForCausalLM.from_pretrained(llama.packed, dtype=dtype)
    got = logits(model)
    assert got.dtype == dtype
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    for name, module in linears:
        assert module.scales.dtype == torch.float16
        assert module.weight.dtype == dtype
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, DenseLinear(module))
    same_dtype = logits(model).float()
    exact = logits(AutoModelForCausalLM.from_pretrained(llama.packed, dtype=torch.float32))
    assert (got.float() - same_dtype).abs().max() < (same_dtype - exact).abs().max()
    assert (got.float() - same_dtype).abs().mean() < 0.5 * (same_dtype - exact).abs().mean()


def test_stored_tensors_keep_their_bits_in_every_model_dtype(llama: PackedFolders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.packed, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    before, after = find_tensors(llama.packed), find_tensors(tmp_path)
    for module in open_folder(llama.packed).modules.values():
        for key in (*module.spec.tensor_layout(), "weight"):
            name = f"{module.prefix}.{key}"
            assert torch.equal(read_tensor(before[name]), read_tensor(after[name]))
            assert before[name].dtype == after[name].dtype


def test_sharded_save_and_load(llama: PackedFolders, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.packed)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    open_folder(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_device_map_auto(llama: PackedFolders) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.packed, device_map="auto")
    plain = AutoModelForCausalLM.from_pretrained(llama.packed)
    expected = logits(plain)
    with torch.no_grad():
        got = model(token_ids().to(model.device)).logits.cpu()
    torch.testing.assert_close(got, expected, rtol=0, atol=0 if model.device.type == "cpu" else 1e-3)


def test_offload_to_disk(llama: PackedFolders, tmp_path: Path) -> None:
    """Half of the blocks' bytes live in a folder and are read when their block runs."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        llama.packed,
        device_map=places | {"model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
        offload_buffers=True,
    )
    assert model.model.layers[1].mlp.up_proj.codes_2b.is_meta
    plain = AutoModelForCausalLM.from_pretrained(llama.packed)
    assert torch.equal(logits(model), logits(plain))
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        model.save_pretrained(tmp_path / "again")
    before, after = find_tensors(llama.packed), find_tensors(tmp_path / "again")
    assert set(before) == set(after)
    assert all(torch.equal(read_tensor(before[name]), read_tensor(after[name])) for name in before)


@pytest.mark.parametrize("family", ["gemma", "opt"])
def test_tied_embeddings_stay_tied(family: str, tmp_path: Path) -> None:
    folders = pack_folder(tiny_model(family, tmp_path), tmp_path, bits=(4,))
    model = AutoModelForCausalLM.from_pretrained(folders.packed)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_packed_head_unties_the_embedding(tmp_path: Path) -> None:
    """The source ties; the packed folder has the embedding and, of its own, a packed head."""
    source = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    assert "lm_head.weight" not in tensors
    write_tensors(source / "model.safetensors", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})
    folders = pack_folder(source, tmp_path, bits=(4,), head=True)
    model, info = AutoModelForCausalLM.from_pretrained(folders.packed, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(model.lm_head, PackedLinear)
    assert isinstance(model.model.embed_tokens.weight, nn.Parameter)
    config = read_json(folders.dense / "config.json")
    write_json(folders.dense / "config.json", config | {"tie_word_embeddings": False})
    dense = AutoModelForCausalLM.from_pretrained(folders.dense)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_generate_with_padding_and_beams(llama: PackedFolders) -> None:
    """Greedy and beam search choose the tokens that the dense model chooses."""
    packed, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (llama.packed, llama.dense))
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        outputs = [
            model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
            for model in (packed, dense)
        ]
        assert outputs[0].shape[1] > ids.shape[1]
        assert torch.equal(*outputs)


# Mixture of experts


def test_experts_are_packed_one_by_one(moe: PackedFolders) -> None:
    model = AutoModelForCausalLM.from_pretrained(moe.packed)
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts, UnfusedExperts)
    assert isinstance(experts.get_submodule("3.up_proj"), PackedLinear)
    stored = find_tensors(moe.packed)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" not in stored
    assert "model.layers.1.mlp.experts.3.up_proj.scales" in stored


def test_experts_that_were_not_packed_load_beside_packed_ones(folder: Path, tmp_path: Path) -> None:
    """Block 0 keeps 16-bit experts: the family's rule that would stack them must not apply any more."""
    source = tiny_model("qwen3_moe", tmp_path, seed=3)
    folders = pack_folder(source, tmp_path, bits=(4,))
    modules = read_json(folders.packed / "config.json")["quantization_config"]["modules"]
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(folders.packed).items()}
    dense = {name: read_tensor(ref) for name, ref in find_tensors(folders.dense).items()}
    for name in [name for name in modules if name.startswith("model.layers.0.mlp.experts.")]:
        del modules[name]
        tensors = {key: value for key, value in tensors.items() if not key.startswith(name + ".")}
        tensors[name + ".weight"] = dense[name + ".weight"]
    write_tensors(folders.packed / "model.safetensors", tensors)
    edit_config(folders.packed, modules=modules)
    model, info = AutoModelForCausalLM.from_pretrained(folders.packed, output_loading_info=True)
    assert not any(info.values())
    reference = AutoModelForCausalLM.from_pretrained(folders.dense)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert set(find_tensors(tmp_path / "again")) == set(tensors)


def test_experts_with_other_names_in_the_files(tmp_path: Path) -> None:
    """Mixtral files say block_sparse_moe.experts.0.w1; the modules are mlp.experts.0.gate_proj."""
    source = tiny_model("mixtral", tmp_path, num_local_experts=4, num_experts_per_tok=2)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in find_tensors(source)
    names = ((r"block_sparse_moe", "mlp"), (r"\.w1$", ".gate_proj"), (r"\.w3$", ".up_proj"), (r"\.w2$", ".down_proj"))
    folders = pack_folder(source, tmp_path, bits=(4,), rename=names)
    model, info = AutoModelForCausalLM.from_pretrained(folders.packed, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(model.model.layers[0].mlp.experts.get_submodule("0.gate_proj"), PackedLinear)
    dense = AutoModelForCausalLM.from_pretrained(folders.dense)
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    before, after = find_tensors(folders.packed), find_tensors(tmp_path / "again")
    assert set(before) == set(after)
    assert all(torch.equal(read_tensor(before[name]), read_tensor(after[name])) for name in before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


# What must fail


WITHOUT_QUANTKIT = """
import sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except RuntimeError as error:
        print("refused" if "ignore_mismatched_sizes" in str(error) else error)
print("quantkit" in sys.modules)
"""


@pytest.mark.slow
def test_without_quantkit_loading_fails_loudly(llama: PackedFolders, moe: PackedFolders) -> None:
    """A reader that does not know the format must not return a model with random weights."""
    command = [sys.executable, "-c", WITHOUT_QUANTKIT, llama.dense, llama.packed, moe.packed]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["loaded", "refused", "refused", "False"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 7}, "format_version 7 is newer"),
        ({"modules": None}, "no modules"),
    ],
)
def test_config_errors_reach_the_caller(
    llama: PackedFolders, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    copy = copy_of(llama.packed, tmp_path)
    edit_config(copy, **change)
    with pytest.raises(FileError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_module_that_the_model_does_not_have(llama: PackedFolders, tmp_path: Path) -> None:
    copy = copy_of(llama.packed, tmp_path)
    modules = read_json(copy / "config.json")["quantization_config"]["modules"]
    name = "model.layers.1.mlp.up_proj"
    edit_config(copy, modules={key.replace("layers.1", "layers.9"): value for key, value in modules.items()})
    with pytest.raises(FileError, match=r"the model has no module model\.layers\.9\."):
        AutoModelForCausalLM.from_pretrained(copy)
    modules["model.norm"] = modules.pop(name)
    edit_config(copy, modules=modules)
    with pytest.raises(FileError, match=r"module model\.norm is a LlamaRMSNorm, only linears are packed"):
        AutoModelForCausalLM.from_pretrained(copy)
    modules["model.layers.1.mlp.up_proj"] = modules.pop("model.norm")
    edit_config(copy, modules=modules)
    config = read_json(copy / "config.json")
    write_json(copy / "config.json", config | {"intermediate_size": 96})
    with pytest.raises(FileError, match=r"module model\.layers\.\d\.mlp\.\w+ is \(.*96.*\) in the model, \(.*128.*\)"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_missing_tensor_is_named_before_anything_is_loaded(llama: PackedFolders, tmp_path: Path) -> None:
    copy = copy_of(llama.packed, tmp_path)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(copy).items()}
    del tensors["model.layers.1.mlp.up_proj.codes_4b"]
    write_tensors(copy / "model.safetensors", tensors)
    with pytest.raises(FileError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.codes_4b is missing"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_damaged_values_are_named(llama: PackedFolders, tmp_path: Path) -> None:
    copy = copy_of(llama.packed, tmp_path)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(copy).items()}
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("inf")
    write_tensors(copy / "model.safetensors", tensors)
    with pytest.raises(FileError, match=r"model\.layers\.1\.mlp\.up_proj: scales holds NaN, Inf"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_registration_happens_once() -> None:
    quantkit.runtime.hf.register()
    quantkit.runtime.hf.register()


def test_loading_never_quantizes(llama: PackedFolders) -> None:
    """Asking transformers to quantize a dense model with our config is an error, not a slow no-op."""
    fields = read_json(llama.packed / "config.json")["quantization_config"]
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            llama.dense, quantization_config=quantkit.runtime.hf.QuantkitConfig(**fields)
        )
