"""Walsh-Hadamard rotation in registers: Triton functions that the kernels of the KV cache call.

The torch twin is algorithms/kv/hadamard.py.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _log2(size):
    return size.bit_length() - 1


@triton.jit
def rotate_rows(x, D: tl.constexpr):
    """x H for x float32 [rows, D]: each step transforms the highest bit of the index and makes it the lowest."""
    ROWS: tl.constexpr = x.shape[0]
    for _ in tl.static_range(_log2(D)):
        first, second = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, D // 2)), (0, 2, 1)))
        x = tl.reshape(tl.join(first + second, first - second), (ROWS, D))
    return x * (D**-0.5)


@triton.jit
def _signs(BITS: tl.constexpr):
    """Sylvester's matrix of the `BITS` lowest bits of the index, the others untouched: float16 [16, 16]."""
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, 16)[None, :]
    both = row & column & ((1 << BITS) - 1)
    odd = (both ^ (both >> 1) ^ (both >> 2) ^ (both >> 3)) & 1
    return tl.where((row ^ column) >> BITS == 0, 1 - 2 * odd, 0).to(tl.float16)


@triton.jit
def rotate_columns(x, D: tl.constexpr, OPERAND: tl.constexpr = False):
    """H x for x [D, columns], D from 64 to 256: two products on tensor cores, of the four highest bits of the index and
    of the others. x is rounded to float16 once: queries of 16 bits are not.

    OPERAND: the result is an operand of products in a loop. The columns of the last product then come to lie in the
    registers of a thread, from where shuffles cannot make an operand: it goes through shared memory, once, and is read
    from there. An operand that shuffles can make would be shuffled anew on every turn of the loop. For D = 128 only:
    for 64 Triton 3.6 makes wrong code of this order (the tests on a GPU see it).
    """
    COLUMNS: tl.constexpr = x.shape[1]
    REST: tl.constexpr = D // 16
    x = tl.dot(_signs(4), tl.reshape(x.to(tl.float16), (16, REST * COLUMNS)), out_dtype=tl.float32) * 0.25
    x = tl.reshape(x, (REST, 16, COLUMNS))
    x = tl.reshape(tl.permute(x, (1, 2, 0) if OPERAND else (1, 0, 2)), (16, REST * COLUMNS))
    signs = _signs(_log2(REST))
    rounded = x.to(tl.float16)
    x = tl.dot(signs, (x - rounded.to(tl.float32)).to(tl.float16), out_dtype=tl.float32)
    x = tl.dot(signs, rounded, x, out_dtype=tl.float32) * REST**-0.5
    if OPERAND:
        x = tl.permute(tl.reshape(x, (16, COLUMNS, REST)), (2, 0, 1))
    else:
        x = tl.permute(tl.reshape(x, (16, REST, COLUMNS)), (1, 0, 2))
    return tl.reshape(x, (D, COLUMNS))
