"""Random weights of the sign formats, as plain functions of a seed and as hypothesis strategies."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from packed_models import round_to_nearest
from packed_weights import random_weight as random_grouped_int
from torch import Tensor

from quantkit.formats.sign_factors import SignFactors
from quantkit.formats.sign_salient import SignSalient


def _signs(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator) < 0.5


def _scales(generator: torch.Generator, *shape: int) -> Tensor:
    """Of either sign over two decades, one of them zero and one the smallest that float16 has."""
    scales = 10 ** (2 * torch.rand(*shape, generator=generator) - 2) * torch.randn(*shape, generator=generator).sign()
    scales.view(-1)[shape[-1] // 2] = 0.0
    scales.view(-1)[-1] = 2.0**-24
    return scales.half().float()


def random_sign_salient(
    seed: int,
    out_features: int,
    n_binary: int,
    *,
    row_means: bool = False,
    column_scales: bool = False,
    salient_bits: tuple[int, ...] = (),
    salient_group: int = 1,
) -> SignSalient:
    """``salient_bits[g]`` for group g of ``salient_group`` salient columns; they lie anywhere in the row."""
    generator = torch.Generator().manual_seed(seed)
    n_salient = salient_group * len(salient_bits)
    mask = torch.zeros(n_binary + n_salient, dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=generator)[:n_salient]] = True
    return SignSalient(
        signs=_signs(generator, out_features, n_binary),
        row_scales=_scales(generator, out_features),
        row_means=_scales(generator, out_features) if row_means else None,
        column_scales=_scales(generator, n_binary) if column_scales else None,
        salient_mask=mask if n_salient else None,
        salient=random_grouped_int(seed, out_features, salient_group, salient_bits) if n_salient else None,
    )


def random_sign_factors(seed: int, out_features: int, in_features: int, ranks: tuple[int, ...]) -> SignFactors:
    generator = torch.Generator().manual_seed(seed)
    return SignFactors(
        u_signs=_signs(generator, out_features, sum(ranks)),
        v_signs=_signs(generator, sum(ranks), in_features),
        row_scales=_scales(generator, len(ranks), out_features),
        latent_scales=_scales(generator, sum(ranks)),
        column_scales=_scales(generator, len(ranks), in_features),
        ranks=ranks,
    )


def binarized(weight: Tensor, n_salient: int = 0, group_size: int = 8) -> SignSalient:
    """Sign and mean magnitude of each row; the columns of largest norm at 4 bits."""
    mask = torch.zeros(weight.shape[1], dtype=torch.bool)
    mask[weight.float().norm(dim=0).topk(n_salient).indices] = True
    rest = weight.float()[:, ~mask]
    means = rest.mean(1).half().float()
    widths = (4,) * (n_salient // group_size)
    return SignSalient(
        signs=rest > means[:, None],
        row_scales=(rest - means[:, None]).abs().mean(1).half().float(),
        row_means=means,
        column_scales=torch.linspace(0.9, 1.1, rest.shape[1]).half().float(),
        salient_mask=mask if n_salient else None,
        salient=round_to_nearest(weight[:, mask], widths) if n_salient else None,
    )


def factorized(weight: Tensor, ranks: tuple[int, ...]) -> SignFactors:
    """Signs of the singular vectors of what the paths before leave, all scales from the magnitudes' means."""
    rest, paths = weight.float(), []
    for rank in ranks:
        U, S, Vt = torch.linalg.svd(rest, full_matrices=False)
        A, B = U[:, :rank] * S[:rank].sqrt(), S[:rank, None].sqrt() * Vt[:rank]
        row, column = A.abs().mean(1).half().float(), B.abs().mean(0).half().float()
        latent = (A.abs().mean(0) * B.abs().mean(1) / (A.abs().mean() * B.abs().mean())).half().float()
        path = SignFactors(
            u_signs=A >= 0,
            v_signs=B >= 0,
            row_scales=row[None],
            latent_scales=latent,
            column_scales=column[None],
            ranks=(rank,),
        )
        rest = rest - path.dequantize()
        paths.append(path)
    return SignFactors(
        u_signs=torch.cat([path.u_signs for path in paths], 1),
        v_signs=torch.cat([path.v_signs for path in paths]),
        row_scales=torch.cat([path.row_scales for path in paths]),
        latent_scales=torch.cat([path.latent_scales for path in paths]),
        column_scales=torch.cat([path.column_scales for path in paths]),
        ranks=ranks,
    )


SIGN_SALIENT = st.builds(
    random_sign_salient,
    seed=st.integers(0, 2**31),
    out_features=st.integers(1, 9),
    n_binary=st.integers(1, 40),
    row_means=st.booleans(),
    column_scales=st.booleans(),
    salient_bits=st.lists(st.integers(1, 8), max_size=3).map(tuple),
    salient_group=st.integers(1, 9),
)
SIGN_FACTORS = st.builds(
    random_sign_factors,
    seed=st.integers(0, 2**31),
    out_features=st.integers(1, 20),
    in_features=st.integers(1, 20),
    ranks=st.lists(st.integers(1, 19), min_size=1, max_size=2).map(tuple),
)
