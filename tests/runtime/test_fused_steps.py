"""The fused step of Llama-like models: the tokens and logits of the model it was built from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_weights import activations
from sign_weights import random_sign_factors, random_sign_salient
from small_llama import PROMPT, SHAPE
from tiny_models import tiny_model
from torch import nn

from quantkit.errors import RequestError
from quantkit.evaluation.random_models import random_llama
from quantkit.evaluation.random_weights import random_spec, random_tensors
from quantkit.formats.grouped_int import unpack
from quantkit.formats.storage import pack
from quantkit.runtime.fused_steps import FusedSteps, why_not
from quantkit.runtime.graphs import GraphDecoder
from quantkit.runtime.loading import load
from quantkit.runtime.packed_linear import PackedLinear
from quantkit.runtime.sign_stacks import FactorStack, SalientStack
from quantkit.runtime.stacking import Joined, Moved, stack_linears, stack_tensors


@pytest.mark.parametrize(
    ("format", "stacked"),
    [
        (None, nn.Linear),
        ("int2", PackedLinear),
        ("int3-zeros", PackedLinear),
        ("slim-2", Joined),
        ("ptq161", SalientStack),
        ("littlebit-0.55", FactorStack),
    ],
)
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:, :1]])
def test_tokens_and_logits_of_the_model(format, stacked, prompt):
    model = random_llama(SHAPE, format, "int4" if format else None, device="cpu", dtype=torch.float32)
    plain = GraphDecoder(model, 32)
    expected = plain.generate(prompt, 6)
    wanted = plain.logits
    fused = GraphDecoder(model, 32, fuse=True)
    assert type(fused.steps.blocks[0].qkv) is stacked
    assert type(fused.steps.blocks[1].gate_up) is stacked
    assert torch.equal(fused.generate(prompt, 6), expected)
    assert float((fused.logits - wanted).norm() / wanted.norm()) < 1e-5  # sums in another order
    assert torch.equal(fused.generate(prompt, 6), expected)  # what an earlier text left does not matter


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_families(family, tmp_path):
    """Qwen2 has biases on queries, keys and values, which are zero in a new model."""
    model = load(tiny_model(family, tmp_path), dtype="float32")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    ids = torch.arange(20, 29)[None]
    expected = GraphDecoder(model, 64).generate(ids, 20)
    assert torch.equal(GraphDecoder(model, 64, fuse=True).generate(ids, 20), expected)


def test_a_model_that_was_taken_apart_says_so(tmp_path):
    model = random_llama(SHAPE, "int2", None, device="cpu", dtype=torch.float32)
    GraphDecoder(model, 32, fuse=True)
    with pytest.raises(RequestError, match="cannot be called; load it again"):
        model(input_ids=PROMPT)
    with pytest.raises(RequestError, match="cannot be saved; load it again"):
        model.state_dict()


@pytest.mark.parametrize(
    ("family", "reason"),
    [("opt", "opt is not one of llama, mistral, qwen2"), ("qwen3", "qwen3 is not one of")],
)
def test_models_without_a_fused_step(family, reason, tmp_path):
    model = load(tiny_model(family, tmp_path), dtype="float32")
    with pytest.raises(RequestError, match=f"no fused step for this model: {reason}"):
        FusedSteps(model, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"rotary embedding \(dynamic\)",
        ),
        ({"head_dim": 48, "num_attention_heads": 4, "num_key_value_heads": 2}, "heads of 48 numbers, 4 for 2"),
        ({"num_attention_heads": 32, "num_key_value_heads": 1}, "heads of 32 numbers, 32 for 1"),
    ],
)
def test_what_the_kernels_do_not_know(change, reason):
    model = random_llama(SHAPE | {"num_hidden_layers": 1} | change, device="cpu", dtype=torch.float32)
    assert reason.replace("\\", "") in str(why_not(model))


@pytest.mark.skipif(torch.cuda.is_available(), reason="in bfloat16 a GPU may choose other tokens than a CPU")
def test_the_example_of_the_page():
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
    names: dict = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["ids"].shape == (1, names["prompt"].shape[1] + 24)
    model = load("demo")
    expected = GraphDecoder(model, 64).generate(names["prompt"], 24)
    assert torch.equal(names["ids"], expected)


def test_fused_and_compiled_exclude_each_other():
    model = random_llama(SHAPE | {"num_hidden_layers": 1}, device="cpu", dtype=torch.float32)
    with pytest.raises(RequestError, match="give either fuse or compile"):
        GraphDecoder(model, fuse=True, compile=True)


@pytest.mark.parametrize("format", ["int1-zeros", "int2", "int3-zeros", "int4-zeros", "int8", "slim-2"])
def test_stacked_rows_are_the_rows(format):
    """Rows that do not fill a byte of zeros either: 3 bits, 8 groups, 24 + 8 rows."""
    first, second = random_spec(format, 24, 1024), random_spec(format, 8, 1024)
    tensors = [random_tensors(first, seed=1), random_tensors(second, seed=2)]
    if "group_order" in tensors[0]:
        tensors[1]["group_order"] = tensors[0]["group_order"]
    stacked = unpack(random_spec(format, 32, 1024), stack_tensors([first, second], tensors)).dequantize()
    apart = [unpack(spec, each).dequantize() for spec, each in zip((first, second), tensors, strict=True)]
    assert torch.equal(stacked, torch.cat(apart))


def test_a_missing_bias_is_zero():
    parent = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 2)})
    x = torch.randn(2, 4)
    expected = torch.cat([parent["a"](x), parent["b"](x)], -1)
    stacked = stack_linears(parent, ("a", "b"))
    assert stacked.bias[:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(stacked(x), expected)


def siblings(weights, biases):
    linears = nn.ModuleDict()
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        spec = weight.spec()
        linear = PackedLinear(spec, bias=bias)
        state = {"weight": torch.empty(0), **pack(weight)}
        if bias:
            state["bias"] = torch.linspace(-1, 1, spec.out_features)
        linear.load_state_dict(state)
        linears[str(number)] = linear
    return linears


SALIENT = {"row_means": True, "column_scales": True, "salient_bits": (4, 4), "salient_group": 16}
STACKS = {
    "factors": [random_sign_factors(n, rows, 100, (16 + n, 9)) for n, rows in enumerate((40, 24, 8))],
    "one path": [random_sign_factors(n, rows, 128, (70,)) for n, rows in enumerate((40, 24))],
    "salient": [random_sign_salient(n, rows, 100, **SALIENT) for n, rows in enumerate((40, 24, 8))],
    "signs": [random_sign_salient(n, rows, 64) for n, rows in enumerate((8, 9))],
    "alone": [random_sign_salient(0, 10, 100, **SALIENT)],
    "alone factors": [random_sign_factors(0, 10, 100, (16, 9))],
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_stacks_of_sign_formats(kind, with_bias):
    """Each sibling has columns, scales and ranks of its own; one of them has no bias."""
    weights = STACKS[kind]
    linears = siblings(weights, [with_bias and number != 1 for number in range(len(weights))])
    biases = [linear.bias for linear in linears.values()]
    names = tuple(linears)
    stack = stack_linears(linears, names)
    assert type(stack) in (SalientStack, FactorStack)
    assert all(type(linear) is Moved for linear in linears.values())
    for m in (1, 3):
        x = activations(1, m, weights[0].spec().in_features)
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            product = x.double() @ weight.dequantize().double().t()
            parts.append(product if bias is None else product + bias.double())
        size = torch.cat([x.double().abs() @ weight.dequantize().double().abs().t() for weight in weights], 1)
        error = (stack(x).double() - torch.cat(parts, 1)).abs()
        assert float((error / (size + 1)).max()) < 1e-5


def test_rows_whose_signs_do_not_count():
    """A scale of zero, and one that is lost beside the mean: such rows are their mean."""
    weight = random_sign_salient(0, 4, 64, row_means=True)
    weight.row_scales[:] = torch.tensor([0.0, 0.0, 2.0**-24, 0.5])
    weight.row_means[:] = torch.tensor([0.0, 0.25, 100.0, 0.5])
    x = activations(1, 1, 64)
    expected = x.double() @ weight.dequantize().double().t()
    stack = stack_linears(siblings([weight], [False]), ("0",))
    assert float(((stack(x) - expected).abs() / (x.abs().sum() * weight.row_means.abs() + 1e-3)).max()) < 1e-5


def test_siblings_that_cannot_be_stacked_are_joined():
    pairs = [
        [random_sign_factors(0, 8, 64, (8,)), random_sign_factors(1, 8, 64, (8, 8))],
        [random_sign_salient(0, 8, 64), random_sign_salient(1, 8, 64, row_means=True)],
        [random_sign_salient(0, 8, 64), random_sign_factors(1, 8, 64, (8,))],
    ]
    for weights in pairs:
        linears = siblings(weights, [False, False])
        joined = stack_linears(linears, ("0", "1"))
        assert type(joined) is Joined
        x = activations(1, 2, 64)
        expected = torch.cat([x.double() @ weight.dequantize().double().t() for weight in weights], 1)
        torch.testing.assert_close(joined(x).double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", [None, "int2", "int4-zeros", "slim-2", "ptq161", "littlebit-0.55"])
def test_on_a_gpu(format, dtype):
    """Every step from the same token: rounding may decide a token, but logits stay near those of the model."""
    shape = SHAPE | {"intermediate_size": 2048}
    model = random_llama(shape, format, "int4" if format else None, dtype=dtype)
    plain = GraphDecoder(model, 128)
    ids = torch.arange(100)[None]
    plain.prefill(ids)
    tokens, wanted = [], []
    for _ in range(20):
        tokens.append(plain.token.clone())
        plain.step()
        wanted.append(plain.logits.clone())
    fused = GraphDecoder(model, 128, fuse=True)
    fused.prefill(ids)
    error = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for token, logits in zip(tokens, wanted, strict=True):
        fused.token.copy_(token)
        fused.step()
        assert float((fused.logits - logits).norm() / logits.norm()) < error
