"""The measurement of decoding: that it is refused without a GPU, and a small model with one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantkit.errors import RequestError
from quantkit.evaluation.decode_speed import VARIANTS, bench_decode
from quantkit.evaluation.random_models import random_llama
from quantkit.evaluation.random_weights import random_spec
from quantkit.runtime.packed_linear import PackedLinear

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device():
    with pytest.raises(RequestError, match="bench decode needs a CUDA device"):
        bench_decode()


def test_unknown_steps_and_variants():
    with pytest.raises(RequestError, match="unknown step 'graf'; did you mean 'graph'"):
        bench_decode(steps=["graf"])


def test_random_models_hold_the_formats_asked_for():
    model = random_llama(SHAPE, "ptq161", "int4", device="cpu")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(linears) == 7 * 2 + 1
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert linears["lm_head"].spec == random_spec("int4", 512, 1024)
    assert linears["model.layers.1.mlp.down_proj"].spec == random_spec("ptq161", 1024, 2048)
    first, second = (linears[f"model.layers.{n}.mlp.down_proj"].signs for n in (0, 1))
    assert not torch.equal(first, second)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(4)[None]).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


def test_the_default_dtype_stays():
    random_llama(SHAPE, None, None, device="cpu")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_small_model():
    seen = []
    report = bench_decode(
        tuple(VARIANTS), context=16, max_length=64, steps=("fused", "eager", "graph"), shape=SHAPE, replays=3,
        progress=seen.append,
    )  # fmt: skip
    assert report["rows"] == seen
    steps = ("eager", "graph", "fused")  # whatever the order of the request: the last one takes the model apart
    assert [(row["name"], row["step"]) for row in seen] == [(name, step) for name in VARIANTS for step in steps]
    assert [row["speedup"] for row in seen[:3]] == [1.0, 1.0, 1.0]
    assert all(row["p10"] <= row["milliseconds"] <= row["p90"] for row in seen)
