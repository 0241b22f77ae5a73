"""Attention's Hessians against automatic differentiation of the real blocks of many families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, HIDDEN, build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BloomConfig, CohereConfig, GlmConfig, Olmo2Config, PreTrainedModel

from quantkit.calib.attention import AttentionRecorder, AttentionStatistics, head_factors
from quantkit.calib.rotary import no_rotary, rotary
from quantkit.models.attention import Attention, find_attention
from quantkit.models.structure import find_block_list

LENGTH = 7
SHAPE: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# Neighbouring channels rotate together (cohere: angles twice in a row; glm: half of the channels, angles twice over);
# one norm over all heads of a token (olmo2).
OTHERS = {"cohere": CohereConfig, "glm": GlmConfig, "olmo2": Olmo2Config}
FAMILY_NAMES = [*FAMILIES, *OTHERS]


def model_of(family: str, **settings: Any) -> PreTrainedModel:
    if family in FAMILIES:
        return build(family, **settings)
    extra = {"head_dim": 16} if family == "glm" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(OTHERS[family](**SHAPE, **extra, **settings)).eval()
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
            parameter.data = noise if parameter.ndim > 1 else 1 + 0.3 * torch.randn_like(parameter)
    return model


def first_block(model: PreTrainedModel) -> tuple[nn.Module, Attention]:
    block = model.get_submodule(find_block_list(model))[0]
    attention = find_attention(block)
    assert isinstance(attention, Attention)
    return block, attention


def tokens(rows: int = 1, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(seed))


def recorded(model: PreTrainedModel, ids: list[Tensor], **settings: Any) -> AttentionStatistics:
    block, attention = first_block(model)
    recorder = AttentionRecorder(attention, block, **settings)
    with recorder.recording(), torch.no_grad():
        for batch in ids:
            model(batch, use_cache=False)
    assert recorder.problem is None
    statistics = recorder.statistics()
    assert statistics is not None
    return statistics


@dataclass
class Jacobian:
    """d (what the output projection receives) / d (what the projections return), for one sequence."""

    q: Tensor  # [L, heads, head_dim, L', heads, head_dim]: of the output by the queries at L'
    k: Tensor  # [..., L', kv_heads, head_dim]
    v: Tensor
    inputs: Tensor  # [L, in]
    output_weight: Tensor  # [heads, hidden, head_dim]


def jacobian(model: PreTrainedModel, ids: Tensor) -> Jacobian:
    """By automatic differentiation, through everything that the family does between."""
    block, attention = first_block(model)
    caught: dict[str, Tensor] = {}
    linears = [block.get_submodule(path) for path in attention.linears]
    output = block.get_submodule(attention.output)

    def run(*changes: Tensor) -> Tensor:
        def add(change: Tensor) -> Callable[..., Tensor]:
            return lambda module, args, result: result + change

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught["output"] = args[0]

        def catch_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught["inputs"] = args[0].detach()

        handles = [linear.register_forward_hook(add(change)) for linear, change in zip(linears, changes, strict=True)]
        handles += [output.register_forward_pre_hook(catch), linears[0].register_forward_pre_hook(catch_inputs)]
        try:
            model(ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return caught["output"][0]

    length = ids.shape[1]
    zeros = tuple(torch.zeros(length, linear.out_features) for linear in linears)
    parts = torch.autograd.functional.jacobian(run, zeros)
    by_path = dict(zip(attention.linears, parts, strict=True))
    heads, head_dim = attention.heads, attention.head_dim

    def of(projection: Any) -> Tensor:
        picked = by_path[projection.path][..., projection.rows()]
        return picked.reshape(length, heads, head_dim, length, projection.heads, head_dim)

    weight = output.weight.detach().reshape(len(output.weight), heads, head_dim).transpose(0, 1)
    return Jacobian(of(attention.q), of(attention.k), of(attention.v), caught["inputs"][0], weight)


def assert_proportional(actual: Tensor, expected: Tensor, factor: float) -> None:
    """Relative to the largest entry: float32 sums of a few thousand products, eps 6e-8 each, grown by a softmax."""
    torch.testing.assert_close(actual * factor, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# --- the factors of metric="outputs" ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_factors_are_those_of_the_output(family: str) -> None:
    """Sums over positions of J^T J, J the module's output by one head's query or key, as automatic derivatives."""
    model = model_of(family)
    attention, J = first_block(model)[1], jacobian(model, tokens())
    statistics = recorded(model, [tokens()], queries_per_call=LENGTH)
    scaling = attention.scaling**2
    group = attention.heads // attention.kv_heads
    for head in range(attention.heads):
        outer = J.output_weight[head]
        by_query = torch.einsum("oe,leld->lod", outer, J.q[:, head, :, :, head])
        assert_proportional(statistics.query_rows[head], torch.einsum("lod,loe->de", by_query, by_query), scaling)
    for g in range(attention.kv_heads):
        expected = torch.zeros(attention.head_dim, attention.head_dim)
        for head in range(g * group, (g + 1) * group):
            by_key = torch.einsum("oe,lemd->lomd", J.output_weight[head], J.k[:, head, :, :, g])
            expected += torch.einsum("lomd,lome->de", by_key, by_key)
        assert_proportional(statistics.key_rows[g], expected, scaling)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_value_factors(family: str) -> None:
    model = model_of(family)
    attention, J = first_block(model)[1], jacobian(model, tokens())
    statistics = recorded(model, [tokens()])
    group = attention.heads // attention.kv_heads
    assert statistics.value_columns is not None
    assert statistics.value_rows is not None
    for g in range(attention.kv_heads):
        heads = range(g * group, (g + 1) * group)
        mixed = [
            J.v[:, head, 0, :, g, 0] @ J.inputs for head in heads
        ]  # A X: d output / d value is A, in every channel
        assert_proportional(statistics.value_columns[g], sum(m.t() @ m for m in mixed), 1.0)
        assert_proportional(
            statistics.value_rows[g], sum(J.output_weight[h].t() @ J.output_weight[h] for h in heads), 1
        )


def test_value_hessian_is_exact_without_groups() -> None:
    """The second derivative of the squared change of the module's output by one head's value weights."""
    model = build("llama", num_key_value_heads=4)
    J = jacobian(model, tokens())
    statistics = recorded(model, [tokens()])
    for head in range(4):
        by_value = torch.einsum("oe,lemd->lomd", J.output_weight[head], J.v[:, head, :, :, head])
        by_weight = torch.einsum("lomd,mi->lodi", by_value, J.inputs).flatten(0, 1).flatten(1)
        expected = 2 * by_weight.t() @ by_weight
        assert statistics.value_columns is not None
        assert statistics.value_rows is not None
        assert_proportional(torch.kron(statistics.value_rows[head], statistics.value_columns[head]), expected, 2.0)


@pytest.mark.parametrize("length", [5, 150])
def test_either_order_of_products_gives_the_value_columns(length: int) -> None:
    """Short sequences of many grouped heads go through A^T A, long ones through A X."""
    model = build("llama", num_key_value_heads=1)
    probabilities, inputs = eager_attention(model, tokens(length=length))
    statistics = recorded(model, [tokens(length=length)], queries_per_call=1)
    mixed = (probabilities[0] @ inputs).flatten(0, 1)
    assert statistics.value_columns is not None
    assert_proportional(statistics.value_columns[0], mixed.t() @ mixed, 1.0)


def eager_attention(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [1, heads, L, L] and inputs [L, in] of the first block, by the model's own eager path."""
    caught: list[Tensor] = []
    block, attention = first_block(model)
    hook = block.get_submodule(attention.v.path).register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        probabilities = model(ids, use_cache=False, output_attentions=True).attentions[0]
    model.set_attn_implementation("sdpa")
    hook.remove()
    return probabilities, caught[0][0]


# --- metric="logits" ----------------------------------------------------------------------------------------------


def logits_of(model: PreTrainedModel, ids: Tensor, side: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The unscaled, unmasked logits [heads, L, L] as a function of a change of the query or key weight."""
    block, attention = first_block(model)
    caught: dict[str, Any] = {}
    module = block.get_submodule(attention.path)

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.update(kwargs)

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    hidden = caught["hidden_states"][0]
    cos, sin = (part[0] for part in caught["position_embeddings"])

    def logits(change: Tensor) -> Tensor:
        heads = []
        for name in ("q", "k"):
            projection, norm = getattr(module, f"{name}_proj"), getattr(module, f"{name}_norm", None)
            weight = projection.weight + (change if name == side else 0)
            x = nn.functional.linear(hidden, weight, projection.bias).reshape(len(hidden), -1, attention.head_dim)
            x = (norm(x) if norm is not None else x).transpose(0, 1)
            half = attention.head_dim // 2
            heads.append(x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin)
        q, k = heads
        return q @ k.repeat_interleave(len(q) // len(k), 0).mT

    return logits, hidden


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("side", ["q", "k"])
def test_logits_hessian_is_exact_for_equal_inputs(family: str, side: str) -> None:
    """Rotation, groups, biases, norms: where all inputs are equal, the product of averages is the average product."""
    model = model_of(family)
    ids = torch.full((1, LENGTH), 9)
    logits, hidden = logits_of(model, ids, side)
    attention = first_block(model)[1]
    projection = getattr(attention, side)
    weight = torch.zeros(projection.heads * attention.head_dim, HIDDEN)
    J = torch.autograd.functional.jacobian(logits, weight).reshape(-1, *weight.shape)
    statistics = recorded(model, [ids], metric="logits", center_keys=False)
    rows = statistics.query_rows if side == "q" else statistics.key_rows
    columns = hidden.t() @ hidden
    for head in range(projection.heads):
        own = J[:, head * attention.head_dim : (head + 1) * attention.head_dim].flatten(1)
        assert_proportional(torch.kron(rows[head], columns).detach(), own.t() @ own, 1.0)


@pytest.mark.parametrize("metric", ["logits", "outputs"])
def test_key_bias_changes_nothing_when_centred(metric: str) -> None:
    """Without rotation a key bias adds a constant to all logits of a query, which no softmax sees."""
    model = build("opt")
    plain = recorded(model, [tokens()], metric=metric)
    raw = recorded(model, [tokens()], metric=metric, center_keys=False)
    block, attention = first_block(model)
    block.get_submodule(attention.k.path).bias.data += 3.0
    biased = recorded(model, [tokens()], metric=metric)
    assert_proportional(biased.query_rows, plain.query_rows, 1.0)
    if metric == "logits":
        uncentred = recorded(model, [tokens()], metric=metric, center_keys=False)
        assert float((uncentred.query_rows - raw.query_rows).norm() / raw.query_rows.norm()) > 1


# --- recording ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["logits", "outputs"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_batches_add_up(family: str, metric: str) -> None:
    model = model_of(family)
    ids = tokens(4, 40)
    once = recorded(model, [ids], metric=metric, queries_per_call=8)
    singly = recorded(model, list(ids.split(1)), metric=metric, queries_per_call=8)
    again = recorded(model, [ids], metric=metric, queries_per_call=8)
    for name in ("query_rows", "key_rows", "value_rows", "value_columns"):
        assert_proportional(getattr(singly, name), getattr(once, name), 1.0)
        assert torch.equal(getattr(again, name), getattr(once, name))


def test_few_queries_estimate_all() -> None:
    """A fifth of the query positions: the same Hessian up to sampling."""
    model = build("llama")
    ids = [tokens(1, 100, seed) for seed in range(4)]
    every, some = (recorded(model, ids, queries_per_call=count) for count in (100, 20))
    for name in ("query_rows", "key_rows"):
        a, b = getattr(every, name).flatten(1), getattr(some, name).flatten(1)
        assert float(torch.cosine_similarity(a, b).min()) > 0.9


def test_what_is_not_asked_for_is_not_gathered() -> None:
    statistics = recorded(build("llama"), [tokens()], value_columns=False, value_rows=False)
    assert statistics.value_columns is None
    assert statistics.value_rows is None


@pytest.mark.parametrize(("family", "parts"), [("llama", 1), ("phi3", 3), ("gpt_neox", 3)])
def test_every_row_of_a_linear_belongs_to_one_part(family: str, parts: int) -> None:
    model = build(family)
    block, attention = first_block(model)
    found = head_factors(attention, recorded(model, [tokens()]))
    assert set(found) == set(attention.linears)
    for path, factors in found.items():
        assert len(factors) == parts
        rows = torch.cat([part.rows for part in factors]).sort().values
        assert torch.equal(rows, torch.arange(block.get_submodule(path).out_features))


def test_attention_of_another_kind_is_noticed() -> None:
    """ALiBi adds a slope to the logits that no module shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            BloomConfig(vocab_size=288, hidden_size=64, n_layer=1, n_head=4)
        ).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data * 5
    block, attention = first_block(model)
    recorder = AttentionRecorder(attention, block)
    with recorder.recording(), torch.no_grad():
        model(tokens(1, 60), use_cache=False)
        model(tokens(1, 60), use_cache=False)
    assert recorder.statistics() is None
    assert recorder.problem is not None
    assert recorder.problem.startswith("its attention is not softmax(q k^T) v of its projections (they differ by ")


def test_nothing_recorded() -> None:
    model = build("llama")
    block, attention = first_block(model)
    assert AttentionRecorder(attention, block).statistics() is None


def test_hooks_are_gone_afterwards() -> None:
    model = build("llama")
    recorded(model, [tokens()])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- rotation -----------------------------------------------------------------------------------------------------


def angles(seq_len: int, n_rotating: int, *, in_a_row: bool) -> tuple[Tensor, Tensor]:
    frequencies = 10000 ** -torch.linspace(0, 1, n_rotating // 2)
    angle = torch.arange(seq_len).unsqueeze(1) * frequencies
    angle = angle.repeat_interleave(2, 1) if in_a_row else torch.cat((angle, angle), 1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("n_rotating", [4, 8, 12])
@pytest.mark.parametrize(("neighbours", "in_a_row"), [(False, False), (True, False), (True, True)])
def test_mean_over_positions(n_rotating: int, neighbours: bool, in_a_row: bool) -> None:
    positions = rotary(*angles(9, n_rotating, in_a_row=in_a_row), 12, neighbours=neighbours)
    R = torch.stack([positions.rotate(torch.eye(12)[i].expand(9, 12)) for i in range(12)], 2)  # [9, 12, 12]: R_l
    torch.testing.assert_close(R.mT @ R, torch.eye(12).expand(9, 12, 12), rtol=0, atol=1e-6)
    assert torch.equal(R[:, n_rotating:, n_rotating:], torch.eye(12 - n_rotating).expand(9, -1, -1))
    matrix = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([(R.mT @ m @ R).mean(0) for m in matrix])
    torch.testing.assert_close(positions.mean(matrix), expected, rtol=0, atol=1e-5)
    x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([8, 0, 3, 3])
    turned = torch.einsum("nde,kne->knd", R[chosen], x)
    torch.testing.assert_close(positions.rotate(x, chosen), turned, rtol=0, atol=1e-5)
    torch.testing.assert_close(positions.rotate(turned, chosen, back=True), x, rtol=0, atol=1e-5)


def test_no_rotation() -> None:
    still = no_rotary(5, 6, torch.device("cpu"))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(still.rotate(x), x)
    torch.testing.assert_close(still.mean(matrix), matrix)
