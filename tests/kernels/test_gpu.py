"""The kernels on a GPU at realistic shapes: correctness, determinism, CUDA graphs, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from packed_weights import (
    activations,
    half_error,
    integer_error,
    pair_error,
    product_and_bound,
    random_weight,
    rounding,
    slice_error,
)

from quantkit.formats.grouped_int import GroupedInt, pack
from quantkit.kernels.bit_gemv import BitGemvConfig, bit_gemv, bit_gemv_launch, is_bit_weight
from quantkit.kernels.few_rows import FewRowsConfig, choose_few_rows, few_rows, few_rows_launch, has_few_rows
from quantkit.kernels.gemv import GemvConfig, choose_gemv, gemv, gemv_launch, has_gemv
from quantkit.kernels.grouped_int import matmul
from quantkit.kernels.mixed_rows import (
    MixedConfig,
    cut_launch,
    has_mixed_rows,
    mixed_rows,
    new_ready,
)
from quantkit.kernels.mma_gemv import MmaGemvConfig, has_mma_gemv, mma_gemv_launch
from quantkit.kernels.planar import from_planar, to_planar
from quantkit.kernels.planar_product import (
    ProductConfig,
    choose_product,
    has_planar_product,
    planar_product,
    prepare_launch,
    product_launch,
    workspace,
)
from quantkit.kernels.wide_product import WideConfig, has_wide_product, is_wide_weight, wide_product
from quantkit.kernels.wide_product import is_possible as is_possible_wide

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

HALVES = [torch.float16, torch.bfloat16]
# The tensor core aligns products to the largest and truncates: at most two units in the last place per addition.
TENSOR_CORE = 2.0**-22


@pytest.fixture(autouse=True)
def nan_in_new_tensors() -> Iterator[None]:
    """torch.empty returns NaN, so an element that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(weight: GroupedInt) -> GroupedInt:
    return replace(
        weight, codes=weight.codes.cuda(), scales=weight.scales.cuda(), zeros=weight.zeros.cuda()
    )  # fmt: skip


def few_rows_error(x, weight):
    """What the kernel that `gemv` chooses loses of x."""
    if is_bit_weight(weight.spec()):
        return integer_error(x, weight)
    return pair_error(x, weight, 64) if has_mma_gemv(len(x), weight.spec()) else slice_error(x, weight)


def check(x, weight, tensors, bias=None):
    """Few tokens: float32 sums of exact products, of x in slices for one or two. More: the weight is rounded first."""
    y = matmul(x, weight.spec(), tensors, bias)
    dense = weight.dequantize().double()
    product, bound = product_and_bound(x, weight, bias, unit_roundoff=TENSOR_CORE)
    if has_few_rows(x, weight.spec()):
        lost = pair_error(x, weight, 32 * choose_few_rows(weight.spec()).loads)
        product, bound = product_and_bound(x, weight, bias)
        bound = 1.001 * bound + lost @ dense.abs().t()
    elif has_gemv(x, weight.spec()):
        product, bound = product_and_bound(x, weight, bias)
        bound = 1.001 * bound + few_rows_error(x, weight) @ dense.abs().t()
    elif has_mixed_rows(x, weight.spec()):
        product, bound = product_and_bound(x, weight, bias)
        bound = 1.001 * bound + slice_error(x, weight, chunks=True) @ dense.abs().t()
    elif has_wide_product(x, weight.spec()) or has_planar_product(x, weight.spec()):
        bound = bound + half_error(x) @ dense.abs().t()
    else:
        bound = bound + x.double().abs() @ rounding(dense, x.dtype).t()
    assert y.dtype == x.dtype
    assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, x.dtype)).all()
    return y


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_every_width_and_number_of_tokens(bits, symmetric):
    weight = on_gpu(random_weight(bits, 1000, 128, (bits,) * 33, symmetric))
    tensors = to_planar(weight.spec(), pack(weight))
    bias = torch.linspace(-1, 1, 1000, device="cuda")
    for dtype in HALVES:
        for m in (1, 2, 8, 9, 16, 17, 33, 64, 65, 200, 300):
            check(activations(m, m, 33 * 128, dtype=dtype).cuda(), weight, tensors, bias)
    assert not tensors["counters"].any()


@pytest.mark.parametrize(("out_features", "n_groups"), [(4096, 32), (1024, 112)])
@pytest.mark.parametrize("bits", [2, 4])
def test_real_layers(bits, out_features, n_groups):
    weight = on_gpu(random_weight(bits, out_features, 128, (bits,) * n_groups))
    tensors = to_planar(weight.spec(), pack(weight))
    for dtype in (*HALVES, torch.float32):
        for m in (1, 16, 64, 2048):
            check(activations(m, m, 128 * n_groups, dtype=dtype).cuda(), weight, tensors)


@pytest.mark.parametrize("bits", [(1, 2, 3, 2) * 8, (4, 2, 3) * 11, (6, 3, 5, 8, 7, 1, 2, 4) * 3])
@pytest.mark.parametrize("group_size", [32, 48, 128])
def test_mixed_widths(bits, group_size):
    weight = on_gpu(random_weight(1, 500, group_size, bits))
    tensors = to_planar(weight.spec(), pack(weight))
    for dtype in HALVES:
        for m in (1, 2, 8, 100):
            check(activations(m, m, group_size * len(bits), dtype=dtype).cuda(), weight, tensors)


@pytest.mark.parametrize("group_size", [32, 128])
def test_cut_rows_inline_ptx_equals_triton_operations_bit_for_bit(group_size):
    from quantkit.kernels.mixed_cut_triton import cut_kernel

    weight = on_gpu(random_weight(1, 8, group_size, (1, 2, 3, 4, 8) * 7))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    for dtype in HALVES:
        x = activations(0, 2, spec.in_features, dtype=dtype).cuda()
        results = []
        for asm in (True, False):
            ready = new_ready(2, spec, x.device)
            results += ready
            grid, arguments = cut_launch(x, spec, tensors, *ready)
            cut_kernel[grid](**arguments, ASM=asm)
        assert all(torch.equal(first, second) for first, second in zip(results[:2], results[2:], strict=True))


@pytest.mark.parametrize(("out_features", "in_features"), [(14336, 4096), (1000, 14336)])
def test_one_row_of_mixed_widths_in_every_shape_of_launch(out_features, in_features):
    """Deterministic, whatever ran before; each shape adds in an order of its own."""
    widths = (1, 2, 3, 2) * (in_features // 512)
    weight = on_gpu(random_weight(2, out_features, 128, widths))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    x = activations(0, 1, in_features, dtype=torch.bfloat16).cuda()
    product, bound = product_and_bound(x, weight)
    bound = 1.001 * bound + slice_error(x, weight, chunks=True) @ weight.dequantize().double().abs().t()
    for warps, own, ahead in ((2, 4, False), (4, 2, False), (8, 4, True), (16, 2, True)):
        config = MixedConfig(warps=warps, own=own, ahead=ahead)
        first = mixed_rows(x, spec, tensors, None, torch.float32, config)
        assert ((first.double() - product).abs() <= bound + rounding(product.abs() + bound, first.dtype)).all()
        assert torch.equal(first, mixed_rows(x, spec, tensors, None, torch.float32, config))


def test_group_sizes_without_planar_form():
    weight = on_gpu(random_weight(1, 500, 24, (4, 3, 1) * 7))
    tensors = to_planar(weight.spec(), pack(weight))
    x = activations(0, 5, 24 * 21).cuda()
    y = matmul(x, weight.spec(), tensors)
    product, bound = product_and_bound(x, weight)
    assert ((y.double() - product).abs() <= bound + rounding(product, x.dtype)).all()


def test_stored_bytes_come_back_from_the_gpu():
    weight = on_gpu(random_weight(1, 500, 64, (4, 3, 1, 2, 8, 6) * 4))
    tensors = pack(weight)
    restored = from_planar(weight.spec(), to_planar(weight.spec(), tensors))
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_one_row_inline_ptx_equals_triton_operations_bit_for_bit(bits, symmetric):
    from quantkit.kernels import gemv_triton

    weight = on_gpu(random_weight(bits, 200, 128, (bits,) * 33, symmetric))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    for dtype in HALVES:
        x = activations(0, 1, 33 * 128, dtype=dtype).cuda()
        results = []
        for asm in (True, False):
            out = torch.full((1, 200), float("nan"), device="cuda")
            name, grid, arguments = gemv_launch(x, spec, tensors, None, out, choose_gemv(spec))
            getattr(gemv_triton, name)[grid](**arguments, ASM=asm)
            results.append(out)
        assert torch.equal(*results)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_one_row_on_the_tensor_core_bit_for_bit(bits, symmetric):
    """Inline PTX and Triton operations, in every shape of launch: the same numbers."""
    from quantkit.kernels.mma_gemv_triton import mma_gemv_kernel

    for columns in (4096, 5120):
        weight = on_gpu(random_weight(bits, 1000, 128, (bits,) * (columns // 128), symmetric))
        spec, tensors = weight.spec(), to_planar(weight.spec(), pack(weight))
        for dtype in HALVES:
            x = activations(0, 2, columns, dtype=dtype).cuda()
            results = []
            for asm, rows, programs in ((True, 16, 5), (True, 32, 40), (False, 16, 30)):
                out = torch.full((2, 1000), float("nan"), device="cuda")
                config = MmaGemvConfig(warps=8, rows=rows, programs=programs)
                grid, arguments = mma_gemv_launch(x, spec, tensors, None, out, config)
                mma_gemv_kernel[grid](**arguments, ASM=asm)
                results.append(out)
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
            product, bound = product_and_bound(x, weight)
            bound = 1.001 * bound + pair_error(x, weight, 64) @ weight.dequantize().double().abs().t()
            assert ((results[0].double() - product).abs() <= bound).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_one_row_in_every_shape_of_launch(bits):
    weight = on_gpu(random_weight(bits, 1000, 128, (bits,) * 32))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    x = activations(0, 1, 4096, dtype=torch.bfloat16).cuda()
    product, bound = product_and_bound(x, weight)
    bound = 1.001 * bound + slice_error(x, weight) @ weight.dequantize().double().abs().t()
    for warps, rows in ((1, 8), (2, 4), (4, 16), (8, 8)):
        for programs in (None, 1, 60, 200) if warps >= bits else (None,):
            y = gemv(x, spec, tensors, None, torch.float32, GemvConfig(warps=warps, rows=rows, programs=programs))
            assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, y.dtype)).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_inline_ptx_equals_triton_operations_bit_for_bit(bits):
    from quantkit.kernels.planar_product_triton import prepare_kernel, product_kernel

    weight = on_gpu(random_weight(bits, 256, 128, (bits,) * 32))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    config = choose_product(3, spec)
    x = activations(0, 3, 4096, dtype=torch.float16).cuda()
    results = []
    for asm in (True, False):
        out = torch.full((3, 256), float("nan"), device="cuda")
        prepared, partial = workspace(3, spec, config, x.device)
        grid, arguments = prepare_launch(x, spec, tensors, prepared)
        prepare_kernel[grid](**arguments)
        grid, arguments = product_launch(spec, tensors, None, out, prepared, partial, config)
        product_kernel[grid](**arguments, ASM=asm)
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("m", [1, 16, 64, 100])
@pytest.mark.parametrize("bits", [(2,) * 32, (4,) * 32, (1, 2, 3, 2) * 8])
def test_the_same_call_gives_the_same_bits(bits, m):
    weight = on_gpu(random_weight(1, 1024, 128, bits))
    tensors = to_planar(weight.spec(), pack(weight))
    x = activations(0, m, 4096, dtype=torch.bfloat16).cuda()
    first = matmul(x, weight.spec(), tensors)
    load = torch.randn(2048, 2048, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(side):  # other work on the device changes the order in which programs arrive
            load @ load
        assert torch.equal(matmul(x, weight.spec(), tensors), first)


@pytest.mark.parametrize("m", [1, 16, 100])
@pytest.mark.parametrize("bits", [(4,) * 32, (3, 2) * 16])
def test_a_cuda_graph_replays_the_eager_result(bits, m):
    weight = on_gpu(random_weight(1, 1024, 128, bits))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    x = activations(0, m, 4096, dtype=torch.bfloat16).cuda()
    matmul(x, spec, tensors)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(matmul(x, spec, tensors).repeat(1, 4), spec, tensors)
    for seed in range(20):
        x.copy_(activations(seed, m, 4096, dtype=torch.bfloat16))
        graph.replay()
        eager = matmul(matmul(x, spec, tensors).repeat(1, 4), spec, tensors)
        assert torch.equal(y, eager)


@pytest.mark.filterwarnings("default")  # the compiler's own deprecation warnings
def test_torch_compile_keeps_one_graph():
    weight = on_gpu(random_weight(1, 256, 128, (4,) * 2))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    compiled = torch.compile(lambda x: matmul(x * 2, spec, tensors).relu(), fullgraph=True)
    for m in (1, 5, 100):
        x = activations(m, m, 256, dtype=torch.bfloat16).cuda()
        assert torch.equal(compiled(x), matmul(x * 2, spec, tensors).relu())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("rows", "warps"), [(16, 1), (32, 2), (64, 2), (64, 4)])
def test_any_launch_shape(rows, warps, bits):
    weight = on_gpu(random_weight(1, 200, 64, (bits,) * 40))
    spec = weight.spec()
    tensors = to_planar(spec, pack(weight))
    x = activations(0, 20, 2560, dtype=torch.float16).cuda()
    product, bound = product_and_bound(x, weight, unit_roundoff=TENSOR_CORE)
    bound = bound + half_error(x) @ weight.dequantize().double().abs().t()
    for tokens, splits in ((8, 1), (16, 3), (32, 100)):
        in_loop = tokens == 16
        config = ProductConfig(rows=rows, warps=warps, tokens=tokens, stages=2, splits=splits, zeros_in_loop=in_loop)
        out = planar_product(x, spec, tensors, None, torch.float32, config)
        assert ((out.double() - product).abs() <= bound + rounding(product, torch.float32)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "warps", "splits"), [(1, 4, 2), (2, 8, 1), (4, 16, 1), (4, 4, 4), (8, 16, 2)])
def test_few_rows(bits, warps, splits, symmetric):
    """Inline PTX and Triton's operations alike bit for bit, and the bound of sums of x in slices."""
    from quantkit.kernels.few_rows_triton import few_rows_kernel

    weight = on_gpu(random_weight(bits, 1000, 128, (bits,) * 32, symmetric))
    spec, tensors = weight.spec(), to_planar(weight.spec(), pack(weight))
    loads = choose_few_rows(spec).loads
    for m, tiles, programs in ((8, 2, 132), (5, 1, 7)):
        config = FewRowsConfig(warps=warps, loads=loads, tiles=tiles, programs=programs, splits=splits)
        x = activations(m, m, 4096, dtype=torch.bfloat16).cuda()
        y = few_rows(x, spec, tensors, None, torch.float32, config)
        product, bound = product_and_bound(x, weight)
        bound = 1.001 * bound + pair_error(x, weight, 32 * loads) @ weight.dequantize().double().abs().t()
        assert ((y.double() - product).abs() <= bound + rounding(product, torch.float32)).all()
        if m == 5 and symmetric and splits == 1:  # without PTX these kernels take long to compile
            plain = torch.full_like(y, float("nan"))
            grid, arguments = few_rows_launch(x, spec, tensors, None, plain, config)
            few_rows_kernel[grid](**arguments, ASM=False)
            assert torch.equal(y, plain)
    assert not tensors["counters"].any()


@pytest.mark.parametrize(
    ("group_size", "n_groups", "bits", "symmetric"),
    [(128, 32, 4, True), (128, 32, 4, False), (384, 11, 2, False), (2048, 1, 2, True), (128, 33, 8, False)],
)
def test_asynchronous_products(group_size, n_groups, bits, symmetric):
    weight = on_gpu(random_weight(bits, 1000, group_size, (bits,) * n_groups, symmetric))
    spec = weight.spec()
    assert is_wide_weight(spec)
    tensors = to_planar(spec, pack(weight))
    x = activations(0, 100, spec.in_features, dtype=torch.bfloat16).cuda()
    bias = torch.randn(100, 1000, device="cuda")
    product, bound = product_and_bound(x, weight, bias, unit_roundoff=TENSOR_CORE)
    bound = bound + half_error(x) @ weight.dequantize().double().abs().t()
    shapes = [(64, 32, 4, 3), (128, 64, 3, 2), (128, 128, 2, 1), (64, 16, 4, 100)]
    for rows, tokens, distance, splits in shapes:
        config = WideConfig(rows=rows, tokens=tokens, distance=distance, splits=splits)
        if not is_possible_wide(config, spec):
            continue
        first, second = (wide_product(x, spec, tensors, bias, torch.float32, config) for _ in range(2))
        assert torch.equal(first, second)
        assert ((first.double() - product).abs() <= bound + rounding(product, torch.float32)).all()
    assert not tensors["counters"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "n_groups"), [(128, 32), (128, 63), (896, 2), (1024, 3), (14336, 1)])
def test_bit_products(group_size, n_groups, symmetric, dtype):
    weight = on_gpu(random_weight(n_groups, 1000, group_size, (1,) * n_groups, symmetric))
    spec = weight.spec()
    tensors, bias = to_planar(spec, pack(weight)), torch.linspace(-1, 1, 1000, device="cuda")
    for m, out_dtype in ((1, dtype), (2, dtype), (3, torch.float32)):
        x = activations(m, m, spec.in_features, dtype=dtype).cuda()
        product, bound = product_and_bound(x, weight, bias)
        bound = 1.001 * bound + integer_error(x, weight) @ weight.dequantize().double().abs().t()
        y = torch.full((m, 1000), float("nan"), dtype=out_dtype, device="cuda")
        bit_gemv(x, spec, tensors, bias, y)
        assert ((y.double() - product).abs() <= bound + rounding(product.abs() + bound, out_dtype)).all()


@pytest.mark.parametrize("group_size", [128, 4096])
@pytest.mark.parametrize(
    "config",
    [
        BitGemvConfig(rows=16, registers=128),
        BitGemvConfig(rows=32, programs=3, ahead=1),
        BitGemvConfig(rows=16, programs=1, ahead=1, tokens=4, each=2),
    ],
)
def test_bit_products_inline_ptx_equals_triton_operations_bit_for_bit(config, group_size):
    from quantkit.kernels.bit_gemv_triton import bit_gemv_kernel

    weight = on_gpu(random_weight(1, 200, group_size, (1,) * (4096 // group_size)))
    spec = weight.spec()
    tensors, x = to_planar(spec, pack(weight)), activations(0, config.tokens, 4096, dtype=torch.bfloat16).cuda()
    results = []
    for asm in (True, False):
        out = torch.full((config.tokens, 200), float("nan"), device="cuda")
        grid, arguments = bit_gemv_launch(x, spec, tensors, None, out, config)
        bit_gemv_kernel[grid](**arguments, ASM=asm)
        results.append(out)
    assert torch.equal(*results)
