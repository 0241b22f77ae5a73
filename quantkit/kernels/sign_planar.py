"""How a GPU holds the sign formats: sign matrices as one-bit planar-16 words (planar.py), and the exact way back.

A sign matrix is the symmetric one-bit `grouped_int` weight with one group per row and twice the row's scale; columns
are padded to a multiple of 64 or 128, so that every matrix has a planar form. What pads them meets activations of zero.

    sign_factors    v_planar, v_scales, v_counters    V of all paths, [paths * span, in]; `span` rows for each path
                    u_planar, u_scales, u_counters    U side by side, [out, paths * span], one group per path
                    x_scales      float16 [paths, in, padded]    column scales; 0 in padding
                    z_scales      float32 [paths * span]         latent scales; 0 in padding
    sign_salient    planar, sign_scales, sign_zeros, counters    the columns with signs; zeros only with means
                    salient_planar, salient_planar_scales, ...   the `grouped_int` part as `to_planar` leaves it
                    x_order       int32   [columns as the kernel reads them]; beyond the last column: padding
                    x_scales      float32 [the same]             column scales, 1 for salient columns, 0 for padding
                    x_places, x_factors    [cells]               both for one row of x, where it has kernels of its own
    both            the stored vectors, as they are
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.formats.packing import pack_bits, unpack_bits
from quantkit.formats.sign_factors import SignFactorsSpec
from quantkit.formats.sign_salient import SALIENT, SignSalientSpec, salient_mask
from quantkit.formats.spec import with_prefix, without_prefix
from quantkit.kernels.planar import from_planar, is_planar, padded_groups, to_planar
from quantkit.kernels.ready_row import SignParts, row_table
from quantkit.kernels.sign_rows import has_sign_rows

_COLUMNS = 128  # two planes of the preferred width
_RANKS = 64  # two planes of half that width
_NO_SCALE = 2.0**-100  # stands for a scale of 0 where a zero in code units must still give the mean


def sign_spec(out_features: int, in_features: int, n_groups: int = 1) -> GroupedIntSpec:
    """The one-bit weight that a sign matrix is."""
    return GroupedIntSpec(
        out_features=out_features,
        in_features=in_features,
        group_size=in_features // n_groups,
        segments=((1, n_groups),),
        symmetric=True,
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _repack(signs: Tensor, n: int, rows: int, columns: int) -> Tensor:
    """Packed sign rows of ``n`` columns, padded with zero bits to ``[rows, columns / 8]``."""
    bits = unpack_bits(signs, 1, n)
    return pack_bits(pad(bits, (0, columns - n, 0, rows - len(bits))), 1)


def _half(numbers: Tensor) -> Tensor:
    """As float16, which the one-row kernels read, where every number has one that is not zero unless it is."""
    half = numbers.half()
    kept = torch.isfinite(half) & ((half == 0) == (numbers == 0))
    return half if bool(kept.all()) else numbers


# sign_factors


def always(spec: SignFactorsSpec) -> bool:
    """Whether there is a planar form."""
    return True


def latent_span(spec: SignFactorsSpec) -> int:
    """Latents that each path is given in the planar form."""
    return _round_up(max(spec.ranks), _RANKS)


@lru_cache(maxsize=1024)
def factor_specs(spec: SignFactorsSpec) -> tuple[GroupedIntSpec, GroupedIntSpec]:
    """V and U as one-bit weights."""
    n_paths = len(spec.ranks)
    latents = n_paths * latent_span(spec)
    v = sign_spec(latents, _round_up(spec.in_features, _COLUMNS))
    return v, sign_spec(spec.out_features, latents, n_paths)


def factors_to_planar(spec: SignFactorsSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    v, u = factor_specs(spec)
    span, device = latent_span(spec), tensors["v_signs"].device
    v_rows = torch.split(tensors["v_signs"], list(spec.ranks))
    u_columns = torch.split(unpack_bits(tensors["u_signs"], 1, spec.total_rank), list(spec.ranks), dim=1)
    v_codes = torch.cat([_repack(rows, spec.in_features, span, v.in_features) for rows in v_rows])
    u_codes = pack_bits(torch.cat([pad(columns, (0, span - columns.shape[1])) for columns in u_columns], 1), 1)
    twice = torch.full((v.out_features, 1), 2.0, dtype=torch.float16, device=device)
    planar: dict[str, Tensor] = {}
    planar |= with_prefix("v_", _renamed(to_planar(v, {"codes_1b": v_codes, "scales": twice})))
    u_scales = _half(2 * tensors["row_scales"].float().t())
    planar |= with_prefix("u_", _renamed(to_planar(u, {"codes_1b": u_codes, "scales": u_scales})))
    planar["x_scales"] = pad(tensors["column_scales"], (0, v.in_features - spec.in_features))
    latents = torch.split(tensors["latent_scales"].float(), list(spec.ranks))
    planar["z_scales"] = torch.cat([pad(scales, (0, span - len(scales))) for scales in latents])
    return planar | {name: tensors[name] for name in ("column_scales", "latent_scales", "row_scales")}


def factors_from_planar(spec: SignFactorsSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    v, u = factor_specs(spec)
    span = latent_span(spec)
    v_codes = from_planar(v, factor(tensors, "v_"))["codes_1b"]
    u_codes = from_planar(u, factor(tensors, "u_"))["codes_1b"]
    v_rows = [rows[:rank] for rows, rank in zip(torch.split(v_codes, span), spec.ranks, strict=True)]
    columns = torch.split(unpack_bits(u_codes, 1, u.in_features), span, dim=1)
    u_bits = torch.cat([part[:, :rank] for part, rank in zip(columns, spec.ranks, strict=True)], 1)
    v_bits = unpack_bits(torch.cat(v_rows), 1, v.in_features)[:, : spec.in_features]
    stored = {"v_signs": pack_bits(v_bits.contiguous(), 1), "u_signs": pack_bits(u_bits, 1)}
    return {name: stored[name] if name in stored else tensors[name] for name in spec.tensor_layout()}


def factor(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One factor's tensors under the names that `grouped_int`'s kernels know."""
    names = {"planar": "planar", "planar_scales": "scales", "counters": "counters"}
    return {name: tensors[f"{prefix}{ours}"] for name, ours in names.items()}


def _renamed(planar: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"planar": planar["planar"], "scales": planar["planar_scales"], "counters": planar["counters"]}


# sign_salient


def has_planar_form(spec: SignSalientSpec) -> bool:
    """Salient columns of one width, in groups that have a planar form; without salient columns always."""
    return spec.salient is None or (len(spec.salient.segments) == 1 and is_planar(spec.salient))


def binary_spec(spec: SignSalientSpec) -> GroupedIntSpec:
    """The columns with signs as a one-bit weight."""
    return sign_spec(spec.out_features, _round_up(spec.n_binary, _COLUMNS))


@lru_cache(maxsize=1024)
def salient_parts(spec: SignSalientSpec) -> SignParts:
    """The parts as the kernels for one row of x see them."""
    return SignParts(signs=binary_spec(spec), integers=spec.salient)


def row_signs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns with signs under the names that these kernels know."""
    signs = {"words": tensors["planar"], "scales": tensors["row_scales"]}
    return signs | ({"means": tensors["row_means"]} if "row_means" in tensors else {})


def salient_to_planar(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not has_planar_form(spec):
        return dict(tensors)
    binary, device = binary_spec(spec), tensors["signs"].device
    codes = _repack(tensors["signs"], spec.n_binary, spec.out_features, binary.in_features)
    alpha = tensors["row_scales"].float()
    scales = torch.where(alpha == 0, _NO_SCALE, 2 * alpha) if spec.row_means else 2 * alpha
    signs = to_planar(binary, {"codes_1b": codes, "scales": _half(scales)[:, None]})
    planar = {"planar": signs["planar"], "sign_scales": signs["planar_scales"], "counters": signs["counters"]}
    if spec.row_means:  # alpha (2 c - 1) + mu = 2 alpha (c - zero)
        zeros = (alpha - tensors["row_means"].float()) / scales
        rows = signs["planar_scales"].shape[1]
        planar["sign_zeros"] = zeros.new_zeros(padded_groups(binary), rows)
        planar["sign_zeros"][0, : spec.out_features] = zeros
    order = torch.full((binary.in_features + spec.n_salient,), spec.in_features, dtype=torch.int32, device=device)
    x_scales = torch.zeros(len(order), device=device)
    mask = salient_mask(spec, tensors)
    if mask is None:
        mask = torch.zeros(spec.in_features, dtype=torch.bool, device=device)
    order[: spec.n_binary] = (~mask).nonzero()[:, 0].to(torch.int32)
    x_scales[: spec.n_binary] = tensors["column_scales"].float() if spec.column_scales else 1.0
    if spec.salient:
        order[binary.in_features :] = mask.nonzero()[:, 0].to(torch.int32)
        x_scales[binary.in_features :] = 1.0
        part = to_planar(spec.salient, without_prefix(SALIENT, tensors))
        planar |= with_prefix(SALIENT, part)
    planar |= {"x_order": order, "x_scales": x_scales}
    parts = salient_parts(spec)
    if has_sign_rows(parts):
        ends = [binary.in_features, spec.n_salient]
        columns = torch.split(torch.where(order < spec.in_features, order, -1), ends)
        planar["x_places"], planar["x_factors"] = row_table(parts, columns, torch.split(x_scales, ends))
    kept = ("row_scales", "row_means", "column_scales", "salient_columns")
    return planar | {name: tensors[name] for name in kept if name in tensors}


def salient_from_planar(spec: SignSalientSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not has_planar_form(spec):
        return dict(tensors)
    binary = binary_spec(spec)
    bits = unpack_bits(from_planar(binary, binary_part(tensors))["codes_1b"], 1, binary.in_features)
    stored = {"signs": pack_bits(bits[:, : spec.n_binary].contiguous(), 1)}
    if spec.salient:
        stored |= with_prefix(SALIENT, from_planar(spec.salient, without_prefix(SALIENT, tensors)))
    return {name: stored[name] if name in stored else tensors[name] for name in spec.tensor_layout()}


def binary_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The columns with signs, without their means, under the names that `grouped_int`'s kernels know."""
    names = {"planar": "planar", "planar_scales": "sign_scales", "counters": "counters"}
    return {name: tensors[ours] for name, ours in names.items()}
