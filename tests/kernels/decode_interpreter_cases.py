"""The kernels of a decoding step in Triton's interpreter, on CPU tensors; see interpreter_cases.py."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import edges_untouched, guarded

from quantkit.kernels.decode_step import AttentionState, PickScratch, add_norm, attend, gated, new_scratch
from quantkit.kernels.decode_step_triton import add_norm_kernel, attention_kernel, gated_kernel, pick_kernel
from quantkit.kernels.gather import gather
from quantkit.kernels.gather_triton import gather_kernel

ROUNDING = {torch.float32: 1e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-6}  # two roundings; bfloat16 truncates
DTYPES = list(ROUNDING)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inside_guards(tensor):
    held, whole = guarded(tensor)
    before = whole.clone()
    return held, lambda: edges_untouched(whole, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("n", [64, 100])
def test_add_norm(n, update, dtype):
    x, delta, weight = random(3, n, dtype=dtype), random(3, n, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    expected_x = x.clone()
    expected = add_norm(expected_x, delta if update else None, weight, 1e-5)
    (held, kept), (out, out_kept) = inside_guards(x), inside_guards(torch.full_like(x, float("nan")))
    add_norm_kernel[(3,)](held, delta, weight, out, n, 1e-5, HAS_UPDATE=update, BLOCK=128, PDL=False)
    assert kept()
    assert out_kept()
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(held, expected_x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out, expected, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [64, 100])
def test_gated(n, dtype):
    x = 3 * random(2, 2 * n, dtype=dtype)
    out, kept = inside_guards(torch.full((2, n), float("nan"), dtype=dtype))
    gated_kernel[(2, 2)](x, out, n, COLUMNS=64, PDL=False)
    assert kept()
    torch.testing.assert_close(out, gated(x), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 40, 99])
def test_attention(position, group, dtype):
    """Up to 100 tokens in blocks of 4 by 16 programs: some have none, one block, or two; the last one is ragged."""
    kv_heads, head_dim, max_length = 2, 16, 100
    cache = [random(kv_heads, max_length, head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    for tensor in cache:
        tensor[:, position:] = float("nan")  # not written yet
    angle = random(max_length, head_dim // 2, seed=3).repeat(1, 2)
    qkv = random(1, (group + 2) * kv_heads * head_dim, dtype=dtype, seed=4)
    partial, counters = new_scratch(group * kv_heads, kv_heads, head_dim, 4096, torch.device("cpu"))
    partial.fill_(float("nan"))
    length = torch.tensor([position], dtype=torch.int32)

    def state(keys, values):
        return AttentionState(
            keys=keys, values=values, cos=angle.cos(), sin=angle.sin(), length=length, partial=partial,
            counters=counters, scale=head_dim**-0.5,
        )  # fmt: skip

    expected_cache = [tensor.clone() for tensor in cache]
    expected = attend(qkv, state(*expected_cache))
    (keys, keys_kept), (values, values_kept) = (inside_guards(tensor) for tensor in cache)
    out, out_kept = inside_guards(torch.full_like(expected, float("nan")))
    attention_kernel[(kv_heads, 16)](
        qkv, angle.cos(), angle.sin(), keys, values, out, partial, counters, length, head_dim**-0.5, max_length,
        GROUP=group, ROWS=16, HEAD_DIM=head_dim, BLOCK=4, SPLITS=16, WIDE=True, PDL=False,
    )  # fmt: skip
    assert keys_kept()
    assert values_kept()
    assert out_kept()
    assert not counters.any()
    tolerance = 4 * ROUNDING[dtype]
    for found, wanted in ((keys, expected_cache[0]), (values, expected_cache[1]), (out, expected)):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=found is not out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [set(), {"scales"}, {"more", "bias"}, {"scales", "more", "bias"}])
def test_gather(options, dtype):
    values, more = random(3, 50, dtype=dtype), random(3, 50, dtype=dtype, seed=1)
    index = torch.randint(-1, 150, (2, 45), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    given = {"scales": random(2, 45, seed=3), "more": more, "bias": random(2, 45, seed=4)}
    given = {name: tensor for name, tensor in given.items() if name in options}
    out, kept = inside_guards(torch.full((2, 45), float("nan"), dtype=dtype))
    gather_kernel[(2,)](
        values, given.get("more"), index, given.get("scales"), given.get("bias"), out, 90, HAS_MORE="more" in options,
        HAS_SCALES="scales" in options, HAS_BIAS="bias" in options, COLUMNS=64, PDL=False,
    )  # fmt: skip
    assert kept()
    torch.testing.assert_close(out, gather(values, index, **given), rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("places", [(0,), (699,), (3, 4, 650), (127, 128), (256, 300)])
def test_pick(places, dtype):
    """Equal largest logits in one program or in several: the first one counts, as in torch."""
    logits = random(1, 700, dtype=dtype)
    logits[0, list(places)] = 9.0
    scratch, token = PickScratch.on(torch.device("cpu")), torch.zeros(1, 1, dtype=torch.long)
    for _ in range(2):
        pick_kernel[(4,)](
            logits, token, scratch.highest, scratch.places, scratch.counter, 700, COLUMNS=64, PROGRAMS=4, PDL=False
        )
        assert token.item() == places[0] == logits.argmax()
        assert not scratch.counter.any()
    logits = -logits.abs() - 1
    pick_kernel[(4,)](
        logits, token, scratch.highest, scratch.places, scratch.counter, 700, COLUMNS=64, PROGRAMS=4, PDL=False
    )
    assert token.item() == logits.argmax()
