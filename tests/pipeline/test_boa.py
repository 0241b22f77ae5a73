"""BoA through the whole pipeline: every family, what falls back and says so, and what composes with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_models import Events, dense_model, logits, quantized_weights, sha256_of, small_run
from tiny_models import FAMILIES, build, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BloomConfig

import quantkit
from quantkit.errors import RequestError
from quantkit.pipeline.attend import attention_bytes
from quantkit.recipe import resolve

SAME = ["damping=0.1"]  # what boa sets for all linears
ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, models: Path, text: Path, tmp_path: Path) -> None:
    """Queries, keys and values differ from GPTQ's; whatever else the first block holds is GPTQ's, bit for bit."""
    source, events = tiny_model(family, models), Events()
    result = small_run(source, tmp_path / "boa", text, "boa", bits=2, listener=events)
    assert events.notes == []
    ours, gptq = (
        quantized_weights(
            small_run(source, tmp_path / method, text, method, bits=2, settings=SAME).output
            if method
            else result.output
        )
        for method in ("", "gptq")
    )
    first = [name for name in ours if ".0." in name.replace(".experts.0.", ".experts.x.")]
    for name in first:
        same = torch.equal(ours[name].codes, gptq[name].codes)
        assert same == (not name.endswith(ATTENTION)), name
    packed = quantkit.load(result.output, dtype="float32")
    dense = dense_model(source, {name: weight.dequantize() for name, weight in ours.items()})
    torch.testing.assert_close(logits(packed), logits(dense), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_turboboa(family: str, models: Path, text: Path, tmp_path: Path) -> None:
    source, events = tiny_model(family, models), Events()
    result = small_run(source, tmp_path / "turbo", text, "turboboa", bits=2, listener=events)
    assert events.notes == []
    assert all(0 < module.relative_error < 1 for module in result.modules)


@pytest.mark.parametrize(
    "settings",
    [
        ["block_v=false", "v_row_factor=false", "qk_metric=logits", "center_keys=false", "late_grids=false"],
        ["v_row_factor=false", "act_order=full", "row_order=false"],
        ["sequential=true", "act_order=group", "correction=0.5", "refine=1"],
        ["allocator=sba"],
        ["allocator=zd", "bits=2.5"],
    ],
    ids=lambda settings: settings[0],
)
def test_composes(settings: list[str], models: Path, text: Path, tmp_path: Path) -> None:
    source, events = tiny_model("llama", models), Events()
    bits = {} if any(item.startswith("bits") for item in settings) else {"bits": 2}
    result = small_run(
        source, tmp_path / "out", text, "boa", settings=settings, listener=events, **{"bits": None, **bits}
    )
    assert not any("GPTQ" in note for note in events.notes)
    assert all(0 < module.relative_error < 1 for module in result.modules)


def test_same_run_same_bytes(models: Path, text: Path, tmp_path: Path) -> None:
    source = tiny_model("qwen3", models)
    first, second = (small_run(source, tmp_path / name, text, "boa", bits=2) for name in ("a", "b"))
    assert sha256_of(first.output) == sha256_of(second.output)


def test_plan_counts_what_attention_needs() -> None:
    """Per head [in, in] in five copies, and 4 bytes four times for each pair of positions of a key head's queries."""
    block = build("llama").model.layers[0]
    expected = 5 * 4 * 2 * 64**2 + 16 * 2 * 100**2
    assert attention_bytes(block, resolve("boa"), 100) == expected
    assert attention_bytes(block, resolve("boa", settings=["block_v=false"]), 100) == 16 * 2 * 100**2
    assert attention_bytes(block, resolve("gptq"), 100) == 0
    assert attention_bytes(torch.nn.Linear(2, 2), resolve("boa"), 100) == 0


def bloom(folder: Path) -> Path:
    """A model with ALiBi: a slope on the logits that BoA's derivation does not know."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BloomConfig(vocab_size=288, hidden_size=64, n_layer=2, n_head=4)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data = torch.randn_like(parameter) / parameter.shape[1] ** 0.5
    model.save_pretrained(folder / "bloom")
    tiny_tokenizer().save_pretrained(folder / "bloom")
    return folder / "bloom"


def test_fallback_says_why(models: Path, text: Path, tmp_path: Path) -> None:
    source, events = bloom(models), Events()
    ours = small_run(source, tmp_path / "boa", text, "boa", bits=2, listener=events)
    assert [note.partition(":")[0] for note in events.notes] == ["transformer.h.0", "transformer.h.1"]
    assert "its attention is not softmax(q k^T) v of its projections (they differ by" in events.notes[0]
    assert events.notes[0].endswith("BoA's derivation does not hold, so GPTQ quantizes all of it")
    plain = small_run(source, tmp_path / "gptq", text, "gptq", bits=2, settings=SAME)
    weights, expected = quantized_weights(ours.output), quantized_weights(plain.output)
    assert all(torch.equal(weights[name].codes, expected[name].codes) for name in expected)


@pytest.mark.parametrize("setting", ["block_v=false", "qk_metric=logits", "joint_rows=true", "late_grids=false"])
def test_settings_of_boa_alone(setting: str) -> None:
    with pytest.raises(
        RequestError, match=rf"{setting.partition('=')[0]} is a setting of solver=boa; use --method boa"
    ):
        resolve("gptq", settings=[setting])
    assert resolve("gptq", settings=["solver=boa", setting]).solver == "boa"


def test_unknown_metric() -> None:
    with pytest.raises(RequestError, match=r"unknown qk_metric 'logit'; did you mean 'logits'\?"):
        resolve("boa", settings=["qk_metric=logit"])
