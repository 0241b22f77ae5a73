"""Dense little-endian bit streams: the one packing that every storage format uses on disk.

Code ``i`` of a row occupies bits ``i * bits .. i * bits + bits - 1`` of that row's stream; bit ``k`` of the
stream is bit ``k % 8`` of byte ``k // 8``. A row ends on a byte; unused high bits of its last byte are zero.

    bits = 3      byte 0             byte 1             byte 2
               7 6 5 4 3 2 1 0    7 6 5 4 3 2 1 0    7 6 5 4 3 2 1 0
               c2  |c1   |c0      5|c4   |c3   |c2   c7   |c6   |c5       (c2 and c5 cross a byte)

>>> pack_bits(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3).tolist()
[[209, 88, 31]]
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 25  # int64 scratch per step: packing never needs more than this beside its input and output


def packed_size(n_codes: int, bits: int) -> int:
    """Bytes of one packed row of ``n_codes`` codes.

    >>> packed_size(11, 2)
    3
    """
    return (n_codes * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes along the last dimension.

    Args:
        codes: uint8 ``[..., n]``, every value below ``2 ** bits``.
        bits: 1 to 8.

    Returns:
        uint8 ``[..., ceil(n * bits / 8)]``.
    """
    assert codes.dtype == torch.uint8
    assert 1 <= bits <= 8
    *lead, n = codes.shape
    rows = codes.reshape(-1, n)
    out = codes.new_empty(rows.shape[0], packed_size(n, bits))
    for start, stop in _row_chunks(rows.shape[0], n):
        out[start:stop] = _pack_rows(rows[start:stop], bits)[:, : out.shape[1]]
    return out.reshape(*lead, -1)


def _pack_rows(rows: Tensor, bits: int) -> Tensor:
    """Eight codes are exactly ``bits`` bytes; 8 * 7 = 56 bits fit in an int64 (8-bit codes are bytes already)."""
    if bits == 8:
        return rows
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    octets = padded.reshape(rows.shape[0], -1, 8).to(torch.int64)
    shifts = torch.arange(8, device=rows.device) * bits
    words = (octets << shifts).sum(-1, keepdim=True)
    byte_shifts = torch.arange(bits, device=rows.device) * 8
    return ((words >> byte_shifts) & 0xFF).to(torch.uint8).flatten(1)


def unpack_bits(packed: Tensor, bits: int, n_codes: int) -> Tensor:
    """Inverse of `pack_bits`: uint8 ``[..., ceil(n_codes * bits / 8)]`` to uint8 codes ``[..., n_codes]``."""
    assert packed.dtype == torch.uint8
    assert 1 <= bits <= 8
    *lead, n_bytes = packed.shape
    assert n_bytes == packed_size(n_codes, bits), (packed.shape, bits, n_codes)
    rows = packed.reshape(-1, n_bytes)
    out = packed.new_empty(rows.shape[0], n_codes)
    for start, stop in _row_chunks(rows.shape[0], n_codes):
        out[start:stop] = _unpack_rows(rows[start:stop], bits)[:, :n_codes]
    return out.reshape(*lead, n_codes)


def _unpack_rows(rows: Tensor, bits: int) -> Tensor:
    mask = (1 << bits) - 1
    if 8 % bits == 0:  # no code crosses a byte: stay in uint8
        shifts = torch.arange(0, 8, bits, device=rows.device, dtype=torch.uint8)
        return ((rows.unsqueeze(-1) >> shifts) & mask).flatten(1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % bits))
    groups = padded.reshape(rows.shape[0], -1, bits).to(torch.int64)
    byte_shifts = torch.arange(bits, device=rows.device) * 8
    words = (groups << byte_shifts).sum(-1, keepdim=True)
    shifts = torch.arange(8, device=rows.device) * bits
    return ((words >> shifts) & mask).to(torch.uint8).flatten(1)


def _row_chunks(n_rows: int, n_codes: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // (8 * max(n_codes, 1)))
    return [(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]
