"""The one-row kernels of the sign formats, compiled for sm_90 without a GPU; see test_ahead_of_time.py."""

from __future__ import annotations

import os
import re

import pytest
import torch

from quantkit.evaluation.random_weights import random_spec
from quantkit.formats.sign_salient import SignSalientSpec
from quantkit.kernels.planar import padded_rows, planar_segments
from quantkit.kernels.ready_row import SignParts, Source, new_ready, ready_launch, row_table
from quantkit.kernels.sign_planar import salient_parts, sign_spec
from quantkit.kernels.sign_product import choose_sign_product, product_launch
from quantkit.kernels.sign_rows import choose_sign_rows, rows_launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton was imported as interpreter"),
]
EARLY = {"PDL": True, "launch_pdl": True}


def planar_zeros(spec):
    """Empty planar tensors of a weight: what a launch is described by."""
    (segment,) = planar_segments(spec)
    rows = padded_rows(spec)
    numbers = torch.zeros(spec.n_groups, rows, dtype=torch.float16)
    zeros = numbers if segment.bits == 1 else numbers.to(torch.uint8)
    tensors = {"planar": torch.zeros(rows * segment.row_words, dtype=torch.int16), "planar_scales": numbers}
    return tensors if spec.symmetric else tensors | {"planar_zeros": zeros}


@pytest.mark.parametrize(("out_features", "in_features"), [(16384, 4096), (192, 4096), (192, 8192), (192, 14336)])
def test_signs_beside_integers(compile_for_sm90, out_features, in_features):
    """All words of a program's rows are asked for before x is waited for, sixteen bytes at a time."""
    from quantkit.kernels.ready_row_triton import ready_kernel
    from quantkit.kernels.sign_rows_triton import sign_rows_kernel

    spec = random_spec("ptq161", out_features, in_features)
    assert isinstance(spec, SignSalientSpec)
    assert spec.salient is not None
    parts = salient_parts(spec)
    columns = [torch.zeros(part.in_features, dtype=torch.int64) for part in (parts.signs, spec.salient)]
    places, factors = (table[None] for table in row_table(parts, columns, [each.float() for each in columns]))
    x, out = torch.zeros(1, in_features, dtype=torch.bfloat16), torch.zeros(1, out_features, dtype=torch.bfloat16)
    ready = new_ready(parts, places)
    for kind in ("row", "gated", "norm"):
        source = Source(x=x, kind=kind, update=x if kind == "norm" else None, weight=x[0])
        grid, arguments = ready_launch(source, parts, places, factors, *ready, x)
        _, sass, resources = compile_for_sm90(ready_kernel, grid, arguments, **EARLY)
        assert resources["STACK"] == 0
        assert sass.index("LDG") < sass.index("ACQBULK")  # tables are asked for before x is waited for
    config = choose_sign_rows(parts)
    held = planar_zeros(parts.signs)
    signs = {"words": held["planar"], "scales": held["planar_scales"][0], "means": held["planar_scales"][0]}
    grid, arguments = rows_launch(*ready, parts, signs, planar_zeros(spec.salient), None, out, (), config)
    _, sass, resources = compile_for_sm90(sign_rows_kernel, grid, arguments, ASM=True, **EARLY)
    assert resources["STACK"] == 0
    assert "BMMA.168256.AND.POPC" in sass
    assert "IMMA.16832.U8.S8" in sass
    asked = len(re.findall(r"LDG\.E\.EF\.128", sass.split("ACQBULK")[0]))
    assert asked == 4 * config.tiles + 2 * arguments["STEPS"]


def test_signs_alone(compile_for_sm90):
    from quantkit.kernels.sign_rows_triton import sign_rows_kernel

    parts = SignParts(signs=sign_spec(192, 4096))
    held, places = planar_zeros(parts.signs), torch.zeros(3, 4096, dtype=torch.int16)
    signs = {"words": held["planar"], "scales": torch.zeros(192)}
    out = torch.zeros(1, 192, dtype=torch.bfloat16)
    config = choose_sign_rows(parts)
    grid, arguments = rows_launch(*new_ready(parts, places), parts, signs, None, None, out, (32, 96), config)
    _, sass, resources = compile_for_sm90(sign_rows_kernel, grid, arguments, ASM=True, **EARLY)
    assert resources["STACK"] == 0
    assert "BMMA.168256.AND.POPC" in sass


@pytest.mark.parametrize(
    ("kind", "in_features", "paths"), [("norm", 4096, 1), ("gated", 14336, 1), ("row", 14336, 1), ("row", 1792, 2)]
)
def test_signs_that_make_their_row_ready(compile_for_sm90, kind, in_features, paths):
    """Words, and scales of columns, are asked for before x is waited for, sixteen bytes at a time; no spills."""
    from quantkit.kernels.sign_product_triton import sign_product_kernel

    spec = sign_spec(14336, in_features, paths)
    x = torch.zeros(1, in_features * (2 if kind == "gated" else 1), dtype=torch.bfloat16)
    source = Source(x=x, kind=kind, update=x.clone() if kind == "norm" else None, weight=x[0])
    columns = torch.zeros(2, in_features, dtype=torch.float16) if paths == 1 else None
    scales, out = torch.zeros(paths, 14336), torch.zeros(1, 14336, dtype=torch.bfloat16)
    config = choose_sign_product(spec, columns is not None)
    words = planar_zeros(spec)["planar"]
    grid, arguments = product_launch(source, spec, words, scales, columns, None, out, x, config)
    _, sass, resources = compile_for_sm90(sign_product_kernel, grid, arguments, ASM=True, **EARLY)
    assert resources["STACK"] == 0
    assert "BMMA.168256.AND.POPC" in sass
    asked = sass.split("ACQBULK")[0]
    assert len(re.findall(r"LDG\.E\.EF\.128", asked)) == 4 * config.tiles
    assert len(re.findall(r"LDG\.E\.128", asked)) == (4 if columns is not None else 0) + (4 if kind == "norm" else 0)
