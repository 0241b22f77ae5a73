"""Gluon kernel for 17 and more rows of x on planar-16 words (planar.py), on an H100 or H200: asynchronous products.

Like planar_product_triton.py, whose `prepare_kernel` makes x ready: weights are the first operand, products are exact
and summed in float32, the power of two that comes with an operand goes into the group scale. What Triton's own pipeline
does not do is written out here: a warp hands the products of one chain (the two planes of a group that share a bit
position) to the tensor core, and decodes the next or scales the one before meanwhile. A field minus its zero is a
float16 subnormal, exactly, after one AND and one subtraction, so no sums of x are needed.

There is no interpreter for Gluon: what runs without a GPU is the compiler (tests/kernels/test_ahead_of_time.py).
"""


# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment, misc"
# mypy: disable-error-code="var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton 3.6 has these under other names.
copy_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.constexpr_function
def _operand_asm(bits, field, zero):
    """PTX for two words: the field minus its zero (an operand where it is None), times 2**(position - 24)."""
    position, shift = field // 2 * bits, field % 2 * 8
    mask, offset = (1 << bits) - 1 << position, 0 if zero is None else int(zero) << position
    shifted = f"shr.u32 t,$1,{shift};" if shift else "mov.b32 t,$1;"
    minus = "mov.b32 z,$2;" if zero is None else f"mov.b32 z,0x{offset << 16 | offset:08x};"
    return f"{{.reg .b32 t,z; {shifted} and.b32 t,t,0x{mask << 16 | mask:08x}; {minus} sub.f16x2 $0,t,z;}}"


@gluon.jit
def _operand(packed, zeros, BITS: gl.constexpr, FIELD: gl.constexpr, ZERO: gl.constexpr):
    """float16 [ROWS, WIDTH]; ``zeros`` [ROWS]: where ZERO is None."""
    TEXT: gl.constexpr = _operand_asm(BITS, FIELD, ZERO)
    if ZERO is None:
        offset = (zeros.to(gl.int16) << (FIELD // 2 * BITS))[:, None]
        return gl.inline_asm_elementwise(TEXT, "=r,r,r", [packed, offset], dtype=gl.float16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise(TEXT, "=r,r", [packed], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _lines(
    numbers, first_group, last_group, stride, first_row, GROUPS: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr
):
    """Scales or zeros of the rows of a program, [GROUPS, ROWS], on their way to shared memory."""
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    lines = gl.allocate_shared_memory(numbers.dtype.element_ty, [GROUPS * ROWS], shared)
    index = gl.arange(0, GROUPS * ROWS, layout)
    group = gl.minimum(first_group + index // ROWS, last_group)
    copy_to_shared(lines, numbers + group * stride + first_row + index % ROWS)
    if REINTERPRET:
        return lines.reinterpret(numbers.dtype.element_ty, [GROUPS, ROWS], shared)
    else:
        return lines._reinterpret(numbers.dtype.element_ty, [GROUPS, ROWS], shared)


@gluon.jit
def _copy_tile(buffer, rows, column, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Columns from ``column`` on of the rows that ``rows`` are pointers of, 16 bytes for each thread."""
    threads: gl.constexpr = COLUMNS // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // threads, threads], [WARPS, 1], [1, 0])
    inner = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    row = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    copy_to_shared(buffer, row[:, None] + (column + inner)[None, :])


@gluon.jit
def wide_product_kernel(
    x, words, scales, zeros, factors, bias, y, partial, counters, n_tokens, n_rows, n_prepared, scale_stride,
    bias_stride, stride16, n_blocks, per_split, BITS: gl.constexpr, WIDTH: gl.constexpr, ZERO: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, HAS_BIAS: gl.constexpr, SPLITS: gl.constexpr, ROWS: gl.constexpr,
    TOKENS: gl.constexpr, DISTANCE: gl.constexpr, UNROLL: gl.constexpr,
    WARPS: gl.constexpr, PDL: gl.constexpr = False,
):  # fmt: skip
    """y [n_tokens, n_rows] of what `prepare_kernel` made of x. Grid (row tiles, SPLITS, token tiles).

    Args:
        stride16: words of a row / 16; n_blocks: of a row, of which a program takes per_split.
        bias_stride: 0, or n_rows where each token has its own.
        partial: float32 [token tiles, row tiles, SPLITS, ROWS, TOKENS], any content; counters: zeros before and
            after. The last program to arrive adds the sums of all in a fixed order.
        ZERO: of every group, or None: zeros are uint8 like the scales.
        GROUPS: at least the groups of a program, a power of two.
        DISTANCE: chains that are loaded ahead; UNROLL: blocks after which the tensor core is waited for.
    """
    CHAINS: gl.constexpr = 8 // BITS
    WORD_SLOTS: gl.constexpr = (DISTANCE + CHAINS - 1) // CHAINS + 1
    X_SLOTS: gl.constexpr = DISTANCE + 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    if PDL:
        gdc_launch_dependents()
    row_tile = gl.program_id(0)
    split = gl.program_id(1)
    token_tile = gl.program_id(2)
    first_row = row_tile * ROWS
    row_words = stride16 * 16
    first_block = split * per_split
    last_block = gl.minimum(first_block + per_split, n_blocks)
    n_chains = (last_block - first_block) * CHAINS
    x_tiles = gl.allocate_shared_memory(gl.float16, [X_SLOTS, TOKENS, 2 * WIDTH], tile_layout)
    word_tiles = gl.allocate_shared_memory(gl.int16, [WORD_SLOTS, ROWS, WIDTH], tile_layout)
    first_group = first_block * (2 * CHAINS * WIDTH) // GROUP
    last_group = (last_block * (2 * CHAINS * WIDTH) - 1) // GROUP
    held_scales = _lines(scales, first_group, last_group, scale_stride, first_row, GROUPS, ROWS, WARPS)
    if ZERO is None:
        held_zeros = _lines(zeros, first_group, last_group, scale_stride, first_row, GROUPS, ROWS, WARPS)
    x_layout: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0]))
    word_layout: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
    word_rows = words + (first_row + gl.arange(0, ROWS, word_layout)).to(gl.int64) * row_words
    for chain in gl.static_range(0, DISTANCE, CHAINS):
        early = gl.minimum(first_block + chain // CHAINS, n_blocks - 1)
        _copy_tile(word_tiles.index(chain // CHAINS), word_rows, early * WIDTH, ROWS, WIDTH, WARPS)
    if PDL:
        gdc_wait()
    first_token = token_tile * TOKENS
    token = gl.minimum(first_token + gl.arange(0, TOKENS, x_layout), n_tokens - 1)
    x_rows = x + token * n_prepared
    start = first_block * CHAINS
    for chain in gl.static_range(DISTANCE):
        column = (start + gl.minimum(chain, n_chains - 1)) * (2 * WIDTH)
        _copy_tile(x_tiles.index(chain), x_rows, column, TOKENS, 2 * WIDTH, WARPS)
        async_copy.commit_group()
    acc = gl.zeros([ROWS, TOKENS], gl.float32, mma)
    zero = gl.zeros([ROWS, TOKENS], gl.float32, mma)
    for base in range(first_block, last_block, UNROLL):
        now = (base - first_block) * CHAINS
        pending = ()
        for chain in gl.static_range(UNROLL * CHAINS):
            async_copy.wait_group(DISTANCE - 1)
            fence_async_shared()
            barrier()
            ahead = now + chain + DISTANCE
            if ahead < n_chains:
                _copy_tile(
                    x_tiles.index(ahead % X_SLOTS), x_rows, (start + ahead) * (2 * WIDTH), TOKENS, 2 * WIDTH, WARPS
                )
                if (chain + DISTANCE) % CHAINS == 0:
                    tile = word_tiles.index(ahead // CHAINS % WORD_SLOTS)
                    _copy_tile(tile, word_rows, (first_block + ahead // CHAINS) * WIDTH, ROWS, WIDTH, WARPS)
            async_copy.commit_group()
            slot = (now + chain) % X_SLOTS
            its_group = ((start + now + chain) * (2 * WIDTH)) // GROUP - first_group
            columns = x_tiles.index(slot).permute((1, 0))
            word_tile = word_tiles.index((now + chain) // CHAINS % WORD_SLOTS)
            packed = word_tile.load(operand)
            offset = 0
            if ZERO is None:
                offset = held_zeros.index(its_group).load(gl.SliceLayout(1, operand))
            first = _operand(packed, offset, BITS, 2 * (chain % CHAINS), ZERO)
            product = warpgroup_mma(first, columns.slice(0, WIDTH, 0), zero, use_acc=False, is_async=True)
            second = _operand(packed, offset, BITS, 2 * (chain % CHAINS) + 1, ZERO)
            product = warpgroup_mma(second, columns.slice(WIDTH, WIDTH, 0), product, is_async=True)
            scale = held_scales.index(its_group).load(gl.SliceLayout(1, mma)).to(gl.float32)
            scale = scale * (2.0 ** (24 - chain % CHAINS * BITS))
            if TOKENS > 64:  # registers are for one product
                done = warpgroup_mma_wait(0, deps=[product, first, second])[0]
                acc += scale[:, None] * done
            elif len(pending) > 0:
                done = warpgroup_mma_wait(2, deps=[pending[0], pending[2], pending[3]])[0]
                acc += pending[1][:, None] * done
            pending = (product, scale, first, second)
        if TOKENS <= 64:
            done = warpgroup_mma_wait(0, deps=[pending[0], pending[2], pending[3]])[0]
            acc += pending[1][:, None] * done
    async_copy.wait_group(0)
    its_row = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    its_token = gl.arange(0, TOKENS, gl.SliceLayout(0, mma))
    last = True
    if SPLITS > 1:
        mine = partial + ((token_tile * gl.num_programs(0) + row_tile) * SPLITS).to(gl.int64) * (ROWS * TOKENS)
        mine = mine + its_row[:, None] * TOKENS + its_token[None, :]
        gl.store(mine + split * (ROWS * TOKENS), acc)
        barrier()
        counter = counters + token_tile * gl.num_programs(0) + row_tile
        last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            gl.store(counter, 0)
    if last:
        out: gl.constexpr = gl.BlockedLayout([8, 1], [ROWS // 8, 32 * 8 // ROWS], [1, WARPS], [0, 1])
        if SPLITS > 1:
            acc = gl.zeros([ROWS, TOKENS], gl.float32, mma)
            for other in gl.static_range(SPLITS):
                acc += gl.load(mine + other * (ROWS * TOKENS), cache_modifier=".cg")
        whole = gl.convert_layout(acc, out)
        rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, out))
        tokens = first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, out))
        inside = (rows < n_rows)[:, None] & (tokens < n_tokens)[None, :]
        whole = whole * gl.load(factors + tokens, mask=tokens < n_tokens, other=0.0)[None, :]
        if HAS_BIAS:
            more = gl.load(bias + tokens[None, :] * bias_stride + rows[:, None], mask=inside, other=0.0)
            whole += more.to(gl.float32)
        gl.store(y + (tokens * n_rows)[None, :] + rows[:, None], whole.to(y.dtype.element_ty), mask=inside)
