"""Compiles the kernels for an H100/H200 (sm_90) without a GPU and reads the machine code.

Catches what the interpreter accepts and the compiler does not, and the ways in which a kernel gets slow silently:
registers spilled to memory, weights loaded two bytes at a time, products that miss the tensor core.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
import torch

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.sign_salient import SignSalientSpec
from quantkit.kernels.bit_gemv import BitGemvConfig, bit_gemv_launch
from quantkit.kernels.few_rows import choose_few_rows, few_rows_launch
from quantkit.kernels.gemv import choose_gemv, gemv_launch
from quantkit.kernels.mixed_rows import choose_mixed_rows, cut_launch, new_ready, rows_launch
from quantkit.kernels.mma_gemv import choose_mma_gemv, mma_gemv_launch
from quantkit.kernels.planar import to_planar
from quantkit.kernels.planar_matmul import dequantize_launches
from quantkit.kernels.planar_product import choose_product, prepare_launch, product_launch, workspace
from quantkit.kernels.sign_planar import salient_to_planar
from quantkit.kernels.sign_salient import few_rows_parts
from quantkit.kernels.wide_product import choose_wide, shared_memory, wide_launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton was imported as interpreter"),
]
SHARED_LIMIT = 232448  # bytes of one sm_90 block
SPILL_LIMIT = {
    1: 96,
    8: 96,
    16: 96,
    32: 96,
    64: 192,
}  # bytes per thread by tokens; Triton 3.6 and 3.9 differ, 3.9 spills most
WIDTHS = [1, 2, 3, 4, 8]


def layer(counts: dict[int, int], symmetric: bool, group_size: int = 128, out_features: int = 192):
    spec = GroupedIntSpec(
        out_features=out_features,
        in_features=group_size * sum(counts.values()),
        group_size=group_size,
        segments=tuple(counts.items()),
        symmetric=symmetric,
    )
    stored = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.tensor_layout().items()}
    return spec, to_planar(spec, stored)


def check_product(compile_kernel, spec, tensors, m, dtype):
    from quantkit.kernels import planar_product_triton

    config = choose_product(m, spec)
    x, out = torch.zeros(m, spec.in_features, dtype=dtype), torch.zeros(m, spec.out_features, dtype=dtype)
    prepared, partial = workspace(m, spec, config, x.device)
    early = {"PDL": True, "launch_pdl": True}
    tokens, arguments = prepare_launch(x, spec, tensors, prepared)
    _, sass, resources = compile_kernel(planar_product_triton.prepare_kernel, tokens, arguments, **early)
    assert resources["LOCAL"] == resources["STACK"] == 0
    assert "LDG.E.128" in sass or "LDG.E.64" in sass
    grid, arguments = product_launch(spec, tensors, None, out, prepared, partial, config)
    metadata, sass, resources = compile_kernel(planar_product_triton.product_kernel, grid, arguments, ASM=True, **early)
    assert metadata.shared <= SHARED_LIMIT
    assert resources["STACK"] <= SPILL_LIMIT[m]
    assert re.search(r"\bHG?MMA\.", sass)
    assert "LDGSTS.E.BYPASS.128" in sass  # weights and x: asynchronous copies of 16 bytes
    assert not re.search(r"LDGSTS\.E\.U?(8|16) ", sass)


@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.float16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_few_tokens(compile_for_sm90, bits, dtype, symmetric):
    check_product(compile_for_sm90, *layer({bits: 32}, symmetric), 8, dtype)


@pytest.mark.parametrize(
    ("bits", "symmetric", "programs"),
    [(1, True, None), (1, True, 20), (2, True, None), (2, True, 20), (3, False, 20), (4, False, None), (4, False, 20)],
)
def test_one_row(compile_for_sm90, bits, symmetric, programs):
    """Sixteen bytes a load, all of them before the first product; registers hold them."""
    from quantkit.kernels import gemv_triton

    spec, tensors = layer({bits: 32}, symmetric)
    x, out = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(1, 192, dtype=torch.bfloat16)
    config = replace(choose_gemv(spec), programs=programs)
    name, grid, arguments = gemv_launch(x, spec, tensors, None, out, config)
    early = {"PDL": True, "launch_pdl": True}
    _, sass, resources = compile_for_sm90(getattr(gemv_triton, name), grid, arguments, ASM=True, **early)
    assert resources["STACK"] <= SPILL_LIMIT[1]
    assert "IDP.4A" in sass
    wanted = config.rows * (3 if bits == 3 else 1) * (1 if programs is None else 2)  # words of a tile, and of the next
    assert len(re.findall(r"LDG\.E\.EF\.128", sass)) >= wanted
    assert not re.search(r"LDG\.E\.EF(\.64|\.U?8|\.U?16)? ", sass)
    assert sass.index("LDG.E.EF.128") < sass.index("ACQBULK")  # weights are asked for before x is waited for


@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (4, True)])
def test_one_row_on_the_tensor_core(compile_for_sm90, bits, symmetric):
    """Words as they are loaded, one AND each, before x is waited for; room for two programs of eight warps."""
    from quantkit.kernels.mma_gemv_triton import mma_gemv_kernel

    spec, tensors = layer({bits: 32}, symmetric)
    x, out = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(1, 192, dtype=torch.bfloat16)
    config = choose_mma_gemv(spec, 4)
    grid, arguments = mma_gemv_launch(x, spec, tensors, None, out, config)
    early = {"PDL": True, "launch_pdl": True}
    _, sass, resources = compile_for_sm90(mma_gemv_kernel, grid, arguments, ASM=True, **early)
    assert resources["STACK"] == 0
    assert resources["REG"] <= 128
    loads = 4 * config.rows // 16 * bits // 2  # of a tile; the next one's are in the loop
    assert len(re.findall(r"IMMA\.16832\.U8\.S8", sass)) == 16 * config.rows // 16
    assert len(re.findall(r"LDG\.E\.EF\.128", sass)) == 2 * loads
    assert not re.search(r"LDG\.E\.EF(\.64|\.U?8|\.U?16)? ", sass)
    assert sass.index("LDG.E.EF.128") < sass.index("ACQBULK")


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_row_of_signs_with_copies(compile_for_sm90, symmetric):
    """One group per row, as the stacks of the sign formats have it."""
    from quantkit.kernels import gemv_triton

    spec, tensors = layer({1: 1}, symmetric, group_size=4096)
    x, out = torch.zeros(3, 4096, dtype=torch.bfloat16), torch.zeros(1, 192, dtype=torch.bfloat16)
    copies = torch.zeros(12, dtype=torch.int32)
    name, grid, arguments = gemv_launch(x, spec, tensors, out[0], out, choose_gemv(spec), copies)
    assert grid[1] == 1
    options = {"ASM": True, "PDL": True, "launch_pdl": True}
    _, sass, resources = compile_for_sm90(getattr(gemv_triton, name), grid, arguments, **options)
    assert resources["STACK"] <= SPILL_LIMIT[1]
    assert "IDP.4A" in sass


@pytest.mark.parametrize("group_size", [128, 4096])
@pytest.mark.parametrize("programs", [None, 2])
@pytest.mark.parametrize(("symmetric", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_bit_products(compile_for_sm90, symmetric, dtype, programs, group_size):
    """Words sixteen bytes at a time, the first before x is waited for; subnormal counts are kept."""
    from quantkit.kernels.bit_gemv_triton import bit_gemv_kernel

    spec, tensors = layer({1: 4096 // group_size}, symmetric, group_size)
    x, out = torch.zeros(1, 4096, dtype=dtype), torch.zeros(1, 192, dtype=dtype)
    config = BitGemvConfig(rows=16, programs=programs, ahead=1)
    grid, arguments = bit_gemv_launch(x, spec, tensors, None, out, config)
    early = {"PDL": True, "launch_pdl": True}
    _, sass, resources = compile_for_sm90(bit_gemv_kernel, grid, arguments, ASM=True, **early)
    assert resources["STACK"] == 0
    steps = {(128, torch.bfloat16): 3, (128, torch.float16): 4}.get((group_size, dtype), 1)  # groups: bits / 4
    tiles = 1 if programs is None else 2  # of a turn
    assert sass.count("BMMA.168256.AND.POPC") == tiles * 4 * config.rows // 8 * steps
    assert "FFMA.FTZ" not in sass
    assert len(re.findall(r"LDG\.E\.EF\.128", sass)) == config.rows // 4 * (1 if programs is None else 3)
    assert not re.search(r"LDG\.E\.EF(\.64|\.U?8|\.U?16)? ", sass)
    assert sass.index("LDG.E.EF.128") < sass.index("ACQBULK")


def first_readers(sass: str, load: str) -> list[str]:
    """Of each such load in the longest loop: the instruction that reads its 16 bytes first, maybe one turn later."""
    code = {int(at, 16): line for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([^;]*);", sass)}
    jumps = [(at, int(found[1], 16)) for at, line in code.items() if (found := re.search(r"BRA (0x[0-9a-f]+)", line))]
    last, first = max(jumps, key=lambda jump: jump[0] - jump[1])
    loop = [(*line.split(None, 1), "")[:2] for at, line in code.items() if first <= at <= last]
    readers = []
    for index, line in enumerate(loop):
        if line[0] == load:
            start = int(re.match(r"R(\d+)", line[1])[1])
            later = loop[index + 1 :] + loop[: index + 1]
            reads = (name for name, rest in later if reading(name, rest) & set(range(start, start + 4)))
            readers.append(next(reads).split(".")[0])
    return readers


def reading(name: str, operands: str) -> set[int]:
    """Registers that an instruction of SASS reads; of bit products A (four), B (two) and C (four)."""
    sources = operands.split(",")[0 if name.startswith("ST") else 1 :]
    widths = (4, 2, 4) if name.startswith("BMMA") else (2 if ".64" in operands else 1,) * len(sources)
    found: set[int] = set()
    for source, width in zip(sources, widths, strict=False):
        for number in re.findall(r"\bR(\d+)", source):
            found |= set(range(int(number), int(number) + width))
    return found


def test_words_of_bits_stay_where_they_are_loaded(compile_for_sm90):
    """A word that is moved to another register is waited for there, long before it is multiplied."""
    from quantkit.kernels.bit_gemv_triton import bit_gemv_kernel

    spec, tensors = layer({1: 32}, True)
    x, out = torch.zeros(1, 4096, dtype=torch.bfloat16), torch.zeros(1, 192, dtype=torch.bfloat16)
    config = BitGemvConfig(rows=16, programs=2, ahead=1)
    grid, arguments = bit_gemv_launch(x, spec, tensors, None, out, config)
    _, sass, _ = compile_for_sm90(bit_gemv_kernel, grid, arguments, ASM=True, PDL=True, launch_pdl=True)
    assert first_readers(sass, "LDG.E.EF.128") == ["BMMA"] * 8


@pytest.mark.parametrize("m", [16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3])
def test_more_tokens(compile_for_sm90, bits, m):
    check_product(compile_for_sm90, *layer({bits: 32}, False), m, torch.bfloat16)


@pytest.mark.parametrize(("bits", "symmetric"), [(1, True), (2, True), (4, True), (4, False), (8, False)])
def test_few_rows(compile_for_sm90, bits, symmetric):
    """Words before x is waited for; nothing in the loop makes warps wait for each other; registers hold x."""
    from quantkit.kernels.few_rows_triton import few_rows_kernel

    spec, tensors = layer({bits: 32}, symmetric)
    x, out = torch.zeros(8, 4096, dtype=torch.bfloat16), torch.zeros(8, 192, dtype=torch.bfloat16)
    config = replace(choose_few_rows(spec), tiles=2, programs=4)
    grid, arguments = few_rows_launch(x, spec, tensors, None, out, config)
    options = {"ASM": True, "PDL": True, "launch_pdl": True}
    _, sass, resources = compile_for_sm90(few_rows_kernel, grid, arguments, **options)
    assert resources["STACK"] == 0
    products = (config.tiles + 1) * config.loads * 2 * max(1, 8 // bits)  # of tiles, and of ones
    assert sass.count("IMMA.16832.S8.U8") == products
    assert len(re.findall(r"LDG\.E\.EF\.128", sass)) == 2 * config.tiles * config.loads
    assert not re.search(r"LDG\.E\.EF(\.64|\.U?8|\.U?16)? ", sass)
    assert sass.index("LDG.E.EF.128") < sass.index("ACQBULK")
    loop = sass[sass.index("ACQBULK") : sass.rindex("IMMA.16832")]
    assert "BAR.SYNC" not in loop
    assert re.search(r"STG\.E\.(64|128)", sass)


@pytest.mark.parametrize("m", [16, 32, 64, 128])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (4, True), (4, False), (8, False)])
def test_wide_products(compile_for_sm90, bits, symmetric, m):
    """While two products are under way the threads do something else: the assembler did not put them in a row."""
    from quantkit.kernels.wide_product_gluon import wide_product_kernel

    spec, tensors = layer({bits: 32}, symmetric, out_features=14336)
    config = choose_wide(m, spec)
    assert (config.tokens, config.splits) == (m, 1)
    out = torch.zeros(m, spec.out_features, dtype=torch.bfloat16)
    prepared, _ = workspace(m, spec, choose_product(m, spec), out.device)
    grid, arguments = wide_launch(spec, tensors, None, out, prepared, config)
    early = {"PDL": True, "launch_pdl": True}
    metadata, sass, resources = compile_for_sm90(wide_product_kernel, grid, arguments, **early)
    assert metadata.shared == shared_memory(config, spec)
    assert resources["STACK"] <= SPILL_LIMIT[64]
    chains = config.unroll * 8 // bits
    assert len(re.findall(r"HGMMA\.64x(16|32|64|128)x16\.F32", sass)) == 8 * chains
    assert sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x2") == (chains - 1 if m <= 64 else 0)
    assert sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x0") == (1 if m <= 64 else chains)
    assert "LDGSTS.E.BYPASS.128" in sass
    assert not re.search(r"LDGSTS\.E\.U?(8|16) ", sass)


def test_mixed_widths(compile_for_sm90):
    check_product(compile_for_sm90, *layer({2: 7, 3: 17, 4: 8}, True), 8, torch.bfloat16)


def test_all_widths_in_groups_that_no_pair_of_planes_divides(compile_for_sm90):
    check_product(compile_for_sm90, *layer({1: 3, 2: 3, 3: 3, 4: 3, 8: 3}, False, 48), 8, torch.float16)


@pytest.mark.parametrize(
    ("counts", "out_features", "in_flight"),
    [({1: 8, 2: 16, 3: 8}, 14336, 32), ({2: 8, 3: 16, 4: 8}, 14336, 24), ({1: 28, 2: 56, 3: 28}, 4096, 32)],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_one_row_of_mixed_widths(compile_for_sm90, counts, out_features, in_flight, symmetric):
    """Sixteen bytes a load, all of them before x is waited for, in registers; products by the tensor core."""
    from quantkit.kernels.mixed_cut_triton import cut_kernel
    from quantkit.kernels.mixed_rows_triton import mixed_rows_kernel

    spec, tensors = layer(counts, symmetric)
    config = choose_mixed_rows(replace(spec, out_features=out_features))
    x, out = torch.zeros(1, spec.in_features, dtype=torch.bfloat16), torch.zeros(1, 192, dtype=torch.bfloat16)
    ready = new_ready(1, spec, x.device)
    early = {"ASM": True, "PDL": True, "launch_pdl": True}
    grid, arguments = cut_launch(x, spec, tensors, *ready)
    _, sass, resources = compile_for_sm90(cut_kernel, grid, arguments, **early)
    assert resources["LOCAL"] == resources["STACK"] == 0
    assert "BAR.SYNC" not in sass  # one warp
    tiles, arguments = rows_launch(*ready, spec, tensors, None, out, config)
    _, sass, resources = compile_for_sm90(mixed_rows_kernel, tiles, arguments, **early)
    assert resources["STACK"] == 0
    assert "IMMA.16832.U8.S8" in sass
    assert "IDP.4A" not in sass
    assert len(re.findall(r"LDG\.E\.EF\.128", sass)) == in_flight
    assert not re.search(r"LDG\.E\.EF(\.64|\.U?8|\.U?16)? ", sass)
    assert sass.rindex("LDG.E.EF.128") < sass.index("ACQBULK")


@pytest.mark.parametrize("bits", [3, 4])
def test_dequantize(compile_for_sm90, bits):
    from quantkit.kernels.grouped_int_triton import dequantize_kernel

    spec, tensors = layer({bits: 32}, False)
    out = torch.zeros(spec.out_features, spec.in_features, dtype=torch.bfloat16)
    for grid, arguments in dequantize_launches(spec, tensors, 0, out):
        _, sass, resources = compile_for_sm90(dequantize_kernel, grid, arguments, ASM=True)
        assert resources["LOCAL"] == resources["STACK"] == 0
        assert "STG.E.64" in sass  # eight bytes a thread are faster than sixteen of fewer threads
        assert not re.search(r"STG\.E(\.U?(8|16))? ", sass)


@pytest.mark.parametrize("row_means", [False, True])
def test_signs_and_salient_columns(compile_for_sm90, row_means):
    salient = GroupedIntSpec(out_features=192, in_features=768, group_size=128, segments=((4, 6),), symmetric=False)
    shape = {"out_features": 192, "in_features": 4096}
    spec = SignSalientSpec(**shape, row_means=row_means, column_scales=True, salient=salient)
    stored = {name: torch.zeros(size, dtype=kind) for name, (kind, size) in spec.tensor_layout().items()}
    stored["salient_columns"][:96] = 255
    for part, _, tensors in few_rows_parts(spec, salient_to_planar(spec, stored)):
        check_product(compile_for_sm90, part, tensors, 16, torch.bfloat16)


@pytest.mark.parametrize("ordered", [False, True])
def test_activations_and_latents(compile_for_sm90, ordered):
    from quantkit.kernels.signs_triton import latent_kernel, prepare_kernel

    half = torch.zeros(1, 4096, dtype=torch.bfloat16)
    scales, order = torch.zeros(2, 4096), torch.zeros(4096, dtype=torch.int32)
    prepare = {"x": half, "order": order, "scales": scales, "out": half, "n_tokens": 1, "n_columns": 4096}
    prepare |= {"n_out": 4096, "ORDERED": ordered, "COLUMNS": 1024, "num_warps": 4}
    latent = {"z": scales, "scales": scales, "out": half, "n_tokens": 1, "n_latents": 4096, "span": 2048}
    latent |= {"COLUMNS": 256, "num_warps": 4}
    for kernel, arguments in ((prepare_kernel, prepare), (latent_kernel, latent)):
        _, sass, resources = compile_for_sm90(kernel, (2, 4), arguments)
        assert resources["LOCAL"] == resources["STACK"] == 0
        assert "STG.E" in sass
