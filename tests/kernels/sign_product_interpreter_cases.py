"""One row of x times signs in one launch, in Triton's interpreter, on CPU tensors. Run by test_interpreter.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from interpreter_cases import hold
from packed_weights import activations, rounding
from sign_weights import random_sign_factors
from torch.nn.functional import pad

from quantkit.formats.sign_factors import pack
from quantkit.kernels.decode_step import add_norm, gated
from quantkit.kernels.planar import planar_segments
from quantkit.kernels.ready_row import Source
from quantkit.kernels.sign_planar import factor_specs, factors_to_planar, latent_span
from quantkit.kernels.sign_product import SignProductConfig, has_sign_product, product_launch, takes_copies
from quantkit.kernels.sign_product_triton import sign_product_kernel

PLAIN = SignProductConfig(tiles=1, warps=1)


def run(source, spec, tensors, bias=None, *, config=PLAIN, starts=(), out_dtype=torch.float32):
    """The kernel, everything between guard bands, what it writes filled with NaN before; also the residual."""
    assert has_sign_product(spec)
    assert takes_copies(starts)
    row = {name: getattr(source, name) for name in ("x", "update", "weight")}
    buffers = {name: tensor for name, tensor in (row | tensors).items() if tensor is not None}
    buffers["out"] = torch.full((len(source.x), spec.out_features), float("nan"), dtype=out_dtype)
    buffers["residual"] = torch.full_like(source.x, float("nan"))
    inner, check_bands = hold(buffers)
    held = Source(kind=source.kind, eps=source.eps, **{name: inner.get(name) for name in row})
    parts = inner["words"], inner["scales"], inner.get("columns"), bias, inner["out"], inner["residual"]
    grid, arguments = product_launch(held, spec, *parts, config, starts)
    sign_product_kernel[grid](**arguments, ASM=False)
    check_bands("out", "residual")
    return inner["out"].clone(), inner["residual"].clone()


def of_signs(signs, scales, x, lost):
    """scales * (signs x) in float64 and a bound on its error: what is lost of x, and float32 sums of its integers.

    A program adds n shares of 16-bit integers (exactly, up to 2**24 of them) times a unit and a scale.
    """
    dense = (2.0 * signs.double() - 1) * scales.double()[:, None]
    magnitude = x.abs() @ dense.abs().t()
    return x @ dense.t(), lost * dense.abs().sum(1) + (len(x) / 8 + 64) * 2.0**-24 * magnitude


def first_product(weight, x):
    """What V makes of float64 x, in the planar order of latents, and the bound."""
    span, padded = latent_span(weight.spec()), []
    parts = zip(
        weight.column_scales, *(t.split(weight.ranks) for t in (weight.v_signs, weight.latent_scales)), strict=True
    )
    for columns, signs, scales in parts:
        scaled = x * columns.double()
        # half a unit of the largest; the product of x and scale and the quotient are rounded too
        lost = float(scaled.abs().max()) * (0.501 / 32512 + 2.0**-23)
        padded.append([pad(each, (0, span - len(signs))) for each in of_signs(signs, scales, scaled, lost)])
    return [torch.cat(each) for each in zip(*padded, strict=True)]


def planar_v(planar):
    return {"words": planar["v_planar"], "scales": planar["z_scales"], "columns": planar["x_scales"]}


def check(y, expected, bound):
    assert ((y.double() - expected).abs() <= bound + rounding(expected.abs() + bound, y.dtype)).all()


@pytest.mark.parametrize(
    ("in_features", "config", "dtype"),
    [
        (71, PLAIN, torch.float16),  # padded to a multiple of eight
        (640, SignProductConfig(tiles=2, warps=1), torch.bfloat16),
        (1100, SignProductConfig(tiles=4, warps=2), torch.float16),
        (2056, SignProductConfig(tiles=2, warps=2), torch.bfloat16),  # in two passes
    ],
)
def test_columns_have_scales(in_features, config, dtype):
    weight = random_sign_factors(in_features, 8, in_features, (40, 24))
    v, _ = factor_specs(weight.spec())
    x = activations(1, 2, in_features, dtype=dtype)
    y, _ = run(Source(x=x), v, planar_v(factors_to_planar(weight.spec(), pack(weight))), config=config)
    for token, row in zip(y, x, strict=True):
        check(token, *first_product(weight, row.double()))


def test_every_width_of_planes():
    """So that the cases above mean something: what each is held in."""
    specs = [factor_specs(random_sign_factors(0, 8, n, (40, 24)).spec())[0] for n in (71, 640, 1100, 2056)]
    assert {planar_segments(spec)[0].plane_width for spec in specs} == {32, 64}


@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        ((40,), SignProductConfig(tiles=2, warps=1)),
        ((700, 300), SignProductConfig(tiles=1, warps=2)),
        ((65, 9), SignProductConfig(tiles=2, warps=1)),
    ],
)
def test_paths_have_scales(ranks, config):
    """Paths that end within a block and within a warp's columns; siblings that take rows of their own; a last tile that
    is not full."""
    weight = random_sign_factors(3, 75, 16, ranks)
    spec = weight.spec()
    _, u = factor_specs(spec)
    planar, span, starts = factors_to_planar(spec, pack(weight)), latent_span(spec), (32, 64)
    x, bias = activations(2, 1, 3 * u.in_features, dtype=torch.float16), torch.linspace(-1, 1, 75)
    for path, rank in enumerate(ranks):  # what pads the latents is zero
        x.view(3, -1, span)[:, path, rank:] = 0
    tensors = {"words": planar["u_planar"], "scales": weight.row_scales.half()}
    y, _ = run(Source(x=x), u, tensors, bias, config=config, starts=starts, out_dtype=torch.float16)
    bounds = [0, *starts, 75]
    for sibling, rows in enumerate(slice(*ends) for ends in pairwise(bounds)):
        own = x.view(3, -1, span)[sibling].double()
        lost = 0.501 * float(own.abs().max()) / 32512
        signs = weight.u_signs[rows].split(ranks, 1)
        parts = [
            of_signs(each, scales[rows], latents[: each.shape[1]], lost)
            for each, scales, latents in zip(signs, weight.row_scales, own, strict=True)
        ]
        exact, bound = (sum(each) for each in zip(*parts, strict=True))
        check(y[0, rows], exact + bias.double()[rows], bound + 2.0**-22 * (exact.abs() + 1))


@pytest.mark.parametrize("kind", ["norm", "first norm", "gated"])
def test_what_comes_before_in_the_same_launch(kind):
    """The product is that of the row which the launch before would have written, but for the rounding of that row."""
    n, weight = 1104, random_sign_factors(5, 8, 1104, (33, 64))
    v, _ = factor_specs(weight.spec())
    if kind == "gated":
        x = activations(3, 1, 2 * n, dtype=torch.float16).clamp(-6, 6)
        source, expected = Source(x=x, kind="gated"), gated(x)
    else:
        x, factors = activations(3, 1, n, dtype=torch.float16), torch.linspace(0.5, 2, n).half()
        update = activations(4, 1, n, dtype=torch.float16) if kind == "norm" else None
        source = Source(x=x.clone(), kind="norm", update=update, weight=factors, eps=1e-5)
        expected = add_norm(x, update, factors, 1e-5)
    tensors = planar_v(factors_to_planar(weight.spec(), pack(weight)))
    y, residual = run(source, v, tensors, config=SignProductConfig(tiles=2, warps=2))
    if kind == "norm":
        assert torch.equal(residual, x)
    exact, bound = first_product(weight, expected[0].double())
    # float32 sums and exp: the last place (2**-10) of some numbers of the row differs, twice where a norm rounds twice
    check(y[0], exact, bound + 2.0**-9 * largest_change(weight, expected[0].double()))


def largest_change(weight, x):
    """By how much the product changes if each of x changes by its own size, at most."""
    span, parts = latent_span(weight.spec()), []
    for columns, scales in zip(weight.column_scales, weight.latent_scales.split(weight.ranks), strict=True):
        size = (x * columns.double()).abs().sum() * scales.double().abs()
        parts.append(pad(size, (0, span - len(scales))))
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, where it meets them
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows(bad):
    weight = random_sign_factors(1, 8, 128, (16,))
    v, _ = factor_specs(weight.spec())
    x = torch.ones(1, 128, dtype=torch.float16)
    x[0, 100] = bad
    tensors = planar_v(factors_to_planar(weight.spec(), pack(weight)))
    y, _ = run(Source(x=x), v, tensors | {"columns": torch.ones(1, 128, dtype=torch.float16)})
    assert y.isnan().all()
