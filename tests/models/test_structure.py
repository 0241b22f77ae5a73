"""Blocks and linears, found by structure in models of every family and in modules that resemble none."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import nn

from quantkit.errors import RequestError
from quantkit.models.experts import unfuse_experts
from quantkit.models.structure import describe_blocks, find_block_list

BLOCK_LISTS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}  # model.layers in the other families
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
USUAL = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LINEARS = {
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "opt": ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"],
    "gpt_neox": [
        "attention.query_key_value",
        "attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ],
    "qwen3_moe": ATTENTION
    + [f"mlp.experts.{index}.{name}" for index in range(4) for name in ("gate_proj", "up_proj", "down_proj")],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    with torch.device("meta"):
        model = build_on_meta(family)
    unfuse_experts(model)
    name = find_block_list(model)
    assert name == BLOCK_LISTS.get(family, "model.layers")
    blocks = describe_blocks(model, name)
    assert [block.name for block in blocks] == [f"{name}.0", f"{name}.1"]
    for block in blocks:
        assert sorted(linear.path for linear in block.linears) == sorted(LINEARS.get(family, USUAL))
        for linear in block.linears:
            assert linear.name == f"{block.name}.{linear.path}"
            module = model.get_submodule(linear.name)
            assert (linear.out_features, linear.in_features) == tuple(module.weight.shape)
            assert linear.n_weights == module.weight.numel()


def build_on_meta(family: str) -> nn.Module:
    model = build(family)
    return model.to("meta")


class Blocks(nn.Module):
    """A decoder whose attributes a test chooses."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(count))


def test_the_longest_list_with_linears_is_the_one() -> None:
    norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(9))
    assert find_block_list(Blocks(adapters=linears(2), layers=linears(5), norms=norms)) == "layers"


def test_lists_inside_a_block_belong_to_it() -> None:
    block = Blocks(experts=linears(8))
    assert (
        find_block_list(Blocks(stem=nn.Linear(4, 4), layers=nn.ModuleList([block, Blocks(experts=linears(8))])))
        == "layers"
    )


def test_only_the_text_decoder_counts() -> None:
    class Seeing(Blocks):
        def get_decoder(self) -> nn.Module:
            return self.get_submodule("language")

    vision, language = Blocks(layers=linears(12)), Blocks(layers=linears(3))
    assert find_block_list(Seeing(vision=vision, language=language)) == "language.layers"


def test_no_list_is_refused() -> None:
    with pytest.raises(RequestError, match="Blocks: found no list of decoder blocks with linear layers; this archit"):
        find_block_list(Blocks(body=nn.Linear(4, 4)))


def test_reasons_for_skipping() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 4, 4))

    mixture = Blocks(gate=nn.Linear(4, 2), experts=linears(2), shared_expert_gate=nn.Linear(4, 1))
    block = Blocks(
        proj=nn.Linear(4, 4), score=nn.Linear(4, 1), gate=nn.Linear(4, 4), conv=nn.Conv1d(4, 4, 2), moe=mixture
    )
    block.extra = Stacked()
    model = Blocks(layers=nn.ModuleList([block]))
    (described,) = describe_blocks(model, "layers")
    assert [linear.path for linear in described.linears] == ["proj", "gate", "moe.experts.0.0", "moe.experts.1.0"]
    router = "router: its few weights decide which experts run"
    assert dict(described.skipped) == {
        "layers.0.score": "a single output",
        "layers.0.conv": "Conv1d is not a linear layer",
        "layers.0.moe.gate": router,
        "layers.0.moe.shared_expert_gate": router,
        "layers.0.extra": "Stacked is not a linear layer",
    }
