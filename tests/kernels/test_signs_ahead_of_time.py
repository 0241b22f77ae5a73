"""The one-row kernels of the sign formats, compiled for sm_90 without a GPU; see test_ahead_of_time.py."""

from __future__ import annotations

import os
import re

import pytest
import torch

from quantkit.evaluation.random_weights import random_spec
from quantkit.formats.sign_salient import SignSalientSpec
from quantkit.kernels.latents import latent_launch
from quantkit.kernels.planar import padded_rows, planar_segments
from quantkit.kernels.sign_planar import row_specs, sign_spec
from quantkit.kernels.sliced import choose_sliced, new_slices, product_launch, slice_launch, slice_table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton was imported as interpreter"),
]
EARLY = {"PDL": True, "launch_pdl": True}
SPILL_LIMIT = 96  # bytes per thread


def planar_zeros(spec):
    """Empty planar tensors of a weight: what a launch is described by."""
    (segment,) = planar_segments(spec)
    rows = padded_rows(spec)
    numbers = torch.zeros(spec.n_groups, rows, dtype=torch.float16)
    zeros = numbers if segment.bits == 1 else numbers.to(torch.uint8)
    tensors = {"planar": torch.zeros(rows * segment.row_words, dtype=torch.int16), "planar_scales": numbers}
    return tensors if spec.symmetric else tensors | {"planar_zeros": zeros}


@pytest.mark.parametrize(("out_features", "in_features"), [(16384, 4096), (192, 4096), (16384, 8192), (192, 14336)])
def test_signs_beside_integers(compile_for_sm90, out_features, in_features):
    """Every word of a tile is asked for before the slices are waited for, sixteen bytes at a time."""
    from quantkit.kernels.sliced_triton import slice_kernel, sliced_product_kernel

    spec = random_spec("ptq161", out_features, in_features)
    assert isinstance(spec, SignSalientSpec)
    parts = row_specs(spec)
    columns = [torch.zeros(part.in_features, dtype=torch.int64) for part in parts]
    places, factors = (table[None] for table in slice_table(parts, columns, [each.float() for each in columns]))
    x, out = torch.zeros(1, in_features, dtype=torch.bfloat16), torch.zeros(1, out_features, dtype=torch.bfloat16)
    sliced = new_slices(parts, places)
    grid, arguments = slice_launch(x, parts, places, factors, *sliced)
    _, _, resources = compile_for_sm90(slice_kernel, grid, arguments, **EARLY)
    assert resources["STACK"] == 0
    config = choose_sliced(parts)
    held = [planar_zeros(part) for part in parts]
    grid, arguments = product_launch(sliced, parts, held, None, out, (), config)
    _, sass, resources = compile_for_sm90(sliced_product_kernel, grid, arguments, ASM=True, **EARLY)
    assert resources["STACK"] <= SPILL_LIMIT
    assert "IDP.4A" in sass
    assert len(re.findall(r"LDG\.E\.EF\.128", sass.split("ACQBULK")[0])) >= 2 * config.rows


@pytest.mark.parametrize("in_features", [4096, 14336])
def test_latents(compile_for_sm90, in_features):
    from quantkit.kernels.latents_triton import latent_product_kernel

    v = sign_spec(192, in_features)
    x, out = torch.zeros(1, in_features, dtype=torch.bfloat16), torch.zeros(1, 192, dtype=torch.bfloat16)
    columns, scales = torch.zeros(3, in_features, dtype=torch.float16), torch.zeros(192)
    grid, arguments = latent_launch(x, v, planar_zeros(v)["planar"], columns, scales, 64, out)
    _, sass, resources = compile_for_sm90(latent_product_kernel, grid, arguments, ASM=True, **EARLY)
    assert resources["STACK"] == 0
    assert "IDP.4A" in sass
    assert sass.index("LDG.E.EF") < sass.index("ACQBULK")  # signs are asked for before x is waited for
