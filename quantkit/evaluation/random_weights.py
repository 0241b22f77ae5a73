"""Random packed weights of any shape: what kernels are timed on. None is quantized: a shape costs nothing.

The names stand for what a method stores at its usual settings:

    int1 .. int8             `grouped_int`, groups of 128 columns, symmetric
    int1-zeros .. int8-zeros the same with stored zeros
    slim-2, slim-3           an average of 2 or 3 bits: a quarter of the groups one bit below, a quarter one above
    ptq161                   `sign_salient`: signs, means, column scales and a fifth of the columns at 4 bits
    littlebit-0.1 ..         `sign_factors`: two paths of the rank that gives these bits per weight
    casp-2, casp-4           `low_rank`: factors at 2 or 4 bits, at half of the multiplications
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from quantkit.algorithms.casp import rank_of
from quantkit.errors import RequestError
from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.low_rank import LowRankSpec
from quantkit.formats.sign_factors import SignFactorsSpec
from quantkit.formats.sign_salient import SALIENT, SignSalientSpec
from quantkit.formats.spec import Spec, with_prefix

GROUP_SIZE = 128
_NAMES = "int1 to int8, int1-zeros to int8-zeros, slim-2, slim-3, ptq161, littlebit-BITS, casp-2, casp-4"


def random_spec(name: str, out_features: int, in_features: int) -> Spec:
    """The storage of a weight ``[out_features, in_features]`` by name. Raises `RequestError` for an unknown one."""
    match = re.fullmatch(r"(int|slim-|ptq|littlebit-|casp-)(\d+(?:\.\d+)?)(-zeros)?", name)
    family, number = (match[1], match[2]) if match else ("", "")
    if in_features % (8 * GROUP_SIZE) or out_features % 8:
        raise RequestError(f"shape {out_features}x{in_features}: rows must be a multiple of 8, columns of 1024")
    if family == "int" and number in "12345678":
        return _integers(out_features, in_features, {int(number): 1.0}, symmetric=not (match and match[3]))
    if family == "slim-" and number in ("2", "3"):
        bits = int(number)
        return _integers(out_features, in_features, {bits - 1: 0.25, bits: 0.5, bits + 1: 0.25}, symmetric=False)
    if name == "ptq161":
        return _signs(out_features, in_features)
    if family == "littlebit-" and 0 < float(number) <= 4:
        return _factors(out_features, in_features, float(number))
    if family == "casp-" and number in ("2", "4"):
        rank = rank_of(out_features, in_features, 0.5) // GROUP_SIZE * GROUP_SIZE
        if not rank:
            raise RequestError(f"shape {out_features}x{in_features} is too small for {name}")
        down, up = (
            _integers(rows, columns, {int(number): 1.0}, symmetric=False)
            for rows, columns in ((rank, in_features), (out_features, rank))
        )
        return LowRankSpec(out_features=out_features, in_features=in_features, down=down, up=up)
    raise RequestError(f"unknown format {name!r}; known: {_NAMES}")


def _integers(out_features: int, in_features: int, shares: dict[int, float], symmetric: bool) -> GroupedIntSpec:
    n_groups = in_features // GROUP_SIZE
    counts = {bits: round(n_groups * share) for bits, share in shares.items()}
    counts[max(shares, key=lambda bits: shares[bits])] += n_groups - sum(counts.values())
    return GroupedIntSpec(
        out_features=out_features,
        in_features=in_features,
        group_size=GROUP_SIZE,
        segments=tuple(sorted(counts.items())),
        symmetric=symmetric,
    )


def _signs(out_features: int, in_features: int) -> SignSalientSpec:
    n_salient = in_features // 5 // (2 * GROUP_SIZE) * 2 * GROUP_SIZE
    return SignSalientSpec(
        out_features=out_features,
        in_features=in_features,
        row_means=True,
        column_scales=True,
        salient=_integers(out_features, n_salient, {4: 1.0}, symmetric=False) if n_salient else None,
    )


def _factors(out_features: int, in_features: int, bits: float) -> SignFactorsSpec:
    vectors = 32 * (out_features + in_features)  # of both paths, in bits
    rank = (out_features * in_features * bits - vectors) / (2 * (out_features + in_features + 16))
    rank = max(8, int(rank) // 8 * 8)
    return SignFactorsSpec(out_features=out_features, in_features=in_features, ranks=(rank, rank))


def random_tensors(spec: Spec, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Stored tensors of a spec: random codes and signs, scales that leave activations their size (roughly)."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in spec.tensor_layout().items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)
        elif dtype == torch.int16:  # the order of the groups
            tensors[name] = torch.randperm(shape[0], device=device, generator=generator).to(torch.int16)
        else:
            spread = 0.5 + torch.rand(shape, device=device, generator=generator)
            tensors[name] = (spread * _typical_scale(spec, name)).to(dtype)
    if isinstance(spec, SignSalientSpec) and spec.salient:
        chosen = torch.randperm(spec.in_features // 8, device=device, generator=generator)[: spec.n_salient // 8]
        columns = torch.zeros(spec.in_features // 8, dtype=torch.uint8, device=device)
        columns[chosen] = 255
        tensors["salient_columns"] = columns
        tensors |= with_prefix(SALIENT, random_tensors(spec.salient, device, seed))
        tensors = {name: tensors[name] for name in spec.tensor_layout()}
    if isinstance(spec, LowRankSpec):
        down, up = random_tensors(spec.down, device, seed), random_tensors(spec.up, device, seed + 1)
        tensors = with_prefix("down_", down) | with_prefix("up_", up)
    return tensors


def _typical_scale(spec: Spec, name: str) -> float:
    """Such that weights are about in_features ** -0.5 in size."""
    size: float = spec.in_features**-0.5
    if isinstance(spec, GroupedIntSpec):
        return size / 2 ** (max(bits for bits, _ in spec.segments) - 1) if name == "scales" else 0.5
    if isinstance(spec, SignFactorsSpec):
        return size / spec.total_rank**0.5 if name == "latent_scales" else 1.0
    if name == "row_scales":
        return size
    return 0.1 * size if name == "row_means" else 1.0
