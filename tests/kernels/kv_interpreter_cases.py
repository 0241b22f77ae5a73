"""The decode kernels in Triton's interpreter, on CPU tensors. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
from kv_caches import filled, reference

from quantkit.kernels import kv_attention_triton as kernels
from quantkit.kernels.kv_decode import DecodeConfig, decode_launches


def run(case, splits: int = 2, n_pages_more: int = 0):
    """The kernels with results and workspace filled with NaN; against attention on decoded tokens in float64."""
    shape = case.query.shape
    result, lse = torch.full(shape, float("nan")), torch.full(shape[:2], float("nan"))
    configs = [DecodeConfig(splits=splits, warps=1, stages=1)] * len(case.cache.pages)
    launches = decode_launches(case.query, case.scaling, case.cache, result, lse, configs)
    launches[0][2]["outputs"].fill_(float("nan"))
    for name, grid, arguments in launches:
        extra = {"ASM": False} if name == "decode_kernel" else {}
        getattr(kernels, name)[grid](**arguments, **extra)
    output, expected = reference(case)
    # float16 operands: query, probabilities and scales of values are rounded once each, 2^-11
    assert torch.allclose(lse.double(), expected, atol=4e-3)
    assert float((result - output).norm() / output.norm()) <= 2e-3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("spec", ["int4", "akvq-vl"])
def test_widths_and_grids(spec, bits):
    run(filled(f"{spec}:bits={bits}", n=300))


@pytest.mark.parametrize("spec", ["zipcache:share=0.3", "akvq-vl:centre=0", "int2:rotate=yes"])
def test_policies(spec):
    run(filled(spec, n=400))


@pytest.mark.parametrize("n", [65, 159, 160, 161, 400])
@pytest.mark.parametrize("splits", [1, 3, 5])
def test_ragged_pages_and_empty_splits(n, splits):
    run(filled("akvq-vl:pivots=1", n=n), splits)


@pytest.mark.parametrize("group", [1, 5, 8, 12])
def test_query_heads(group):
    run(filled("int4", n=200, group=group))


def test_head_of_128():
    run(filled("akvq-vl", n=200, heads=1, head_dim=128))


def coded_by_the_kernel(spec_text, tokens, starts, seed=0):
    """Keys and values of `tokens` appended in pieces; and the same by the torch twin."""
    from quantkit.algorithms.kv.policy import fit_transform
    from quantkit.algorithms.kv.registry import parse_kv_spec
    from quantkit.formats.kv_page import PageSpec
    from quantkit.kernels.kv_append import append_launch
    from quantkit.kernels.kv_append_triton import append_kernel
    from quantkit.runtime.kv_segment import PackedSegment

    policy = parse_kv_spec(spec_text).layer_policy(0)
    heads, n, head_dim = tokens.shape
    grids = (policy.keys.for_head(head_dim), policy.values.for_head(head_dim))
    spec = PageSpec(heads=heads, head_dim=head_dim, bits=policy.bits[0], keys=grids[0], values=grids[1])
    transform = fit_transform(policy, tokens[:, :64], tokens[:, :64])
    twin = PackedSegment.empty(spec, policy.clip[0], torch.device("cpu"))
    twin.append(tokens, tokens, list(range(n)), transform)
    layout = spec.layout(twin.tensors["key_words"].shape[1])
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        part = tokens[:, start:stop].contiguous()
        for which, rotate, mean in (
            ("key", transform.rotate_keys, transform.key_mean),
            ("value", transform.rotate_values, None),
        ):
            grid, arguments = append_launch(
                which, part, start, tensors, spec, rotate=rotate, mean=mean, channel_scales=None, clip=policy.clip[0]
            )
            append_kernel[grid](**arguments)
    return spec, twin, tensors


@pytest.mark.parametrize("spec_text", ["akvq-vl", "akvq-vl:bits=4,centre=0", "int2", "int4:rotate=yes", "int8"])
def test_coding_of_tokens(spec_text):
    """Scales to a rounding of float16, and codes the same but where a value lies between two."""
    from quantkit.formats.kv_page import unpack_keys, unpack_values

    tokens = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0)).half()
    tokens[..., 3] *= 9
    spec, twin, tensors = coded_by_the_kernel(spec_text, tokens, [0])
    for name, unpack in (("key_words", unpack_keys), ("value_words", unpack_values)):
        found, expected = (unpack(held[name], spec)[:, :300].int() for held in (tensors, twin.tensors))
        assert (found - expected).abs().max() <= 1
        assert float((found != expected).float().mean()) <= 1e-3
        assert not unpack(tensors[name], spec)[:, 300:].any()
    for name in set(tensors) - {"key_words", "value_words"}:
        assert torch.allclose(tensors[name].float(), twin.tensors[name].float(), rtol=2e-3, atol=1e-4)


def test_coding_in_pieces_gives_the_same_bytes():
    tokens = torch.randn(1, 200, 64, generator=torch.Generator().manual_seed(1)).half()
    _, _, whole = coded_by_the_kernel("akvq-vl", tokens, [0])
    _, _, pieces = coded_by_the_kernel("akvq-vl", tokens, [0, 1, 28, 60, 130])
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
