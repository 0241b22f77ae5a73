"""The first product of `sign_factors`, in Triton's interpreter, on CPU tensors. Run by test_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import edges_untouched, guarded
from packed_weights import activations, random_weight

from quantkit.formats.grouped_int import pack
from quantkit.kernels.latents import latent_launch
from quantkit.kernels.latents_triton import latent_product_kernel
from quantkit.kernels.planar import to_planar


def product(weight, x, columns, scales, span):
    """The kernel between guard bands, the result filled with NaN before."""
    spec = weight.spec()
    buffers = {"x": x, "words": to_planar(spec, pack(weight))["planar"], "columns": columns, "scales": scales}
    buffers["out"] = torch.full((1, spec.out_features), float("nan"))
    held = {name: guarded(tensor) for name, tensor in buffers.items()}
    before = {name: whole.clone() for name, (_, whole) in held.items()}
    inner = {name: tensor for name, (tensor, _) in held.items()}
    grid, arguments = latent_launch(
        inner["x"], spec, inner["words"], inner["columns"], inner["scales"], span, inner["out"]
    )
    latent_product_kernel[grid](**arguments, ASM=False)
    assert all(edges_untouched(whole, before[name]) for name, (_, whole) in held.items())
    return inner["out"].clone()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "padded", "span", "copies"),
    [(128, 128, 8, 1), (1000, 1024, 16, 2), (384, 384, 64, 3), (9000, 9088, 8, 1)],
)
def test_scaled_columns_times_signs(n, padded, span, copies, dtype):
    """Every copy of x within its slices: half a unit of the largest of a column's 32 neighbours, bounded by all's."""
    weight = random_weight(n, span * copies, padded, (1,), symmetric=True)
    generator = torch.Generator().manual_seed(n)
    columns = torch.randn(copies, padded, generator=generator).half()
    columns[:, n:] = 0
    scales = torch.randn(span * copies, generator=generator)
    x = activations(n, 1, n, dtype=dtype).clamp(-50, 50)
    y = product(weight, x, columns, scales, span)
    signs = 2.0 * weight.codes.double() - 1
    for copy in range(copies):
        own = slice(copy * span, (copy + 1) * span)
        scaled = x.double()[0] * columns[copy, :n].double()
        expected = scales[own].double() * (signs[own, :n] @ scaled)
        lost = padded * 0.501 * float(scaled.abs().max()) / 32512
        bound = scales[own].double().abs() * (lost + 2.0**-24 * (padded + 64) * 3 * scaled.abs().sum())
        assert ((y[0, own].double() - expected).abs() <= bound).all()


def test_what_is_no_number_shows():
    weight = random_weight(1, 8, 256, (1,), symmetric=True)
    x = torch.ones(1, 256, dtype=torch.float16)
    x[0, 77] = float("nan")
    y = product(weight, x, torch.ones(1, 256).half(), torch.ones(8), 8)
    assert y.isnan().all()
