"""The decode kernels in Triton's interpreter, on CPU tensors. Run by test_interpreter.py in a process of its own."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kv_caches import filled, reference

from quantkit.kernels import kv_attention_triton as kernels
from quantkit.kernels.kv_attention import attend, attend_pages, merge
from quantkit.kernels.kv_decode import DecodeConfig, Step, decode_launches, work_size
from quantkit.kernels.kv_rotation_triton import rotate_columns


def launch(case, splits: int = 2, new=None):
    """(output, lse) of the kernels, with results and workspace filled with NaN."""
    shape = case.query.shape
    config = DecodeConfig(splits=(splits,) * len(case.cache.pages), warps=1, stages=1)
    result, lse = torch.full(shape, float("nan")), torch.full(shape[:2], float("nan"))
    work = torch.full((work_size(case.query, case.cache, config),), float("nan"))
    step = Step(case.query, *(new or (None, None)), result, lse, work)
    for name, grid, arguments in decode_launches(step, case.scaling, case.cache, config):
        getattr(kernels, name)[grid](**arguments, ASM=False)
    return result, lse


def run(case, splits: int = 2):
    """The kernels against attention on decoded tokens in float64."""
    result, lse = launch(case, splits)
    output, expected = reference(case)
    # float16 operands: query, probabilities and scales of values are rounded once each, 2^-11, rotated ones twice more
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


@pytest.mark.parametrize("lengths", [(32, 1), (1, 129), (0, 256), (5, 300)])
def test_pages_beyond_the_length_do_not_count(lengths):
    """As in a graph that was captured at a larger capacity: whole pages, and whole splits, may be empty."""
    case = filled("int4", n=400)
    case.cache.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
    (pages,) = case.cache.pages
    query = case.query * case.scaling
    parts = [attend_pages(query, pages.spec, pages.tensors, lengths[1])]
    if lengths[0]:
        parts.append(attend(query, *(x[:, : lengths[0]] for x in case.cache.floats)))
    result, lse = launch(case, splits=3)
    assert torch.allclose(lse, merge(parts).lse, atol=4e-3)
    assert float((result - merge(parts).output).norm() / merge(parts).output.norm()) <= 2e-3


@pytest.mark.parametrize("group", [1, 5, 8, 12])
def test_query_heads(group):
    run(filled("int4", n=200, group=group))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_larger_heads(head_dim):
    run(filled("akvq-vl", n=200, heads=1, head_dim=head_dim))


@pytest.mark.parametrize("spec", ["int4", "zipcache:share=0.3"])
def test_the_newest_token_is_stored_and_counted(spec):
    """Taken in by the kernel it gives the bits that it gives after it was appended."""
    case, appended = filled(spec, n=200), filled(spec, n=200)
    keys, values = torch.randn(2, 2, 1, 64, generator=torch.Generator().manual_seed(1))
    appended.sequence.append(keys, values)
    appended.cache = appended.sequence.packed()
    found, expected = launch(case, new=(keys, values)), launch(appended)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert torch.equal(case.cache.lengths, appended.cache.lengths)
    assert all(torch.equal(one, two) for one, two in zip(case.cache.floats, appended.cache.floats, strict=True))


def test_rotation_of_columns():
    """Whole numbers up to 15 stay exact in float16, whatever the order of the sums."""
    from quantkit.algorithms.kv.hadamard import rotate

    for head_dim in (64, 128, 256):
        x = torch.randint(-15, 16, (head_dim, 8), generator=torch.Generator().manual_seed(head_dim)).float()
        found = torch.empty_like(x)
        rotation_kernel[(1,)](x, found, head_dim)
        assert torch.allclose(found, rotate(x.T).T, rtol=1e-6, atol=1e-6)


@triton.jit
def rotation_kernel(x, found, D: tl.constexpr):
    at = tl.arange(0, D)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(found + at, rotate_columns(tl.load(x + at), D))


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
