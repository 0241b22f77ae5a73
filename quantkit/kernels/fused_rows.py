"""Decoding of packed codes, in torch's own operation for tables whose rows hold codes, a scale and an offset.

``quantized::embedding_bag_2bit_unpack`` and its siblings for 4 and 8 bits take rows ``codes | scale | offset`` and
yield ``scale * code + offset`` in float32: at once what a mask, a conversion and two operations with broadcast numbers
yield in four passes. A row here is one group of columns of one output.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNPACK = {
    2: torch.ops.quantized.embedding_bag_2bit_unpack,
    4: torch.ops.quantized.embedding_bag_4bit_unpack,
    8: torch.ops.quantized.embedding_bag_byte_unpack,
}
_NUMBERS = {2: torch.float16, 4: torch.float16, 8: torch.float32}  # of scale and offset


def can_fuse(packed: Tensor, scales: Tensor, bits: int, group_size: int) -> bool:
    """Whether `FusedRows` takes codes uint8 ``[out, bytes]`` and stored scales: groups of whole bytes, on a CPU."""
    return (
        bits in _UNPACK
        and group_size * bits % 8 == 0
        and packed.device.type == "cpu"
        and torch.promote_types(scales.dtype, _NUMBERS[bits]) == _NUMBERS[bits]
    )


class FusedRows:
    """One segment of a product: x, and tiles of decoded rows.

    Args:
        x: ``[m, count, group_size]``.
        packed: uint8 ``[out, bytes]``.
        scales, zeros: float32 ``[out, count]``; zeros also ``[1, count]``.
        bits: of the codes.
        centred: whether zeros are subtracted from the codes.
    """

    def __init__(self, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bits: int, centred: bool) -> None:
        self.x, self.bits, self.n_columns = x.flatten(1), bits, x.shape[1] * x.shape[2]
        n_bytes = x.shape[2] * bits // 8
        packed, self.out_features = packed.contiguous(), len(packed)
        self._word = torch.int32 if n_bytes % 4 == 0 and packed.storage_offset() % 4 == 0 else torch.uint8
        self._packed = packed.view(self._word).view(*scales.shape, -1)
        offsets = scales * -zeros if centred else torch.zeros_like(scales)
        kept = offsets.to(_NUMBERS[bits])
        # what two bytes cannot hold is added to the decoded row instead
        self._offsets = None if torch.equal(kept.float(), offsets) else offsets
        kept = kept if self._offsets is None else torch.zeros_like(kept)
        self._tails = torch.stack([scales.to(kept.dtype), kept], -1).view(self._word)

    def new_tile(self, rows: int) -> Tensor:
        """Scratch of `decode` for as many rows."""
        _, count, n_words = self._packed.shape
        return self._packed.new_empty(rows, count, n_words + self._tails.shape[2])

    def decode(self, rows: slice, tile: Tensor) -> Tensor:
        """Codes (minus zeros) times scales, float32 ``[rows, n_columns]``."""
        packed = self._packed[rows]
        fused = tile[: len(packed)]
        fused[..., : packed.shape[2]] = packed
        fused[..., packed.shape[2] :] = self._tails[rows]
        weight: Tensor = _UNPACK[self.bits](fused.view(torch.uint8).flatten(0, 1))
        if self._offsets is not None:
            weight.add_(self._offsets[rows].reshape(-1, 1))
        return weight.view(len(packed), self.n_columns)
