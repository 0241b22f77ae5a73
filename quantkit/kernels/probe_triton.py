"""Two kernels that only measure a device: an empty one, and one that reads memory and keeps nothing."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def empty_kernel():
    """Does nothing: what is left is the cost of a launch."""


@triton.jit
def read_kernel(source, sink, per_program, BLOCK: tl.constexpr):
    """Reads ``per_program`` blocks of BLOCK int32 in each program; writes only if their bits cancel to a number."""
    offsets = tl.program_id(0).to(tl.int64) * per_program * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), tl.int32)
    for block in range(per_program):
        found = found ^ tl.load(source + offsets + block * BLOCK)
    tl.store(sink + tl.arange(0, BLOCK), found, mask=found == 0x5EED5EED)
