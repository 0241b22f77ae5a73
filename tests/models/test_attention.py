"""Heads and their rows, found in modules; that they are right is tested where attention runs (calib)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import nn

from quantkit.models.attention import Attention, Projection, Unsupported, find_attention
from quantkit.models.structure import find_block_list

KV_HEADS = {"opt": 4, "gpt_neox": 4}  # 2 in the other families; 4 query heads of 16 in all


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = build(family)
    for block in model.get_submodule(find_block_list(model)):
        found = find_attention(block)
        assert isinstance(found, Attention)
        assert (found.heads, found.kv_heads, found.head_dim) == (4, KV_HEADS.get(family, 2), 16)
        assert found.scaling == 0.25
        assert found.softcap == (50.0 if family == "gemma2" else None)
        assert (found.q_norm is not None) == (family in ("qwen3", "gemma3", "qwen3_moe"))
        assert block.get_submodule(found.output).in_features == 64
        assert len(found.linears) == (1 if family in ("phi3", "gpt_neox") else 3)


def test_rows_of_fused_projections() -> None:
    """Two key heads of two channels, each read by two query heads."""
    attention = module(query_key_value=(8, 16), dense=(8, 8), num_heads=4)
    found = find_attention(nn.ModuleDict({"attention": attention}))
    assert isinstance(found, Attention)
    assert found.q.rows().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert found.k.rows().tolist() == [4, 5, 12, 13]
    assert found.v.rows().tolist() == [6, 7, 14, 15]
    attention = module(qkv_proj=(8, 16), o_proj=(8, 8), num_heads=4)
    found = find_attention(nn.ModuleDict({"attention": attention}))
    assert isinstance(found, Attention)
    assert found.q.rows().tolist() == list(range(8))
    assert found.k.rows().tolist() == [8, 9, 10, 11]
    assert found.v.rows().tolist() == [12, 13, 14, 15]


def test_rows_of_a_projection_of_its_own() -> None:
    assert Projection("q", 3, 2, 0, 3).rows().tolist() == [0, 1, 2, 3, 4, 5]


def module(*, norms: dict[str, nn.Module] | None = None, **parts: Any) -> nn.Module:
    """A module with linears of (in, out) features; whatever else is given becomes an attribute."""
    made = nn.Module()
    for name, value in parts.items():
        setattr(made, name, nn.Linear(*value) if isinstance(value, tuple) else value)
    for name, norm in (norms or {}).items():
        setattr(made, name, norm)
    return made


SEPARATE: dict[str, Any] = {"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8)}


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (module(up_proj=(8, 8)), "no module with query, key and value linears"),
        (module(**SEPARATE, cross=module(**SEPARATE)), "several modules with query, key and value linears"),
        (
            module(q_a_proj=(8, 4), q_b_proj=(4, 8), kv_b_proj=(4, 8), o_proj=(8, 8)),
            "no module with query, key and value",
        ),
        (module(**{**SEPARATE, "o_proj": None}, num_heads=4), "no output projection"),
        (module(**SEPARATE), "the number of query heads is unknown"),
        (module(**SEPARATE, num_heads=3), "the number of query heads is unknown"),
        (
            module(**{**SEPARATE, "k_proj": (8, 6)}, num_heads=4),
            r"\[8, 6, 4\] query, key and value rows are not 4 heads",
        ),
        (module(**{**SEPARATE, "q_proj": (8, 16)}, num_heads=4), r"\[16, 4, 4\] query, key and value rows are not 4"),
        (module(qkv_proj=(8, 14), o_proj=(8, 8), num_heads=4), "14 rows of qkv_proj are not 4 query heads of 2"),
        (
            module(**SEPARATE, num_heads=4, norms={"q_norm": nn.ModuleList(), "k_norm": nn.ModuleList()}),
            "its q_norm is a ModuleList, not one norm over heads",
        ),
        (
            module(**SEPARATE, num_heads=4, norms={"q_norm": nn.RMSNorm(2), "k_norm": nn.RMSNorm(3)}),
            "its k_norm is a RMSNorm, not one norm over heads",
        ),
    ],
)
def test_what_is_no_such_attention(attention: nn.Module, reason: str) -> None:
    found = find_attention(nn.ModuleDict({"attention": attention}))
    assert isinstance(found, Unsupported)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)


def test_numbers_come_from_the_module_or_its_config() -> None:
    config = SimpleNamespace(num_attention_heads=4, attn_logit_softcapping=30.0)
    found = find_attention(nn.ModuleDict({"attention": module(**SEPARATE, config=config, scaling=0.5)}))
    assert isinstance(found, Attention)
    assert (found.heads, found.kv_heads, found.head_dim) == (4, 2, 2)
    assert (found.scaling, found.softcap) == (0.5, 30.0)
    assert torch.equal(found.q.rows(), torch.arange(8))
