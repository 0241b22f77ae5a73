"""transform=hadamard: the model computes what it did, in every family; packed folders load and compute as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    Events,
    dense_model,
    dense_weight,
    logits,
    quantized_weights,
    sha256_of,
    small_request,
    small_run,
)
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import quantkit
from quantkit.algorithms.registry import METHODS
from quantkit.errors import RequestError
from quantkit.formats.checkpoint import find_tensors, read_tensor, write_tensors
from quantkit.formats.files import read_json
from quantkit.models.skeleton import Skeleton
from quantkit.pipeline import dry_run, quantize, run
from quantkit.pipeline.rotate import StreamRotation

HADAMARD = ["transform=hadamard"]
EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")
EXACT: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"hidden_size": 48},
    "gemma": {},
    "phi3": {},
    "qwen3_moe": {},
    "mixtral": {},
}


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Norms too, which transformers computes in float32 whatever the model's dtype is; experts one by one."""

    def exact(norm: nn.Module, offset: float) -> Any:
        def forward(x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (offset + norm.weight)

        return forward

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = exact(module, 1.0 if type(module).__name__.startswith("Gemma") else 0.0)
    model.set_experts_implementation("eager")
    return model.double().eval()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("family", EXACT)
def test_logits_are_those_of_the_original(family: str, values: bool, tmp_path: Path) -> None:
    """The fold of every parameter, put into transformers' own model with an output head of its own."""
    source = tiny_model(family, tmp_path, dtype=torch.float64, **EXACT[family])
    for name, parameter in (skeleton := Skeleton(source)).model.named_parameters():
        if parameter.ndim == 1:  # tiny models have small biases: make sure that all of them matter
            assert skeleton.read_source(name).abs().max() > 0
    fold = StreamRotation(skeleton, 7, CPU, values=values)
    original = in_float64(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64))
    config = AutoConfig.from_pretrained(source, tie_word_embeddings=False)
    rotated = in_float64(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    for name, _ in skeleton.model.named_parameters(remove_duplicate=False):
        tensor = skeleton.read_source(name)
        changed = fold(name, tensor) if name in fold.touched else tensor
        assert changed.dtype == torch.float64
        parent, _, key = name.rpartition(".")
        target = dense_weight(rotated, parent) if key == "weight" else rotated.get_parameter(name).data
        target.copy_(changed)
    before, after = logits(original), logits(rotated)
    assert not torch.allclose(rotated.get_input_embeddings().weight, original.get_input_embeddings().weight)
    # some 1e3 operations of 2^-53 each on numbers around 10; routers compute their softmax in float32
    tolerance = 1e-5 if family in ("qwen3_moe", "mixtral") else 1e-11
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance)


def assert_computes_with_its_weights(output: Path) -> PreTrainedModel:
    """The packed model against one in which transformers alone multiplies with the dequantized weights."""
    config = AutoConfig.from_pretrained(output)
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = {name: packed.dequantize() for name, packed in quantized_weights(output).items()}
    stored = find_tensors(output)
    names = [name for name, _ in dense.named_parameters()]
    linears = {f"{name}.weight" for name in weights}
    for name in set(names) - linears:
        if ".experts." not in name:
            dense.get_parameter(name).data.copy_(read_tensor(stored[name]))
    for name, value in weights.items():
        dense_weight(dense, name).copy_(value)
    packed = quantkit.load(output, dtype="float32")
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=1e-4)  # as in test_families
    return packed


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rtn", {"bits": 8}),
        ("gptq", {"bits": 3, "settings": ["correction=0.5", "refine=1"]}),
        ("boa", {"bits": 3, "settings": ["rotate_values=true"]}),
        ("slim", {"bits": 2, "group_size": 16}),
    ],
    ids=["rtn", "gptq", "boa", "slim"],
)
def test_family(family: str, method: str, options: dict[str, Any], models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model(family, models)
    options = {**options, "settings": [*options.get("settings", []), *HADAMARD]}
    result = small_run(source, tmp_path / "out", text, method, **options)
    packed = assert_computes_with_its_weights(result.output)
    assert all(0 < module.relative_error < 1 for module in result.modules)
    if method == "rtn":
        original = logits(dense_model(source, {}))
        errors = torch.tensor([module.relative_error for module in result.modules])
        assert (logits(packed) - original).norm() / original.norm() < 2 * errors.norm()  # as in test_families


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_with_it(method: str, models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", models)
    defaults = METHODS[method].defaults
    group_size = {} if "group_size" in defaults else {"group_size": 16}
    small = {"casp": ["keep_ratio=0.6", "bits=3"], "littlebit": ["bits=1"]}  # ranks that 64 columns allow
    tiny = small.get(method, [f"bits={defaults.get('bits', 3)}"])
    options: dict[str, Any] = {"settings": [*HADAMARD, "rotate_values=true", *tiny]}
    result = quantize(
        source, tmp_path / "out", method=method, calib=str(text), n_samples=4, seq_len=32, **options, **group_size
    )
    assert_computes_with_its_weights(result.output)


@pytest.mark.parametrize("settings", [["allocator=zd", "bits=2.5"], ["allocator=lim", "bits=2.5", "solver=rtn"]])
def test_allocators_see_the_rotated_model(settings: list[str], models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", models)
    result = small_run(source, tmp_path / "out", text, bits=None, settings=[*settings, *HADAMARD])
    assert_computes_with_its_weights(result.output)


def test_values_are_rotated_as_well(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen2", models)
    folders = [
        small_run(source, tmp_path / f"out{number}", text, "rtn", settings=[*HADAMARD, *more]).output
        for number, more in enumerate(([], ["rotate_values=true"]))
    ]
    plain, rotated = (find_tensors(folder) for folder in folders)
    for path, changes in (("v_proj", True), ("o_proj", True), ("q_proj", False), ("k_proj", False)):
        names = [f"model.layers.1.self_attn.{path}.{key}" for key in ("codes_3b", "bias")]
        for name in names[: 1 if path == "o_proj" else 2]:
            same = torch.equal(read_tensor(plain[name]), read_tensor(rotated[name]))
            assert same is not changes, name


def test_outliers_go(models: Path, text: Path, tmp_path: Path) -> None:
    """The tiny models' large columns: rounding to 4 bits errs less where the stream is read."""
    source = tiny_model("llama", models)
    errors = []
    for number, settings in enumerate(([], HADAMARD)):
        result = small_run(source, tmp_path / f"out{number}", text, "rtn", bits=4, settings=settings)
        errors.append({item.name: item.relative_error for item in result.modules})
    readers = [
        name for name in errors[0] if name.split(".")[-1] in ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj")
    ]
    assert sum(errors[1][name] for name in readers) < 0.9 * sum(errors[0][name] for name in readers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_kept_has_its_dtype(dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path, dtype=dtype)
    result = small_run(source, tmp_path / "out", text, "rtn", settings=HADAMARD)
    before, after = find_tensors(source), find_tensors(result.output)
    router, norm = "model.layers.1.mlp.gate.weight", "model.layers.1.input_layernorm.weight"
    for name in (router, norm, "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert (after[name].dtype, after[name].shape) == (before[name].dtype, before[name].shape)
    assert torch.equal(read_tensor(after[norm]), torch.ones(64, dtype=dtype))
    assert not torch.equal(read_tensor(after[router]), read_tensor(before[router]))
    assert_computes_with_its_weights(result.output)


def test_calibration_sees_what_is_stored(models: Path, text: Path, tmp_path: Path) -> None:
    """The embedding in the walk is rounded to its stored dtype, as the packed model's will be."""
    source = tiny_model("llama", tmp_path, dtype=torch.bfloat16)
    result = small_run(source, tmp_path / "out", text, "rtn", settings=HADAMARD)
    skeleton = Skeleton(source)
    skeleton.transform = StreamRotation(skeleton, 0, CPU)
    skeleton.load_surroundings(CPU, torch.float32)
    stored = read_tensor(find_tensors(result.output)["model.embed_tokens.weight"])
    assert torch.equal(skeleton.model.get_input_embeddings().weight, stored.float())


@pytest.mark.parametrize("stored_as", ["model.embed_tokens.weight", "lm_head.weight", "embed_tokens.weight"])
def test_a_tied_head_gets_a_tensor_of_its_own(stored_as: str, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    tensors = {name: read_tensor(ref) for name, ref in find_tensors(source).items()}
    tensors[stored_as] = tensors.pop("model.embed_tokens.weight")
    if stored_as == "embed_tokens.weight":  # saved from the base class
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    write_tensors(source / "model.safetensors", tensors)
    events = Events()
    result = small_run(source, tmp_path / "out", text, "rtn", bits=8, settings=HADAMARD, listener=events)
    assert events.notes == ["transform=hadamard: the output head no longer shares the embedding: 0.1 MB more"]
    assert read_json(result.output / "config.json")["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(find_tensors(result.output))
    packed = quantkit.load(result.output, dtype="float32")
    original = logits(quantkit.load(source, dtype="float32"))
    assert (logits(packed) - original).norm() / original.norm() < 0.05  # 8 bits: 2 % without rotation
    if stored_as != "embed_tokens.weight":
        packed.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(quantkit.load(tmp_path / "again", dtype="float32")), logits(packed))


def test_a_head_of_its_own_stays(models: Path, text: Path, tmp_path: Path) -> None:
    source, events = tiny_model("llama", models), Events()
    result = small_run(source, tmp_path / "out", text, "rtn", settings=HADAMARD, listener=events)
    plain = small_run(source, tmp_path / "plain", text, "rtn")
    assert not any("head" in text for text in events.notes)
    assert result.size_bytes == plain.size_bytes
    assert "transform" not in read_json(result.output / "config.json")


@pytest.mark.parametrize("tied", [True, False])
def test_planned_bytes_are_the_bytes(tied: bool, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path, tie_word_embeddings=tied)
    request = small_request(source, tmp_path / "out", text, settings=HADAMARD)
    plan, plain = dry_run(request), dry_run(small_request(source, tmp_path / "out", text))
    assert not (tmp_path / "out").exists()
    assert plan.transform_bytes == (288 * 64 * 4 if tied else 0)
    assert plan.output_bytes == plain.output_bytes + plan.transform_bytes
    assert plan.to_json()["transform_bytes"] == plan.transform_bytes
    assert plan.scratch_bytes == plain.scratch_bytes + (2 * 288 * 64 + 64) * 4
    assert run(request).size_bytes == plan.output_bytes


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_recipes(example: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", tmp_path, tie_word_embeddings=True)
    result = small_run(source, tmp_path / "out", text, None, bits=None, group_size=16, recipe_file=example)
    recipe = read_json(result.output / "recipe.json")
    assert {key: recipe[key] for key in ("transform", "allocator", "solver")} == {
        "transform": "hadamard",
        "allocator": "sba",
        "solver": "boa",
    }
    assert {1, 2, 3} <= {bits for weight in quantized_weights(result.output).values() for bits in weight.bits}
    assert_computes_with_its_weights(result.output)


def test_the_seed_decides(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", models)
    folders = [
        small_run(source, tmp_path / f"out{number}", text, "rtn", settings=HADAMARD, seed=seed).output
        for number, seed in enumerate((0, 0, 1))
    ]
    first, second, other = (sha256_of(folder) for folder in folders)
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]


def test_shards_change_nothing(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("llama", models)
    whole = small_run(source, tmp_path / "whole", text, "rtn", settings=HADAMARD)
    parts = small_run(source, tmp_path / "parts", text, "rtn", settings=HADAMARD, max_shard_bytes=40_000)
    assert len(list(parts.output.glob("*.safetensors"))) > 2
    assert torch.equal(logits(quantkit.load(parts.output)), logits(quantkit.load(whole.output)))


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma2", "gemma3"])
def test_refused_before_a_weight_is_read(family: str, text: Path, tmp_path: Path) -> None:
    source = tiny_model(family, tmp_path)
    for path in source.glob("*.safetensors"):  # keep the headers, spoil the numbers
        data = bytearray(path.read_bytes())
        data[-4096:] = b"\xff" * 4096
        path.write_bytes(data)
    request = small_request(source, tmp_path / "out", text, "rtn", settings=HADAMARD)
    for attempt in (dry_run, run):
        with pytest.raises(RequestError, match=r"^\w+: its residual stream cannot be rotated: .*; use transform=none$"):
            attempt(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]
