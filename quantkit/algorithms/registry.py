"""The tables of what can be chosen: methods, transforms, allocators, grids, solvers. Nothing registers itself.

A *method* is a name for a combination; `quantkit.recipe` turns it into settings. Adding one is a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Method:
    """A published (or our own) recipe."""

    title: str
    paper: str
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)  # recipe fields that differ from the general defaults
    formats: tuple[str, ...] = ("grouped_int",)
    bits: tuple[float, float] = (1, 8)


METHODS: dict[str, Method] = {
    "rtn": Method(
        title="Round to nearest",
        paper="-",
        summary="No data, no compensation. The baseline; fine at 8 bits and often at 4.",
        defaults={"solver": "rtn", "grid": "minmax"},
    ),
    "gptq": Method(
        title="GPTQ",
        paper="arXiv:2210.17323",
        summary="Second-order rounding with error compensation; scales searched by the Hessian below 4 bits.",
    ),
    "slim": Method(
        title="SliM-LLM",
        paper="arXiv:2405.14917",
        summary="GPTQ with mixed widths per column group by salience, and salience-weighted scales.",
        defaults={"allocator": "sba", "grid": "sqc"},
        bits=(2, 7),
    ),
    "boa": Method(
        title="BoA",
        paper="arXiv:2406.13474",
        summary="GPTQ that rounds query, key and value weights for the attention's output, across rows of a head too.",
        defaults={"solver": "boa", "damping": 0.1},
    ),
    "turboboa": Method(
        title="TurboBoA",
        paper="arXiv:2602.04929",
        summary="BoA with rows taken together, aimed at the float model's outputs, and refined afterwards.",
        defaults={"solver": "boa", "joint_rows": True, "correction": 0.25, "refine": 1},
    ),
    "refined": Method(
        title="Refined GPTQ",
        paper="-",
        summary="GPTQ aimed half way at the float model's outputs, stage by stage, refined: the default below 4 bits.",
        defaults={
            "allocator": "adaptive",
            "damping": 0.1,
            "act_order": "group",
            "correction": 0.5,
            "refine": 2,
            "sequential": True,
        },
    ),
    "ptq161": Method(
        title="PTQ1.61",
        paper="arXiv:2502.13179",
        summary="Salient input channels at a few bits, signs elsewhere, with scales of rows and columns.",
        defaults={
            "solver": "ptq161",
            "bits": 1.6,
            "group_size": None,
            "salient_bits": 2,
            "salience": "rms",
            "damping": 0.1,
            "refine": 2,
            "correction": 0.5,
        },
        formats=("sign_salient",),
        bits=(1, 4),
    ),
    "layerwise": Method(
        title="Layer-wise beyond integer bits",
        paper="arXiv:2406.17415",
        summary="Blocks that change their input most get the higher of two widths; any average, such as 2.5 bits.",
        defaults={"allocator": "lim", "bits": 2.5},
    ),
    "luq": Method(
        title="LUQ",
        paper="arXiv:2509.23729",
        summary="Blocks with low-entropy activations get 2 bits, the others 4; any average between.",
        defaults={"allocator": "luq", "lo": 2, "hi": 4, "bits": 3},
    ),
    "casp": Method(
        title="CASP",
        paper="arXiv:2503.05936",
        summary="Queries and keys as low-rank factors where it pays; the bytes go to lossy blocks. For pictures.",
        defaults={"allocator": "casp", "keep_ratio": 0.25, "lo": 2, "hi": 4, "bits": 2.2},
        formats=("grouped_int", "low_rank"),
    ),
    "littlebit": Method(
        title="LittleBit",
        paper="arXiv:2506.13771",
        summary="Two sign matrices and three scale vectors instead of a weight; fitted, or trained by distillation.",
        defaults={"solver": "littlebit", "bits": 0.55, "group_size": None, "refine": "signs"},
        formats=("sign_factors",),
        bits=(0.05, 2),
    ),
}

TRANSFORMS: dict[str, str] = {
    "none": "the weights as they are",
    "hadamard": "the residual stream rotated by a randomized Hadamard matrix, folded into the weights (QuaRot)",
    "restore": "a short low-rank tuning, from a first quantization, towards weights that lose less (PTQ1.61)",
}

ALLOCATORS: dict[str, str] = {
    "uniform": "the same width everywhere",
    "sba": "salience-determined widths per column group, N - 1, N and N + 1 in balance (SliM-LLM)",
    "lim": "two widths; the higher one for blocks whose output differs most from their input (layer-wise)",
    "zd": "two widths; the higher one where fewest weights lie beyond one standard deviation (layer-wise); no data",
    "luq": "two widths; the higher one for blocks whose output activations have the highest entropy (LUQ)",
    "casp": "widths from lo to hi, and factors of queries and keys, by the block's measured loss per byte (CASP)",
    "error": "widths from lo to hi by the greatest fall of the relative output error per byte (ours)",
    "adaptive": "widths from lo to hi, grouped or per channel, by the greatest fall of the same error per byte (ours)",
    "random": "two widths in a random order by --seed: what a score must beat; no data",
}

GRID_CHOICES: dict[str, str] = {
    "auto": "hessian below 4 bits, minmax from 4 bits on (by the width of each linear)",
    "minmax": "the range of the weights",
    "mse": "the range shrunk to the least |error|^2.4 (GPTQ's code)",
    "sqc": "0.9 to 1.1 of the range, salient elements weighted (SliM-LLM)",
    "hessian": "scale and zero searched for the least output error after compensation (ours)",
}

SOLVERS: dict[str, str] = {
    "rtn": "rounding",
    "gptq": "column by column with compensation through the inverse Hessian",
    "ptq161": "signs with compensation, then 4-bit codes of the salient input channels (PTQ1.61)",
    "boa": "gptq, and for query, key and value also row by row, by what attention does with them",
    "littlebit": "no codes on a grid: sign factors, whose rank is solved from the bits (LittleBit)",
}

REFINEMENTS: dict[str, str] = {  # of solver=littlebit; elsewhere refine is a number of rounds
    "none": "Dual-SVID alone (the paper's start, unusable without training)",
    "signs": "signs and scales re-fitted in turn to the calibration inputs, no gradients (ours)",
    "qat": "signs, then training by distillation from the float model (the paper's way)",
}
