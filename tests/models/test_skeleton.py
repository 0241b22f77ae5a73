"""Models without weights: filled piece by piece they are the models that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quantized_models import token_ids
from tiny_models import FAMILIES, build, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from quantkit.errors import FileError, NumericalError, RequestError
from quantkit.formats.checkpoint import find_tensors, read_tensor, write_tensors
from quantkit.models.experts import unfuse_experts
from quantkit.models.skeleton import Skeleton

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def real_tensors(module: nn.Module) -> Iterator[str]:
    """Names of the parameters and buffers that are not on the meta device."""
    for kind in (module.named_parameters(), module.named_buffers()):
        yield from (name for name, tensor in kind if not tensor.is_meta)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_filled_whole_it_computes_what_transformers_loads(family: str, models: Path) -> None:
    """Every weight through `source_name`, every derived buffer recomputed; the head, which no block needs, by hand."""
    source = tiny_model(family, models)
    skeleton = Skeleton(source)
    assert list(real_tensors(skeleton.model)) == []
    skeleton.load_surroundings(CPU, torch.float32)
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index, CPU, torch.float32)
    head = skeleton.model.get_output_embeddings()
    assert head.weight.is_meta or head.weight is skeleton.model.get_input_embeddings().weight
    head.weight = nn.Parameter(
        read_tensor(skeleton.tensors[skeleton.source_name("lm_head.weight")]), requires_grad=False
    )
    loaded = AutoModelForCausalLM.from_pretrained(source)
    unfuse_experts(loaded)
    expected, found = dict(loaded.named_buffers()), dict(skeleton.model.named_buffers())
    assert set(found) == set(expected)
    for name, buffer in expected.items():
        assert torch.equal(found[name], buffer), name
    with torch.no_grad():
        assert torch.equal(skeleton.model(token_ids()).logits, loaded(token_ids()).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_it_holds_one_piece_at_a_time(family: str, models: Path) -> None:
    skeleton = Skeleton(tiny_model(family, models))
    skeleton.load_surroundings(CPU, torch.float32)
    held = list(real_tensors(skeleton.model))
    assert "model.embed_tokens.weight" in held
    assert not any(skeleton.in_blocks(name) for name in held)
    skeleton.release_surroundings()
    assert list(real_tensors(skeleton.model)) == []
    for index in (1, 0):
        skeleton.load_block(index, CPU, torch.float32)
        held = list(real_tensors(skeleton.model))
        assert all(name.startswith(f"model.layers.{index}.") for name in held)
        assert len(held) == len(list(skeleton.block_module(index).parameters()))
        skeleton.release_block(index)
        assert list(real_tensors(skeleton.model)) == []


def test_dtypes(models: Path) -> None:
    """What is loaded has the dtype of the computation; what transformers keeps in float32 stays so."""
    skeleton = Skeleton(tiny_model("gemma3", models))
    skeleton.load_surroundings(CPU, torch.bfloat16)
    assert skeleton.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert skeleton.model.model.rotary_emb.sliding_attention_inv_freq.dtype == torch.float32
    assert skeleton.load_block(0, CPU, torch.bfloat16).mlp.up_proj.weight.dtype == torch.bfloat16


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    tensors["model.norm.weight"][0] = torch.nan
    write_tensors(source / "model.safetensors", tensors)
    skeleton = Skeleton(source)
    skeleton.load_block(0, CPU, torch.float32)
    with pytest.raises(
        NumericalError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN"
    ):
        skeleton.load_block(1, CPU, torch.float32)
    with pytest.raises(
        NumericalError, match=r"model\.safetensors: tensor model\.norm\.weight holds NaN or Inf; the check"
    ):
        skeleton.check_surroundings()


def test_overflow_in_the_computing_dtype_is_no_damage(tmp_path: Path) -> None:
    """A bfloat16 weight of 1e6 is a number; in float16 it is not, and that is said where it matters."""
    source = tiny_model("llama", tmp_path, dtype=torch.bfloat16)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6
    write_tensors(source / "model.safetensors", tensors)
    with pytest.raises(
        NumericalError, match=r"up_proj\.weight does not fit into float16; use --dtype bfloat16 or float32"
    ):
        Skeleton(source).load_block(0, CPU, torch.float16)


@pytest.mark.parametrize(
    "missing", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_missing_tensors_are_named(missing: str, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items() if name != missing}
    write_tensors(source / "model.safetensors", tensors)
    with pytest.raises(FileError, match=rf"no tensor for parameter {missing}; the checkpoint is incomplete"):
        Skeleton(source)


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    source = tiny_model("qwen2", tmp_path)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(31)
    write_tensors(source / "model.safetensors", tensors)
    message = (
        r"tensor model\.layers\.0\.self_attn\.k_proj\.bias has shape \[31\], the model of config\.json needs \[32\]"
    )
    with pytest.raises(FileError, match=message):
        Skeleton(source)


def test_tensors_that_the_model_does_not_know_are_left_alone(tmp_path: Path) -> None:
    """Old checkpoints store the rotary frequencies of every layer."""
    source = tiny_model("llama", tmp_path)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    write_tensors(source / "model.safetensors", tensors)
    skeleton = Skeleton(source)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in skeleton.tensors
    skeleton.load_block(0, CPU, torch.float32)


def stacked_moe(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    source = tiny_model("qwen3_moe", folder)
    tensors = dict(build("qwen3_moe").state_dict())
    write_tensors(source / "model.safetensors", tensors)
    return source, tensors


def test_stacked_experts_become_ranges_of_the_same_file(tmp_path: Path) -> None:
    source, tensors = stacked_moe(tmp_path)
    skeleton = Skeleton(source)
    gate_up = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    down = tensors["model.layers.1.mlp.experts.down_proj"]
    for index in range(4):
        prefix = f"model.layers.1.mlp.experts.{index}"
        gate, up = gate_up[index].chunk(2)
        for name, expected in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[index])):
            assert torch.equal(read_tensor(skeleton.tensors[f"{prefix}.{name}.weight"]), expected)
    n_bytes = sum(ref.n_bytes for ref in skeleton.tensors.values())
    assert n_bytes == sum(ref.n_bytes for ref in find_tensors(source).values())
    assert not any(name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in skeleton.tensors)


def test_stacked_experts_of_another_shape_are_named(tmp_path: Path) -> None:
    source, tensors = stacked_moe(tmp_path)
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(4, 32, 64)
    write_tensors(source / "model.safetensors", tensors)
    message = r"experts\.down_proj has shape \[4, 32, 64\], the model needs \[4, 64, 32\]"
    with pytest.raises(FileError, match=message):
        Skeleton(source)


def test_checkpoints_in_another_layout_are_refused(tmp_path: Path) -> None:
    """HRM's files hold one tensor for gate and up, which transformers cuts in two while it loads."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32, "num_layers_per_stack": 1}
    config = CONFIG_MAPPING["hrm_text"](**sizes, num_attention_heads=2, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = (
        r"^tensor model\.H_module\.layers\.0\.\S+ is stored in another layout than HrmTextForCausalLM computes with "
        r"\(as model\.H_module\.layers\.0\.\S+\); checkpoints that are converted while they are loaded are not "
        r"supported$"
    )
    with pytest.raises(RequestError, match=message):
        Skeleton(tmp_path)


def test_buffers_that_nobody_can_recompute_are_refused(models: Path) -> None:
    """Remote code may keep a table that its initialization does not set: better no run than one on random memory."""
    skeleton = Skeleton(tiny_model("llama", models))
    skeleton.model.model.norm.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
    message = (
        r"model\.norm: its buffer table is neither in the files nor recomputed from the config; LlamaForCausalLM is"
    )
    with pytest.raises(RequestError, match=message):
        skeleton.load_surroundings(CPU, torch.float32)
