"""Triton kernels of the sign formats. Imported on first use: `import quantkit` does not need Triton.

Sign matrices are one-bit weights on planar-16 words (planar.py); their products are those of `grouped_int`'s kernels.
What is new here is small: activations brought into the order and the scale of the packed columns, latents between two
sign matrices, and a binary and an integer segment in one launch.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n_tokens"])
def prepare_kernel(
    x, order, scales, out, n_tokens, n_columns, n_out, ORDERED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out [paths * n_tokens, n_out]: x [n_tokens, n_columns] in another column order, times a scale per path.

    ``scales`` is 0 for columns of out that are padding. Grid (paths * n_tokens, column tiles).
    """
    row = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_out
    source = columns
    if ORDERED:
        source = tl.load(order + columns, mask=inside, other=0).to(tl.int32)
    token = row % n_tokens
    path = row // n_tokens
    value = tl.load(x + token.to(tl.int64) * n_columns + source, mask=inside & (source < n_columns), other=0.0)
    scale = tl.load(scales + path * n_out + columns, mask=inside, other=0.0)
    scaled = (value.to(tl.float32) * scale.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64) * n_out + columns, scaled, mask=inside)


@triton.jit(do_not_specialize=["n_tokens"])
def latent_kernel(z, scales, out, n_tokens, n_latents, span, COLUMNS: tl.constexpr):
    """out [n_tokens, n_latents]: of each latent, the product with the activations of its path, times its scale.

    z is [paths * n_tokens, n_latents]: all latents for the activations of all paths. Path p owns latents
    p * span .. (p + 1) * span - 1. Grid (n_tokens, column tiles).
    """
    token = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n_latents
    row = token + columns // span * n_tokens
    value = tl.load(z + row.to(tl.int64) * n_latents + columns, mask=inside, other=0.0)
    scaled = value * tl.load(scales + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * n_latents + columns, scaled.to(out.dtype.element_ty), mask=inside)
