"""Unfused experts compute what the fused module computed, with the same weights under per-expert names."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch import nn

from quantkit.models.experts import UnfusedExperts, unfuse_experts

EXPERTS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


def test_logits_are_unchanged() -> None:
    model = build("qwen3_moe")
    ids = torch.randint(4, 260, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        assert unfuse_experts(model) == EXPERTS
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_weights_are_copies_under_the_published_names() -> None:
    model = build("qwen3_moe")
    fused = model.model.layers[0].mlp.experts
    gate_up, down = fused.gate_up_proj, fused.down_proj
    unfuse_experts(model)
    state = model.state_dict()
    for index in range(4):
        parts = {"gate_proj": gate_up[index, :32], "up_proj": gate_up[index, 32:], "down_proj": down[index]}
        for name, part in parts.items():
            weight = state[f"{EXPERTS[0]}.{index}.{name}.weight"]
            assert torch.equal(weight, part)
            assert weight.untyped_storage().nbytes() == weight.nbytes  # no view that keeps the stack alive
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "experts" in name]
    assert len(linears) == 2 * 4 * 3


def test_meta_device_dtype_and_mode_are_kept() -> None:
    with torch.device("meta"):
        model = build("qwen3_moe").to(torch.bfloat16)
    assert unfuse_experts(model) == EXPERTS
    for name in EXPERTS:
        experts = model.get_submodule(name)
        assert isinstance(experts, UnfusedExperts)
        assert not experts.training
        assert all(weight.is_meta and weight.dtype == torch.bfloat16 for weight in experts.parameters())


def test_second_call_and_dense_models_find_nothing() -> None:
    model = build("qwen3_moe")
    unfuse_experts(model)
    assert unfuse_experts(model) == []
    assert unfuse_experts(build("llama")) == []


def test_every_routing_gives_the_weighted_sum() -> None:
    """Against the sum written out: repeated experts, an expert that nobody chose, the index that means none."""
    generator = torch.Generator().manual_seed(1)
    experts = UnfusedExperts(4, 16, 8, torch.tanh, device=torch.device("cpu"), dtype=torch.float64)
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    index = torch.tensor([[0, 1], [1, 1], [3, 0], [4, 3], [4, 4]])
    weights = torch.rand(5, 2, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for token in range(5):
        for choice in range(2):
            if index[token, choice] < 4:
                expert = experts.get_submodule(str(int(index[token, choice])))
                expected[token] += weights[token, choice] * expert(x[token])
    torch.testing.assert_close(experts(x, index, weights), expected, rtol=0, atol=1e-14)
    assert experts(x[:0], index[:0], weights[:0]).shape == (0, 16)


class Stacked(nn.Module):
    """The structure that is recognized, with one detail to change."""

    def __init__(self, gate_up: tuple[int, ...] = (4, 16, 32), down: tuple[int, ...] = (4, 32, 8)) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(gate_up))
        self.down_proj = nn.Parameter(torch.zeros(down))
        self.act_fn = nn.SiLU()


def with_bias() -> Stacked:
    experts = Stacked()
    experts.down_proj_bias = nn.Parameter(torch.zeros(4, 32))
    return experts


def with_norm() -> Stacked:
    experts = Stacked()
    experts.post_norm = nn.LayerNorm(32)
    return experts


def with_own_gate() -> Stacked:
    class Clamped(Stacked):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate_up.clamp(max=1)

    return Clamped()


def without_activation() -> Stacked:
    experts = Stacked()
    del experts.act_fn
    return experts


def with_flag(name: str, value: bool) -> Stacked:
    experts = Stacked()
    setattr(experts, name, value)
    return experts


def test_the_plain_structure_is_recognized() -> None:
    assert unfuse_experts(nn.ModuleDict({"experts": Stacked()})) == ["experts"]


@pytest.mark.parametrize(
    "experts",
    [
        with_bias(),
        with_norm(),
        with_own_gate(),
        without_activation(),
        with_flag("is_transposed", True),
        with_flag("is_concatenated", False),
        Stacked(gate_up=(4, 32, 16), down=(4, 8, 32)),
        Stacked(gate_up=(64, 32), down=(4, 32, 8)),
        Stacked(gate_up=(4, 16, 32), down=(4, 32, 16)),
    ],
)
def test_experts_that_compute_something_else_are_left_alone(experts: nn.Module) -> None:
    model = nn.ModuleDict({"experts": experts})
    assert unfuse_experts(model) == []
    assert model["experts"] is experts
