"""The bit products and the one-row kernel made of them in Triton's interpreter. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from quantkit.kernels.bit_products_triton import count_common, integer_bytes, plane_bits, transposed_bits

THREADS = 64


@triton.jit
def counting_kernel(planes, words, before, counts, T: tl.constexpr):
    t = tl.arange(0, T)
    start = (tl.load(before + t), tl.load(before + T + t), tl.load(before + 2 * T + t), tl.load(before + 3 * T + t))
    low, high = tl.load(planes + t), tl.load(planes + T + t)
    next_low, next_high = tl.load(planes + 2 * T + t), tl.load(planes + 3 * T + t)
    found = count_common(low, high, next_low, next_high, tl.load(words + t), tl.load(words + T + t), start, False)
    for index in tl.static_range(4):
        tl.store(counts + index * T + t, found[index])


@triton.jit
def transposing_kernel(source, target, T: tl.constexpr):
    t = tl.arange(0, T)
    words = transposed_bits((tl.load(source + t), tl.load(source + T + t)), t, 2, False)
    tl.store(target + t, words[0])
    tl.store(target + T + t, words[1])


@triton.jit
def integers_kernel(x, inverse, target, total, T: tl.constexpr, BF16: tl.constexpr):
    t = tl.arange(0, T)
    pairs = (tl.load(x + t), tl.load(x + T + t), tl.load(x + 2 * T + t), tl.load(x + 3 * T + t))
    low, high, added = integer_bytes(pairs, tl.load(inverse + t), 2, BF16, False)
    for index in tl.static_range(2):
        tl.store(target + index * T + t, low[index])
        tl.store(target + (2 + index) * T + t, high[index])
    tl.store(total + t, added)


@triton.jit
def rotating_kernel(source, turn, mask, target, T: tl.constexpr):
    t = tl.arange(0, T)
    tl.store(target + t, plane_bits(tl.load(source + t), tl.load(turn + t), tl.load(mask + t), False))


def random_words(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def bits_of(words: torch.Tensor) -> torch.Tensor:
    """int32 ``[...]`` to bool ``[..., 32]``, the lowest bit first."""
    return (words[..., None].long() >> torch.arange(32) & 1).bool()


def test_ones_that_planes_and_rows_have_in_common():
    """As the tensor core's instruction lays operands and results out: four lanes hold a row of 256 bits."""
    planes, words = random_words(0, 4, THREADS), random_words(1, 2, THREADS)
    before, counts = random_words(2, 4, THREADS) >> 8, torch.zeros(4, THREADS, dtype=torch.int32)
    counting_kernel[(1,)](planes, words, before, counts, T=THREADS)
    warps = THREADS // 32
    plane_rows = (
        bits_of(planes.view(2, 2, warps, 8, 4)).permute(1, 2, 3, 0, 4, 5).flatten(3)
    )  # [low or high, warp, g, :]
    word_rows = bits_of(words.view(2, warps, 8, 4)).permute(1, 2, 0, 3, 4).flatten(2)  # [warp, g, 256]
    common = torch.einsum("hwpk,wrk->hwpr", plane_rows.double(), word_rows.double()).to(torch.int32)
    expected = common.view(2, warps, 8, 4, 2).permute(0, 4, 1, 2, 3).reshape(4, THREADS)
    assert torch.equal(counts, before + expected)


def test_bits_change_places_with_lanes():
    source, target = random_words(3, 2, THREADS), torch.zeros(2, THREADS, dtype=torch.int32)
    transposing_kernel[(1,)](source, target, T=THREADS)
    before = bits_of(source).view(2, THREADS // 32, 8, 4, 4, 8)  # word, warp, p, q, byte, b
    assert torch.equal(bits_of(target).view(2, THREADS // 32, 8, 4, 4, 8), before.transpose(2, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_and_their_bytes(dtype):
    x = torch.randn(4, THREADS, 2, generator=torch.Generator().manual_seed(4)).to(dtype)
    inverse = (32512 / x.float().abs().amax((0, 2))).contiguous()
    target, total = torch.zeros(4, THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    integers_kernel[(1,)](
        x.view(torch.int32).squeeze(2), inverse, target, total, T=THREADS, BF16=dtype == torch.bfloat16
    )
    exact = x.double() * inverse.double()[:, None]
    integers = exact.round().long()
    assert ((exact - integers).abs() <= 0.5).all()
    assert torch.equal(total.long(), integers.sum((0, 2)))
    unsigned = integers % 2**16  # [byte * 2 + word, thread, half]
    order = unsigned.view(2, 2, THREADS, 2).permute(1, 2, 3, 0).flatten(2)  # word, thread, byte of the word
    found = target.view(torch.uint8).view(2, 2, THREADS, 4).long()
    assert torch.equal(found, torch.stack([order % 256, order // 256]))


def test_a_bit_of_each_byte_comes_to_the_lane_s_position():
    source, step, lane = random_words(5, THREADS), 3, torch.arange(THREADS) % 8
    turn = (torch.where(lane + step < 8, 32, 8) - step).to(torch.int32)
    mask = (0x01010101 << lane).to(torch.int64).view(torch.int32)[::2].contiguous()
    target = torch.zeros(THREADS, dtype=torch.int32)
    rotating_kernel[(1,)](source, turn, mask, target, T=THREADS)
    before = bits_of(source).view(THREADS, 4, 8)
    expected = torch.zeros(THREADS, 4, 8, dtype=torch.bool)
    for thread in range(THREADS):
        expected[thread, :, lane[thread]] = before[thread, :, (lane[thread] + step) % 8]
    assert torch.equal(bits_of(target).view(THREADS, 4, 8), expected)
