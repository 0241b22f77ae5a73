"""The residual stream's parameters, found in every family by running a miniature, and families that are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import HIDDEN, build_llava, tiny_model, tiny_tokenizer
from torch import nn

from quantkit.algorithms.rotation import hadamard_rotation, rotate_heads
from quantkit.errors import RequestError
from quantkit.models.miniature import N_TOKENS, Miniature
from quantkit.models.skeleton import Skeleton
from quantkit.models.stream import Stream, find_stream

ROTATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "qwen3_moe", "mixtral"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def stream_of(skeleton: Skeleton) -> Stream:
    return find_stream(skeleton, hadamard_rotation(HIDDEN, 0).apply)


def expected(block: str, attention: list[str], mlp: list[str], writers: list[str]) -> Stream:
    first, second = f"{block}.input_layernorm.weight", f"{block}.post_attention_layernorm.weight"
    readers = {f"{block}.{path}.weight": first for path in attention}
    readers |= {f"{block}.{path}.weight": second for path in mlp}
    return Stream(readers, frozenset(f"{block}.{path}" for path in writers), frozenset(), {first: 0.0, second: 0.0})


@pytest.mark.parametrize(
    ("family", "attention", "mlp", "writers"),
    [
        ("phi3", ["qkv_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj.weight"]),
        ("qwen3", ["q_proj", "k_proj", "v_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj.weight"]),
        (
            "qwen3_moe",
            ["q_proj", "k_proj", "v_proj"],
            ["mlp.gate", *[f"mlp.experts.{index}.{name}_proj" for index in range(4) for name in ("gate", "up")]],
            [f"mlp.experts.{index}.down_proj.weight" for index in range(4)],
        ),
    ],
)
def test_every_reader_and_writer(
    family: str, attention: list[str], mlp: list[str], writers: list[str], models: Path
) -> None:
    found = stream_of(Skeleton(tiny_model(family, models)))
    assert found.embeddings == {"model.embed_tokens.weight"}
    assert found.readers.pop("lm_head.weight") == "model.norm.weight"
    assert found.norms.pop("model.norm.weight") == 0.0
    blocks = [
        expected(
            f"model.layers.{index}",
            [f"self_attn.{name}" for name in attention],
            mlp,
            ["self_attn.o_proj.weight", *writers],
        )
        for index in range(2)
    ]
    assert found.readers == blocks[0].readers | blocks[1].readers
    assert found.writers == blocks[0].writers | blocks[1].writers
    assert found.norms == blocks[0].norms | blocks[1].norms


@pytest.mark.parametrize("family", ROTATED)
def test_families_that_can_be_rotated(family: str, models: Path) -> None:
    """`find_stream` has compared the logits; what it says about the norms is the family's own."""
    found = stream_of(Skeleton(tiny_model(family, models)))
    assert set(found.norms.values()) == {1.0 if family == "gemma" else 0.0}
    assert len(found.norms) == 5


def test_biases_of_what_is_added(tmp_path: Path) -> None:
    found = stream_of(Skeleton(tiny_model("llama", tmp_path, attention_bias=True, mlp_bias=True)))
    block = "model.layers.1"
    assert {name for name in found.writers if name.startswith(block)} == {
        f"{block}.{path}.{key}" for path in ("self_attn.o_proj", "mlp.down_proj") for key in ("weight", "bias")
    }


def test_blocks_of_two_kinds_and_many_experts(tmp_path: Path) -> None:
    """A dense block between sparse ones; more experts than eight tokens reach."""
    source = tiny_model("qwen3_moe", tmp_path, num_hidden_layers=4, mlp_only_layers=[1], num_experts=64)
    skeleton = Skeleton(source)
    miniature = Miniature(skeleton)
    assert miniature.kinds == [[0, 2, 3], [1]]
    found = stream_of(skeleton)
    assert "model.layers.3.mlp.experts.63.up_proj.weight" in found.readers
    assert "model.layers.3.mlp.experts.63.down_proj.weight" in found.writers
    assert found.readers["model.layers.1.mlp.up_proj.weight"] == "model.layers.1.post_attention_layernorm.weight"
    assert "model.layers.1.mlp.gate.weight" not in found.readers
    assert len(found.readers) == 3 * (3 + 1 + 2 * 64) + 5 + 1


def test_the_skeleton_stays_without_weights(models: Path) -> None:
    skeleton = Skeleton(tiny_model("llama", models))
    stream_of(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert type(skeleton.block_module(0).self_attn.q_proj) is nn.Linear
    assert Miniature(skeleton).run().shape == (N_TOKENS, skeleton.config.vocab_size)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("opt", r"its model\.decoder\.layers\.0\.self_attn_layer_norm \(LayerNorm\) does more than divide by the root"),
        ("gpt_neox", r"its gpt_neox\.layers\.0\.input_layernorm \(LayerNorm\) does more than divide by the root mean"),
        ("gemma2", r"its model\.layers\.0\.post_attention_layernorm scales single features of what is added to the"),
        ("gemma3", r"its model\.layers\.0\.post_attention_layernorm scales single features of what is added to the"),
    ],
)
def test_families_that_cannot(family: str, reason: str, models: Path) -> None:
    with pytest.raises(RequestError, match=rf"^\w+: its residual stream cannot be rotated: {reason}") as refused:
        stream_of(Skeleton(tiny_model(family, models)))
    assert str(refused.value).endswith("; use transform=none")
    assert "\n" not in str(refused.value)


def test_models_that_see(tmp_path: Path) -> None:
    build_llava().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        RequestError, match=r"^Llava\w+: only models of text alone are rotated so far; use transform=none$"
    ):
        stream_of(Skeleton(tmp_path))


def absolute(module: nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
    return output.abs()


def broken(module: nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
    raise ValueError("needs an image\nand more")


def hook_embedding(hook: Callable[..., torch.Tensor]) -> Callable[[Skeleton], None]:
    return lambda skeleton: skeleton.model.get_input_embeddings().register_forward_hook(hook)


def add_idle_linear(skeleton: Skeleton) -> None:
    skeleton.block_module(0).adapter = nn.Linear(HIDDEN, 8, device="meta")


def add_large_parameter(skeleton: Skeleton) -> None:
    skeleton.block_module(1).mlp.table = nn.Parameter(torch.empty(2, 4096, 4096, device="meta"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_embedding(absolute), r"cannot be rotated: on random weights the outputs change by \d"),
        (hook_embedding(broken), r"^LlamaForCausalLM: cannot tell whether .* \(needs an image\); use transform=none$"),
        (add_idle_linear, r"cannot be rotated: its model\.layers\.0\.adapter takes no part when only text is read"),
        (add_large_parameter, r"cannot be rotated: its model\.layers\.1\.mlp \(LlamaMLP\) keeps weights in another"),
    ],
    ids=["not-equivariant", "raises", "idle", "large"],
)
def test_what_no_family_does_yet(change: Callable[[Skeleton], None], reason: str, models: Path) -> None:
    skeleton = Skeleton(tiny_model("llama", models))
    change(skeleton)
    with pytest.raises(RequestError, match=reason):
        stream_of(skeleton)


def test_values_and_what_reads_them(models: Path) -> None:
    """Fused with queries and keys, or with biases of their own."""

    def heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
        return rotate_heads(x, head_dim, 0)

    rotate = hadamard_rotation(HIDDEN, 0).apply
    fused = find_stream(Skeleton(tiny_model("phi3", models)), rotate, heads)
    assert fused.mixed == {f"model.layers.{index}.self_attn.o_proj.weight": 16 for index in range(2)}
    assert torch.equal(fused.values["model.layers.0.self_attn.qkv_proj.weight"].rows(), torch.arange(96, 128))
    apart = find_stream(Skeleton(tiny_model("qwen2", models)), rotate, heads)
    keys = ("weight", "bias")
    assert set(apart.values) == {f"model.layers.{i}.self_attn.v_proj.{key}" for i in range(2) for key in keys}
    assert set(apart.values) <= apart.names
    assert stream_of(Skeleton(tiny_model("qwen2", models))).values == {}


def test_values_that_are_not_found(tmp_path: Path) -> None:
    """Latent attention: the stream can be rotated, the values have no linear of their own."""
    skeleton = Skeleton(tiny_model("deepseek_v3", tmp_path))
    found = stream_of(skeleton)
    attention = "model.layers.1.self_attn"
    assert {name for name in found.readers if name.startswith(attention)} == {
        f"{attention}.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")
    }
    rotate = hadamard_rotation(HIDDEN, 0).apply
    with pytest.raises(
        RequestError,
        match=r"^DeepseekV3\w+: model\.layers\.0 has no values to rotate \(no module .*; use rotate_values=false$",
    ):
        find_stream(skeleton, rotate, lambda x, head_dim: x)


def test_a_norm_over_all_query_heads_is_not_the_streams(tmp_path: Path) -> None:
    """OLMoE's q_norm spans the hidden size, behind the projection: it is left alone."""
    found = stream_of(Skeleton(tiny_model("olmoe", tmp_path)))
    attention = "model.layers.0.self_attn"
    assert {f"{attention}.q_norm.weight", f"{attention}.k_norm.weight"}.isdisjoint(found.norms)
    assert found.readers[f"{attention}.q_proj.weight"] == "model.layers.0.input_layernorm.weight"
    assert f"{attention}.q_proj.weight" not in found.writers
