"""Random quantized weights and the error bounds of products with them."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.formats.grouped_int import GroupedInt, pack, symmetric_zero
from quantkit.kernels.bit_gemv import has_one_scale, x_bits
from quantkit.kernels.planar import planar_segments


def random_weight(
    seed: int, out_features: int, group_size: int, bits: tuple[int, ...], symmetric: bool = False
) -> GroupedInt:
    """Codes over the whole range (both ends appear), scales over two decades, one row of smallest scales."""
    generator = torch.Generator().manual_seed(seed)
    n_groups = len(bits)
    codes, zeros = [], []
    for width in bits:
        group = torch.randint(2**width, (out_features, group_size), generator=generator, dtype=torch.uint8)
        group[0] = 2**width - 1
        group[-1] = 0
        codes.append(group)
        if symmetric:
            zeros.append(torch.full((out_features, 1), symmetric_zero(width)))
        elif width == 1:
            zeros.append(torch.rand(out_features, 1, generator=generator).half().float())
        else:
            zeros.append(torch.randint(2**width, (out_features, 1), generator=generator).float())
    scales = (10 ** (2 * torch.rand(out_features, n_groups, generator=generator) - 3)).half().float()
    scales[out_features // 2] = 2.0**-24
    return GroupedInt(
        codes=torch.cat(codes, 1), scales=scales, zeros=torch.cat(zeros, 1), bits=bits, symmetric=symmetric
    )


def activations(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers with one column in a hundred 100 times larger, as language models have, and some zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x[..., ::101] *= 100
    x[..., 1::17] = 0.0
    return x.to(dtype)


def product_and_bound(
    x: Tensor, weight: GroupedInt, bias: Tensor | None = None, *, base: float = 0.0, unit_roundoff: float = 2.0**-24
) -> tuple[Tensor, Tensor]:
    """The product in float64 and a bound on the error of any float32 evaluation of it, before rounding to a dtype.

    A sum of n float32 terms has an error of at most n * u * sum |term|, whatever its order, u the unit roundoff. Terms
    are scale * code * x and scale * zero * x, each rounded a few times more on its way; ``base`` is the constant that
    an implementation adds to the codes and subtracts again, in code units.
    """
    spec = weight.spec()
    x = x.double()
    dense = weight.dequantize().double()
    scales = weight.scales.double().repeat_interleave(spec.group_size, 1)
    zeros = weight.zeros.double().repeat_interleave(spec.group_size, 1)
    magnitude = x.abs() @ (scales * (weight.codes.double() + zeros.abs() + 2 * base)).t()
    product = x @ dense.t()
    if bias is not None:
        product = product + bias.double()
        magnitude = magnitude + bias.double().abs()
    n_terms = 2 * spec.in_features + spec.n_groups + 16
    return product, n_terms * unit_roundoff * magnitude


def rounding(product: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest change when ``product`` is rounded to ``dtype``, subnormal results included."""
    info = torch.finfo(dtype)
    return product.abs() * info.eps / 2 + info.smallest_normal * info.eps


def half_error(x: Tensor) -> Tensor:
    """Bound on what is lost of ``x`` [m, in] as float16 times a power of two per row (planar_product_triton.py).

    The largest of a row lies in [2**14, 2**15) then; half a unit of subnormals is 2**-25.
    """
    return torch.broadcast_to(x.double().abs().amax(1, keepdim=True) * 2.0**-39, x.shape)


def slice_error(x: Tensor, weight: GroupedInt, chunks: bool = False) -> Tensor:
    """Bound on what is lost of ``x`` [m, in] where the planar one-row kernel takes it in 16 bits (gemv_triton.py).

    A thread has eight columns of every plane of a block; the unit of its slices is their largest magnitude / 32512, and
    half a unit is lost in rounding (a little more: the quotient is rounded too). ``chunks``: it is that of at most 32
    columns of either plane of a pair (mixed_rows_triton.py).
    """
    spec = weight.spec()
    order = pack(weight).get("group_order", torch.arange(spec.n_groups, device=x.device)).long()
    columns = x.double().unflatten(1, (spec.n_groups, spec.group_size))[:, order].flatten(1).abs()
    parts = []
    for segment in planar_segments(spec):
        first = segment.first_group * spec.group_size
        mine = columns[:, first : first + segment.n_groups * spec.group_size]
        shape = (segment.n_blocks, 1, segment.planes_per_block, segment.plane_width // 8, 8)
        if chunks:
            width = min(segment.plane_width, 32)
            shape = (segment.n_blocks, segment.planes_per_block // 2, 2, segment.plane_width // width, width)
        padded = pad(mine, (0, prod(shape) - mine.shape[1])).unflatten(1, shape)
        unit = padded.amax((3, 5), keepdim=True).clamp(min=2.0**-100).expand_as(padded) / 32512
        parts.append(unit.flatten(1)[:, : mine.shape[1]])
    units = torch.cat(parts, 1).unflatten(1, (spec.n_groups, spec.group_size))
    return 0.501 * units[:, order.argsort()].flatten(1)


def pair_error(x: Tensor, weight: GroupedInt, words: int) -> Tensor:
    """Bound on what is lost of ``x`` [m, in] where the kernel for few rows takes it in 16 bits (few_rows_triton.py).

    The unit is the largest magnitude in ``words`` neighbouring columns of both planes of a pair / 32512; half of it is
    lost in rounding (a little more: the quotient is rounded too).
    """
    (segment,) = planar_segments(weight.spec())
    shape = (segment.n_blocks, segment.planes_per_block // 2, 2, segment.plane_width // words, words)
    padded = pad(x.double().abs(), (0, prod(shape) - x.shape[1])).unflatten(1, shape)
    unit = padded.amax((3, 5), keepdim=True).clamp(min=2.0**-100).expand_as(padded) / 32512
    return 0.501 * unit.flatten(1)[:, : x.shape[1]]


def integer_error(x: Tensor, weight: GroupedInt) -> Tensor:
    """Bound on what is lost of ``x`` [m, in] where bit products take it in 16 or 12 bits (bit_planes_triton.py).

    The unit is the largest magnitude of 128 columns that lanes exchange, or, with one scale for all columns of a warp,
    of these 1024, over the largest integer. Half a unit is lost in rounding (a little more: the quotient is rounded
    too).
    """
    neighbours = 1024 if has_one_scale(weight.spec()) else 128
    most = 32512 if x_bits(weight.spec(), x.dtype) == 16 else 2047
    padded = pad(x.double().abs(), (0, -x.shape[1] % neighbours)).unflatten(1, (-1, neighbours))
    unit = padded.amax(2, keepdim=True).clamp(min=2.0**-100).expand_as(padded) / most
    return 0.501 * unit.flatten(1)[:, : x.shape[1]]
