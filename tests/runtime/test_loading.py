"""`quantkit.load`: packed, ordinary and vision-language folders, and one clear line for everything else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_models import PackedFolders, edit_config, pack_folder
from tiny_models import build_llava, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import quantkit
from quantkit.errors import FileError, QuantkitError, RequestError
from quantkit.formats.checkpoint import find_tensors, open_folder, read_tensor, write_tensors
from quantkit.formats.files import read_json, write_json
from quantkit.runtime.loading import load, load_tokenizer, resolve
from quantkit.runtime.packed_linear import PackedLinear


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("models"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folders(source: Path) -> PackedFolders:
    return pack_folder(source, source.parent, bits=(4, 3))


@pytest.fixture
def packed(folders: PackedFolders, tmp_path: Path) -> Path:
    """A packed folder to damage."""
    return Path(shutil.copytree(folders.packed, tmp_path / "packed"))


def test_packed_folder(folders: PackedFolders) -> None:
    model = quantkit.load(folders.packed, verify=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert model.dtype == torch.bfloat16
    assert isinstance(load(str(folders.packed)), LlamaForCausalLM)


def test_ordinary_folder(source: Path) -> None:
    model = load(source, dtype="float32", device="cpu")
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, "float32", "bfloat16", torch.float16, "auto"])
def test_dtype_of_what_is_not_packed(folders: PackedFolders, dtype: str | torch.dtype) -> None:
    model = load(folders.packed, dtype=dtype)
    expected = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.bfloat16}.get(str(dtype), dtype)
    assert model.lm_head.weight.dtype == expected
    assert model.model.layers[0].mlp.up_proj.get_buffer("scales").dtype == torch.float16
    assert model(torch.tensor([[5, 6]])).logits.dtype == expected


def test_options_reach_transformers(folders: PackedFolders, tmp_path: Path) -> None:
    model = load(folders.packed, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = load(folders.packed, device_map=places, offload_folder=tmp_path, attn_implementation="eager")
    assert offloaded.model.layers[1].mlp.up_proj.get_buffer("scales").is_meta
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(offloaded(ids).logits, model(ids).logits)


def test_vision_language_model_whose_files_use_other_names(tmp_path: Path) -> None:
    """Llava files say language_model.model.layers; the modules are model.language_model.layers."""
    build_llava().save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    names = ((r"^language_model\.model\.", "model.language_model."), (r"^vision_tower", "model.vision_tower"))
    folders = pack_folder(tmp_path / "source", tmp_path, bits=(4,), rename=names, only=r"^language_model")
    prefix = "language_model.model.layers.0.mlp.up_proj"
    assert open_folder(folders.packed).modules["model.language_model.layers.0.mlp.up_proj"].prefix == prefix
    packed, dense = load(folders.packed), load(folders.dense)
    assert isinstance(packed, LlavaForConditionalGeneration)
    assert isinstance(packed.model.language_model.layers[0].mlp.up_proj, PackedLinear)
    inputs = {
        "input_ids": torch.tensor([[1, 270, 270, 270, 270, 40, 50]]),
        "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        torch.testing.assert_close(packed(**inputs).logits, dense(**inputs).logits, rtol=0, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    before, after = find_tensors(folders.packed), find_tensors(tmp_path / "again")
    assert set(before) == set(after)
    assert all(torch.equal(read_tensor(before[name]), read_tensor(after[name])) for name in before)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "again")(**inputs).logits, packed(**inputs).logits)


def test_tokenizer(folders: PackedFolders, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders.packed)
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    with pytest.raises(FileError, match=r"no tokenizer \(tokenizer\.json or the like\); copy it from the original"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FileError, match="the tokenizer cannot be loaded: "):
        load_tokenizer(tmp_path)


# Where a model is looked for


def test_names_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("nothing", "./nothing", "../no/such/folder", str(tmp_path / "none"), "models/none", Path("a/b"), ""):
        with pytest.raises(FileError, match=r"^no folder "):
            resolve(path)
    with pytest.raises(FileError, match="file is a file; give the folder of the model"):
        resolve(tmp_path / "file")
    assert resolve("org/name-1.5") == "org/name-1.5"
    assert resolve("models") == Path("models")


def test_hub_id_that_cannot_be_reached(tmp_path: Path) -> None:
    """Only the cache is asked: what a machine without network does."""
    with pytest.raises(FileError, match=r"no folder org/name here, and no such model in the local hub cache .*network"):
        load("org/name", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(RequestError, match="verify needs a local folder, org/name is a hub id"):
        load("org/name", verify=True)


# Folders that cannot be loaded


def damage_shard(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_bit(folder: Path) -> None:
    shard = folder / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))


def drop_tensor(folder: Path, name: str) -> None:
    tensors = {key: read_tensor(ref) for key, ref in find_tensors(folder).items() if key != name}
    write_tensors(folder / "model.safetensors", tensors)


def set_config(folder: Path, **fields: object) -> None:
    write_json(folder / "config.json", read_json(folder / "config.json") | fields)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"packed: no config\.json; give the folder of a model"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("{}"), r"config\.json cannot be used: "),
        (lambda f: set_config(f, model_type="nonesuch"), r"config\.json cannot be used: .*nonesuch"),
        (lambda f: (f / "model.safetensors").unlink(), r"packed: no weights \(model\.safetensors or .*index\.json\)"),
        (damage_shard, r"model\.safetensors: truncated: \d+ bytes, \d+ required"),
        (flip_bit, r"model\.safetensors: SHA-256 differs from checksums\.json"),
        (lambda f: drop_tensor(f, "model.norm.weight"), r"tensor model\.norm\.weight is missing; the folder is not"),
        (
            lambda f: drop_tensor(f, "model.layers.1.mlp.up_proj.scales"),
            r"tensor model\.layers\.1\.mlp\.up_proj\.scales is missing; the folder is not",
        ),
        (lambda f: edit_config(f, format_version=2), "format_version 2 is newer than this quantkit reads"),
        (
            lambda f: set_config(f, vocab_size=300),
            r"tensor lm_head\.weight is \[288, 64\] in the files, \[300, 64\] in the model of config\.json",
        ),
    ],
)
def test_damaged_folder_is_named(
    packed: Path, damage: Callable[[Path], object], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(packed)
    with pytest.raises(QuantkitError, match=message) as caught:
        load(packed, verify=damage is flip_bit)  # everything else is noticed without reading every byte
    assert "\n" not in str(caught.value)
    assert "LOAD REPORT" not in caplog.text


def test_ordinary_folder_with_a_missing_tensor(source: Path, tmp_path: Path) -> None:
    """transformers would initialize it at random and warn; a model must not be evaluated like that."""
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    drop_tensor(copy, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(FileError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load(copy)


def test_pickled_weights_are_never_read(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FileError, match=r"no weights .*only safetensors are read"):
        load(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float33"}, "unknown dtype 'float33'; use float32, bfloat16 or float16"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"dtype": "nn"}, "unknown dtype 'nn'"),
        ({"device": "gpu"}, "unknown device 'gpu'; use cpu, cuda, cuda:1 or auto"),
        ({"device": "cpu", "device_map": "auto"}, "give either device or device_map, not both"),
    ],
)
def test_options_that_cannot_be_right(folders: PackedFolders, options: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(folders.packed, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(folders: PackedFolders) -> None:
    with pytest.raises(RequestError, match="device 'cuda': no CUDA device is available here; use cpu"):
        load(folders.packed, device="cuda")
    assert load(folders.packed, device="auto").device.type == "cpu"


def test_demo_is_the_embedded_model() -> None:
    model, tokenizer = load("demo"), load_tokenizer("demo")
    ids = tokenizer("def main():\n    return", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, ids.shape[1] + 3)
