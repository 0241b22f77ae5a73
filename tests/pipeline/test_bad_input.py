"""What users get wrong, and what is wrong with their files: one clear line each, and nothing lost."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_models import (
    Events,
    dense_model,
    logits,
    quantized_weights,
    sha256_of,
    small_request,
    small_run,
)
from tiny_models import tiny_model
from torch import Tensor

import quantkit
from quantkit.errors import FileError, NumericalError, QuantkitError, RequestError
from quantkit.formats.checkpoint import find_tensors, read_tensor, write_tensors
from quantkit.formats.files import read_json, write_json
from quantkit.pipeline import run
from quantkit.pipeline.journal import work_folder


@pytest.fixture(scope="module")
def llama(models: Path) -> Path:
    return tiny_model("llama", models)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A model that a test may damage."""
    return tiny_model("llama", tmp_path)


def edit(source: Path, name: str, change: Callable[[Tensor], object]) -> None:
    tensors = {key: read_tensor(ref) for key, ref in find_tensors(source).items()}
    change(tensors[name])
    write_tensors(source / "model.safetensors", tensors)


def edit_config(source: Path, **fields: Any) -> None:
    write_json(source / "config.json", read_json(source / "config.json") | fields)


def refused(error: type[QuantkitError], message: str, source: Path, text: Path, output: Path, **options: Any) -> str:
    """The one line of a request that must fail, whose output must not exist afterwards."""
    with pytest.raises(error) as raised:
        small_run(source, output, text, **options)
    said = str(raised.value)
    assert re.search(message, said), said
    assert "\n" not in said
    assert not output.exists() or sha256_of(output) == {}
    return said


# Names and settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "^bits must be 1 to 8, not 9$"),
        ({"bits": 0}, "^bits must be 1 to 8, not 0$"),
        ({"method": "gtpq"}, "^unknown method 'gtpq'; did you mean 'gptq'\\? known: "),
        ({"settings": ["dampng=1"]}, "^unknown setting 'dampng'; did you mean 'damping'\\? known: "),
        ({"settings": ["damping"]}, "^--set takes KEY=VALUE, not 'damping'$"),
        ({"settings": ["damping=much"]}, "^setting damping takes a number, not 'much'$"),
        ({"settings": ["solver=gtpq"]}, "^unknown solver 'gtpq'; did you mean 'gptq'\\?"),
        ({"group_size": -1}, "^group_size must be positive, or 0 for one group per row, not -1$"),
        (
            {"group_size": 48},
            "in_features 64 is not a multiple of group_size 48 \\(remainder 16\\); use 16, 32, 64 or 0",
        ),
        ({"n_samples": 0}, "^n_samples must be at least 1, not 0$"),
        ({"seq_len": 1}, "^seq_len must be at least 2, not 1$"),
        ({"offload": "tape"}, "^unknown offload 'tape'; one of none, cpu, disk$"),
        ({"dtype": "int4"}, "^unknown dtype 'int4'; one of auto, float32, bfloat16, float16$"),
        ({"device": "tpu?"}, "^unknown device 'tpu\\?'; use auto, cpu or cuda$"),
        (
            {"calib": "wikitext"},
            "^wikitext: no such file or folder, and no data set of that name; did you mean 'wikitext2'",
        ),
    ],
    ids=lambda value: "-".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, dict) else "",
)
def test_requests(options: dict[str, Any], message: str, llama: Path, text: Path, tmp_path: Path) -> None:
    refused(RequestError, message, llama, text, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda(llama: Path, text: Path, tmp_path: Path) -> None:
    message = "^device cuda: this machine has no usable CUDA device; use --device cpu$"
    refused(RequestError, message, llama, text, tmp_path / "out", device="cuda")


def test_text_that_is_too_short(llama: Path, text: Path, tmp_path: Path) -> None:
    message = (
        r"^calibration: 62 full chunks of 32 tokens \(2001 tokens in all\), n_samples is 100; "
        "lower n_samples to 62 or seq_len to 20, or pass more text$"
    )
    refused(RequestError, message, llama, text, tmp_path / "out", n_samples=100)
    assert list(tmp_path.iterdir()) == []


# Folders


def test_no_such_model(text: Path, tmp_path: Path) -> None:
    refused(FileError, "^no folder .*/nowhere$", tmp_path / "nowhere", text, tmp_path / "out")


def test_a_file_instead_of_a_folder(llama: Path, text: Path, tmp_path: Path) -> None:
    file = llama / "model.safetensors"
    refused(FileError, "model.safetensors is a file; give the folder of the model$", file, text, tmp_path / "out")


def test_no_config(own: Path, text: Path, tmp_path: Path) -> None:
    (own / "config.json").unlink()
    refused(FileError, "llama-0/config.json: no such file$", own, text, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", FileError, r"config.json: not valid JSON \(.*\); the file is damaged$"),
        ("[]", FileError, "config.json: expected a JSON object, found list$"),
        ("{}", RequestError, r"config.json cannot be read as a transformers model \(.*model_type"),
        ('{"model_type": "no-such-model"}', RequestError, r"cannot be read as a transformers model \(.*no-such-model"),
        ('{"model_type": 5}', RequestError, "config.json cannot be read as a transformers model"),
    ],
)
def test_a_config_that_is_none(
    content: str, error: type[QuantkitError], message: str, own: Path, text: Path, tmp_path: Path
) -> None:
    (own / "config.json").write_text(content)
    refused(error, message, own, text, tmp_path / "out")


def test_a_config_with_a_wrong_type(own: Path, text: Path, tmp_path: Path) -> None:
    edit_config(own, hidden_size="wide")
    message = r"config.json cannot be read as a transformers model \(Field 'hidden_size' expected int, got str"
    refused(RequestError, message, own, text, tmp_path / "out")


def test_a_model_that_writes_no_text(own: Path, text: Path, tmp_path: Path) -> None:
    (own / "config.json").write_text('{"model_type": "vit"}')
    refused(RequestError, "^ViTConfig: this is no language model that can be", own, text, tmp_path / "out")


def test_a_model_without_linear_blocks(own: Path, text: Path, tmp_path: Path) -> None:
    """GPT-2 keeps its weights in modules of its own kind."""
    write_json(own / "config.json", {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 8})
    tensors = {f"transformer.{name}": torch.zeros(8) for name in ("wte.weight", "wpe.weight")}
    write_tensors(own / "model.safetensors", tensors)
    message = "GPT2LMHeadModel: found no list of decoder blocks with linear layers; this architecture is not supported"
    refused(RequestError, message, own, text, tmp_path / "out")


def test_no_weights(own: Path, text: Path, tmp_path: Path) -> None:
    (own / "model.safetensors").unlink()
    message = r"no weights \(model.safetensors or model.safetensors.index.json\); only safetensors are read"
    refused(FileError, message, own, text, tmp_path / "out")


def test_truncated_weights(own: Path, text: Path, tmp_path: Path) -> None:
    file = own / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = r"model.safetensors: truncated: \d+ bytes, \d+ required \(tensor .* is cut\); copy the file again$"
    refused(FileError, message, own, text, tmp_path / "out")


def test_a_tensor_of_another_shape(own: Path, text: Path, tmp_path: Path) -> None:
    edit_config(own, intermediate_size=96)
    message = r"down_proj.weight has shape \[64, 128\], the model of config.json needs \[64, 96\]|has shape \[128, 64\]"
    refused(FileError, message, own, text, tmp_path / "out")


def test_no_tokenizer(own: Path, text: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / name).unlink()
    refused(FileError, "no tokenizer .* copy it from the original model", own, text, tmp_path / "out")
    small_run(own, tmp_path / "out", text, "rtn")  # which needs none


def test_the_tokenizer_of_another_model(own: Path, text: Path, tmp_path: Path) -> None:
    tensors = {key: read_tensor(ref) for key, ref in find_tensors(own).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:50].clone()
    write_tensors(own / "model.safetensors", tensors)
    edit_config(own, vocab_size=50)
    message = (
        "^calibration: token id .* is outside the model's vocabulary of 50; the tokenizer belongs to another model$"
    )
    refused(RequestError, message, own, text, tmp_path / "out")


def test_a_model_that_is_quantized_already(llama: Path, text: Path, tmp_path: Path) -> None:
    once = small_run(llama, tmp_path / "once", text, "rtn").output
    message = r"once: the model is quantized already \(quantkit\); start from the unquantized model$"
    refused(RequestError, message, once, text, tmp_path / "twice")
    edit_config(once, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    refused(RequestError, r"quantized already \(gptq\)", once, text, tmp_path / "twice")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_output_that_exists(method: str, llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    with pytest.raises(
        RequestError, match=r"output .*/out exists; choose another folder with -o, or pass --overwrite$"
    ):
        small_run(llama, output, text, method)
    assert (output / "precious.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_spares_what_quantkit_did_not_write(own: Path, text: Path, tmp_path: Path) -> None:
    """Least of all the model itself, or a folder that it lies in."""
    message = r"was not written by quantkit, so --overwrite does not touch it; choose another folder with -o$"
    before = sha256_of(tmp_path)
    for output in (own, tmp_path):
        with pytest.raises(RequestError, match=message):
            small_run(own, output, text, "rtn", overwrite=True)
    assert sha256_of(tmp_path) == before


def test_outputs_that_cannot_be(llama: Path, text: Path, tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=r"output .*/file is a file; give a folder with -o$"):
        small_run(llama, file, text, "rtn")
    with pytest.raises(RequestError, match=r"output .*/link is a link or a mount point, which no folder can replace"):
        small_run(llama, link, text, "rtn")
    with pytest.raises(
        FileError, match=r"cannot create .*/file/\.out\.quantkit: Not a directory; choose another folder"
    ):
        small_run(llama, file / "out", text, "rtn")
    assert file.read_text() == "mine"


# Numbers


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_nan_and_inf(name: str, value: float, method: str, own: Path, text: Path, tmp_path: Path) -> None:
    """Whether a tensor is quantized, run through or only copied; blocks before it are kept."""
    edit(own, name, lambda tensor: tensor.view(-1)[-1].fill_(value))
    message = f"^model.safetensors: tensor {name} holds NaN or Inf; the checkpoint is damaged$"
    refused(NumericalError, message, own, text, tmp_path / "out", method=method)
    finished = (work_folder(tmp_path / "out") / "journal.jsonl").exists()
    assert finished is ("layers.1" in name)


def test_activations_that_overflow(own: Path, text: Path, tmp_path: Path) -> None:
    for name in ("gate_proj", "up_proj"):  # whose product is a million times as large
        edit(own, f"model.layers.0.mlp.{name}.weight", lambda tensor: tensor.mul_(1000))
    message = r"^model\.layers\.0\.mlp\.down_proj: the Hessian holds NaN or Inf: calibration activations overflowed"
    refused(NumericalError, message, own, text, tmp_path / "out", dtype="float16")


def assert_works(source: Path, output: Path, text: Path, **options: Any) -> list[str]:
    """It quantizes, loads and computes with the stored weights; returns the notes."""
    events = Events()
    result = run(small_request(source, output, text, **options), events)
    weights = {name: packed.dequantize() for name, packed in quantized_weights(result.output).items()}
    packed, dense = quantkit.load(result.output, dtype="float32"), dense_model(source, weights)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=1e-4)
    assert all(math.isfinite(module.relative_error) for module in result.modules)
    return events.notes


@pytest.mark.parametrize("method", ["gptq", "slim"])
def test_a_dead_input_channel(method: str, own: Path, text: Path, tmp_path: Path) -> None:
    """A norm of weight 0 silences a channel for q, k and v."""
    edit(own, "model.layers.0.input_layernorm.weight", lambda tensor: tensor[5].fill_(0))
    assert assert_works(own, tmp_path / "out", text, method=method) == []
    codes = quantized_weights(tmp_path / "out")["model.layers.0.self_attn.q_proj"]
    assert torch.equal(codes.dequantize()[:, 5], torch.zeros(64))


def test_a_dead_layer(own: Path, text: Path, tmp_path: Path) -> None:
    edit(own, "model.layers.0.input_layernorm.weight", lambda tensor: tensor.fill_(0))
    assert assert_works(own, tmp_path / "out", text) == []


def test_a_weight_of_zeros(own: Path, text: Path, tmp_path: Path) -> None:
    edit(own, "model.layers.0.mlp.gate_proj.weight", lambda tensor: tensor.fill_(0))
    assert assert_works(own, tmp_path / "out", text) == []
    zeros = quantized_weights(tmp_path / "out")["model.layers.0.mlp.gate_proj"].dequantize()
    assert torch.equal(zeros, torch.zeros(128, 64))


def test_a_singular_hessian(llama: Path, text: Path, tmp_path: Path) -> None:
    """Four tokens for 128 inputs, and no damping asked for: it is raised until the factor exists, and that is noted."""
    sizes = {"n_samples": 2, "seq_len": 2}
    notes = assert_works(llama, tmp_path / "out", text, settings=["damping=0"], **sizes)
    assert notes
    pattern = r"^model\.layers\.\d\.\w+\.\w+: Hessian not positive definite; damping raised to [\d.e-]+$"
    assert all(re.match(pattern, note) for note in notes)
    rows = read_json(tmp_path / "out" / "report.json")["modules"]
    assert sum(row.get("damping", 0) > 0 for row in rows) == len(notes)
    assert assert_works(llama, tmp_path / "usual", text, **sizes) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "slim", "bits": 2},
        {"method": "slim", "settings": ["criterion=kl"]},
        {"settings": ["sequential=true"]},
    ],
    ids=["gptq", "slim", "kl", "sequential"],
)
def test_an_expert_that_no_token_reaches(options: dict[str, Any], text: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen3_moe", tmp_path, num_experts_per_tok=1)
    edit(source, "model.layers.0.mlp.gate.weight", lambda tensor: tensor[1:].fill_(0))
    edit(source, "model.layers.0.mlp.gate.weight", lambda tensor: tensor[1].copy_(-tensor[0]))
    notes = assert_works(source, tmp_path / "out", text, **options)  # experts 2 and 3 never win
    experts = {".".join(note.split(".")[:6]) for note in notes}
    assert {f"model.layers.0.mlp.experts.{index}" for index in (2, 3)} <= experts
    reason = "no calibration token reached it; its inputs are taken as equally important"
    assert all(note.endswith(f"_proj: {reason}") for note in notes)
