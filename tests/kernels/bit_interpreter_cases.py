"""The bit products and the one-row kernel made of them in Triton's interpreter. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from interpreter_cases import check_sums, hold
from packed_weights import activations, integer_error, product_and_bound, random_weight, rounding

from quantkit.formats.grouped_int import pack
from quantkit.kernels import bit_gemv_triton
from quantkit.kernels.bit_gemv import BitGemvConfig, bit_gemv_launch, is_bit_weight
from quantkit.kernels.bit_products_triton import count_common, integer_bytes, plane_bits, transposed_bits
from quantkit.kernels.planar import to_planar

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
def transposing_kernel(source, target, T: tl.constexpr, LANES: tl.constexpr):
    t = tl.arange(0, T)
    words = transposed_bits((tl.load(source + t), tl.load(source + T + t)), t, 2, LANES, False)
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


@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_bits_change_places_with_lanes(lanes):
    source, target = random_words(3, 2, THREADS), torch.zeros(2, THREADS, dtype=torch.int32)
    transposing_kernel[(1,)](source, target, T=THREADS, LANES=lanes)
    shape = (2, THREADS // 32, 8 // lanes, lanes, 4, 4, 8 // lanes, lanes)  # word, warp, p, q, byte, b
    assert torch.equal(bits_of(target).view(shape), bits_of(source).view(shape).transpose(3, 7))


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


def run(weight, x, *, config=None, bias=None, out_dtype=torch.float32, copies=None):
    """The kernel between guard bands, the result filled with NaN before."""
    spec = weight.spec()
    assert is_bit_weight(spec)
    config = config or BitGemvConfig(rows=16)
    tensors = to_planar(spec, pack(weight))
    n_rows = len(x) if copies is None else 1
    out = torch.full((n_rows, spec.out_features), float("nan"), dtype=out_dtype)
    inner, check_bands = hold({"x": x, "out": out, **tensors})
    grid, arguments = bit_gemv_launch(inner["x"], spec, inner, bias, inner["out"], config, copies, config.rows)
    bit_gemv_triton.bit_gemv_kernel[grid](**arguments, ASM=False)
    check_bands("out")
    return inner["out"].clone()


def check(y, x, weight, bias=None):
    """x within its integers, everything else within the bound of float32 sums."""
    check_sums(y, x, weight, integer_error(x, weight), bias)


@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(
    ("group_size", "n_groups"), [(128, 15), (128, 9), (256, 7), (384, 2), (896, 2), (1024, 3), (1920, 1)]
)
def test_groups_of_every_size(group_size, n_groups, symmetric, dtype):
    """Also rows that end within a block or before the last warp's columns, and planes of every width."""
    weight = random_weight(n_groups, 13, group_size, (1,) * n_groups, symmetric)
    x = activations(n_groups, 1, group_size * n_groups, dtype=dtype)
    check(run(weight, x), x, weight)


@pytest.mark.parametrize(("group_size", "n_groups"), [(128, 8), (1024, 1)])
@pytest.mark.parametrize(
    ("n_rows", "n_tokens", "config"),
    [
        (35, 1, BitGemvConfig(rows=16, programs=1, ahead=1)),
        (84, 1, BitGemvConfig(rows=16, programs=2, ahead=3)),  # three tiles each, and a queue of three
        (70, 1, BitGemvConfig(rows=32)),
        (70, 3, BitGemvConfig(rows=32, programs=2, tokens=4, each=2)),
        (130, 2, BitGemvConfig(rows=16, programs=1, ahead=1, tokens=2, each=2)),  # more tiles than a program has slots
        (70, 1, BitGemvConfig(rows=64, programs=1, ahead=1)),
    ],
)
def test_tiles_of_rows_that_programs_share(n_rows, n_tokens, config, group_size, n_groups):
    weight = random_weight(3, n_rows, group_size, (1,) * n_groups)
    x = activations(3, n_tokens, 1024, dtype=torch.bfloat16)
    bias = torch.linspace(-1, 1, n_rows)
    check(run(weight, x, config=config, bias=bias), x, weight, bias)


def test_every_part_of_the_rows_takes_a_copy_of_its_own():
    weight = random_weight(3, 48, 1024, (1,))
    x, bias = activations(3, 3, 1024, dtype=torch.float16), torch.linspace(-1, 1, 48)
    y = run(weight, x, bias=bias, copies=torch.tensor([2, 0, 1], dtype=torch.int32))
    every = run(weight, x, bias=bias)
    assert torch.equal(y[0], torch.cat([every[2, :16], every[0, 16:32], every[1, 32:]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bias_and_output_dtype(dtype):
    weight = random_weight(6, 4, 1024, (1,))
    x, bias = activations(6, 2, 1024, dtype=torch.float16), torch.linspace(-1, 1, 4).to(torch.bfloat16)
    y = run(weight, x, bias=bias, out_dtype=dtype)
    lost = integer_error(x, weight) @ weight.dequantize().double().abs().t()
    product, bound = product_and_bound(x, weight, bias)
    bound = bound + lost
    truncation = 2 if dtype == torch.bfloat16 else 1  # the interpreter truncates to bfloat16 instead of rounding
    assert ((y.double() - product).abs() <= bound + truncation * rounding(product.abs() + bound, dtype)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, for what is not finite
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [128, 1024])
def test_extreme_values_of_x(group_size, dtype):
    """Zeros give exactly the bias; what is not finite is not finite in the result."""
    weight = random_weight(7, 3, group_size, (1,) * (1024 // group_size), False)
    bias = torch.linspace(-1, 1, 3)
    zeros = torch.zeros(1, 1024, dtype=dtype)
    assert torch.equal(run(weight, zeros, bias=bias)[0], bias)
    smallest = torch.full((1, 1024), torch.finfo(dtype).smallest_normal, dtype=dtype)
    check(run(weight, smallest), smallest, weight)
    largest = torch.full((1, 1024), torch.finfo(torch.float16).max, dtype=torch.float32).to(dtype)
    check(run(weight, largest), largest, weight)
    for value in (float("nan"), float("inf")):
        broken = zeros.clone()
        broken[0, 300] = value
        assert not run(weight, broken).isfinite().any()
