"""planar-16: how a GPU holds `grouped_int` codes in memory, and the exact way back to the stored bytes.

A word is an int16 with E = 16 / bits fields. The columns of a segment are cut into *planes* of W consecutive columns
(W divides the group size, so a plane has one scale per row), and E planes share the W words of a *block*: word j of
block B holds the columns (B * E + e) * W + j of its planes e. Even planes lie in the low byte, odd ones in the high:

     4 bits   15    12 11     8 7      4 3      0        word 0: columns 0, W, 2W, 3W of the block
             | plane 3 | plane 1 | plane 2 | plane 0 |   word 1: columns 1, W+1, 2W+1, 3W+1

Neighbouring words hold neighbouring columns: one AND over packed words yields a whole plane as matrix operand, and
nothing is shuffled. Where 2 W divides the group size, one AND over two words also yields four bytes of one group, the
operand of a four-byte integer product (`is_paired`).

Three bits take three words per 16 columns. Each byte has two fields, at bits 0 and 3, and two bits to spare: word t
holds planes 4t .. 4t+3; planes 12 and 13 have their two low bits in the spare bits of word 0 and the third in the first
of word 1, planes 14 and 15 in word 2 and the second of word 1. A block is then W words t=0, W words t=1, W words t=2.

    planar          int16  [words]             segments one after the other; each [rows, blocks * W (* 3)], row-major
    planar_scales   float16 [groups, rows]     stored group order, as in the file
    planar_zeros    uint8 or float16 [groups, rows]   only if some zero is not the constant of its width; float16 if
                                               there is a 1-bit segment
    planar_order    int16  [groups]            stored to original group, only with several segments
    counters        int32                      zeros; scratch of the kernel, which leaves zeros behind

``rows`` is out_features rounded up to `ROW_TILE`, blocks are padded with zero codes, ``groups`` covers the padding of
the last segment: kernels load words, scales and zeros without masks. Widths 5, 6 and 7 become 8-bit planes (their
stored bytes are restored exactly). Group sizes that are no multiple of 16 have no planar form; such modules keep the
stored tensors and use the torch twin.

>>> spec = GroupedIntSpec(out_features=1, in_features=64, group_size=16, segments=((4, 4),), symmetric=True)
>>> codes = torch.arange(64, dtype=torch.uint8).reshape(1, 64) // 4  # plane e of word j: 4 * e + j // 4
>>> tensors = {"codes_4b": pack_bits(codes, 4), "scales": torch.ones(1, 4, dtype=torch.float16)}
>>> [f"{word & 0xFFFF:04x}" for word in to_planar(spec, tensors)["planar"][:8].tolist()]
['c480', 'c480', 'c480', 'c480', 'd591', 'd591', 'd591', 'd591']
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantkit.formats.grouped_int import GroupedIntSpec, segment_codes, stored_zeros
from quantkit.formats.packing import pack_bits

ROW_TILE = 64  # rows are padded to this, the largest row tile of any kernel
MIN_PLANE_WIDTH = 16  # the tensor core takes 16 columns at a time
_PLANE_WIDTH = 64  # preferred W
_BIT_WIDTH = 32  # the same for one bit in several groups: half as many of them in a word (bit_gemv_triton.py)
_NARROW_WIDTH = 32  # below this loads are short and slow: only where the group size has no larger power of two
_MAX_PADDING = 1 / 8  # a narrower plane is used where whole blocks of the preferred one would pad more than this
_CHUNK_BYTES = 1 << 26  # int32 scratch while packing or unpacking


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanarSegment:
    """Consecutive stored groups that share a planar width, and where their words lie."""

    bits: int  # 1, 2, 3, 4 or 8
    stored: tuple[tuple[int, int], ...]  # (stored bits, number of groups): several pieces only for 5 to 8 bits
    first_group: int
    n_groups: int
    plane_width: int
    n_planes: int  # that hold columns; the last block may have more, padded with zero codes
    n_blocks: int
    word_offset: int
    row_words: int

    @property
    def planes_per_block(self) -> int:
        return planes_per_block(self.bits)


def planes_per_block(bits: int) -> int:
    return 16 if bits == 3 else 16 // bits


def is_planar(spec: GroupedIntSpec) -> bool:
    """Whether the module has a planar form."""
    return spec.group_size % MIN_PLANE_WIDTH == 0


def is_paired(spec: GroupedIntSpec) -> bool:
    """Whether planes 2i and 2i + 1 of a block always belong to one group."""
    return spec.group_size % (2 * MIN_PLANE_WIDTH) == 0


def padded_rows(spec: GroupedIntSpec) -> int:
    return -(-spec.out_features // ROW_TILE) * ROW_TILE


def padded_groups(spec: GroupedIntSpec) -> int:
    """Groups that the blocks of any segment reach into; the padding of a segment reads the next one's scales."""
    reached = [
        segment.first_group * spec.group_size + segment.n_blocks * segment.planes_per_block * segment.plane_width
        for segment in planar_segments(spec)
    ]
    return -(-max(reached) // spec.group_size)


def has_zeros(spec: GroupedIntSpec) -> bool:
    """Whether ``planar_zeros`` exists: a symmetric 5-bit zero is not the constant of the 8-bit plane that holds it."""
    return not spec.symmetric or any(4 < bits < 8 for bits, _ in spec.segments)


@lru_cache(maxsize=1024)
def planar_segments(spec: GroupedIntSpec) -> tuple[PlanarSegment, ...]:
    """Where `to_planar` puts the segments of ``spec``; a function of the spec alone."""
    assert is_planar(spec)
    merged: dict[int, list[tuple[int, int]]] = {}
    for bits, count in spec.segments:
        merged.setdefault(8 if bits > 4 else bits, []).append((bits, count))
    segments = []
    first_group = word_offset = 0
    for bits, stored in merged.items():
        n_groups = sum(count for _, count in stored)
        n_columns = n_groups * spec.group_size
        width = _plane_width(bits, n_columns, spec.group_size)
        n_blocks = -(-n_columns // (planes_per_block(bits) * width))
        row_words = n_blocks * width * (3 if bits == 3 else 1)
        segment = PlanarSegment(
            bits=bits,
            stored=tuple(stored),
            first_group=first_group,
            n_groups=n_groups,
            plane_width=width,
            n_planes=n_columns // width,
            n_blocks=n_blocks,
            word_offset=word_offset,
            row_words=row_words,
        )
        segments.append(segment)
        first_group += n_groups
        word_offset += padded_rows(spec) * row_words
    return tuple(segments)


def _plane_width(bits: int, n_columns: int, group_size: int) -> int:
    """The widest plane of which two make up a part of a group, and which pads little; else the least padding."""
    mixed = bits == 1 and group_size < n_columns and group_size % (16 * _PLANE_WIDTH) != 0
    largest = min(_BIT_WIDTH if mixed else _PLANE_WIDTH, max((group_size & -group_size) // 2, MIN_PLANE_WIDTH))
    widths = [width for width in (64, 32, 16) if width <= largest and (width >= _NARROW_WIDTH or width == largest)]
    padding = {width: -n_columns % (planes_per_block(bits) * width) for width in widths}
    fits = [width for width, columns in padding.items() if columns <= _MAX_PADDING * n_columns]
    return fits[0] if fits else min(padding, key=lambda width: padding[width])


def to_planar(spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stored tensors to planar ones, on the same device. Without a planar form the stored tensors are returned.

    Args:
        spec: shape and widths.
        tensors: exactly those of ``spec.tensor_layout()``.

    Returns:
        The tensors of the module docstring; no memory is shared with the arguments.
    """
    if not is_planar(spec):
        return dict(tensors)
    segments = planar_segments(spec)
    rows = padded_rows(spec)
    n_words = segments[-1].word_offset + rows * segments[-1].row_words
    words = torch.zeros(n_words, dtype=torch.int16, device=tensors["scales"].device)
    for segment in segments:
        _fill_segment(_segment_words(words, rows, segment), segment, spec, tensors)
    padding = (0, padded_groups(spec) - spec.n_groups, 0, rows - spec.out_features)
    planar = {"planar": words, "planar_scales": pad(tensors["scales"], padding).t().contiguous()}
    if has_zeros(spec):
        dtype = torch.float16 if spec.segments[0][0] == 1 else torch.uint8
        planar["planar_zeros"] = pad(stored_zeros(spec, tensors).to(dtype), padding).t().contiguous()
    if "group_order" in tensors:
        planar["planar_order"] = pad(tensors["group_order"], padding[:2])
    planar["counters"] = torch.zeros(rows // 2, dtype=torch.int32, device=words.device)
    return planar


def from_planar(spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Exact inverse of `to_planar`: the stored tensors, byte for byte."""
    if not is_planar(spec):
        return dict(tensors)
    n_rows = spec.out_features
    stored: dict[str, Tensor] = {"scales": tensors["planar_scales"][: spec.n_groups, :n_rows].t().contiguous()}
    for segment in planar_segments(spec):
        words = _segment_words(tensors["planar"], padded_rows(spec), segment)
        first_group = 0
        for bits, count in segment.stored:
            columns = slice(first_group * spec.group_size, (first_group + count) * spec.group_size)
            stored[f"codes_{bits}b"] = _pack_columns(words[:n_rows], segment, columns, bits)
            if not spec.symmetric:
                group = segment.first_group + first_group
                zeros = tensors["planar_zeros"][group : group + count].t()[:n_rows].contiguous()
                stored[f"zeros_{bits}b"] = zeros if bits == 1 else pack_bits(zeros.to(torch.uint8).flatten(), bits)
            first_group += count
    if "planar_order" in tensors:
        stored["group_order"] = tensors["planar_order"][: spec.n_groups]
    return {name: stored[name] for name in spec.tensor_layout()}


def planar_rows(rows: Tensor, spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Some rows of a weight of one segment: codes ``[n, in]``, scales and zeros ``[n, groups]`` (symmetric: None)."""
    (segment,) = planar_segments(spec)
    words = _segment_words(tensors["planar"], padded_rows(spec), segment)[rows].to(torch.int32) & 0xFFFF
    parts = (3,) if segment.bits == 3 else ()
    shape = (len(rows), segment.n_blocks, *parts, segment.plane_width)
    codes = _planes_from_words(words.view(shape), segment.bits).flatten(1)[:, : spec.in_features]
    scales = tensors["planar_scales"][: spec.n_groups, rows].t()
    if spec.symmetric:
        return codes, scales, None
    return codes, scales, tensors["planar_zeros"][: spec.n_groups, rows].t()


def _segment_words(words: Tensor, rows: int, segment: PlanarSegment) -> Tensor:
    """A segment's words as a view ``[rows, row_words]``."""
    return words[segment.word_offset :][: rows * segment.row_words].view(rows, segment.row_words)


def _row_chunks(n_rows: int, n_columns: int) -> list[slice]:
    step = max(1, _CHUNK_BYTES // (4 * n_columns))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _fill_segment(words: Tensor, segment: PlanarSegment, spec: GroupedIntSpec, tensors: dict[str, Tensor]) -> None:
    """Write the codes of a segment into ``words`` [rows, row_words]."""
    pieces = [segment_codes(spec, tensors, bits) for bits, _ in segment.stored]
    n_columns = segment.n_blocks * segment.planes_per_block * segment.plane_width
    for rows in _row_chunks(spec.out_features, n_columns):
        codes = torch.cat([piece[rows] for piece in pieces], dim=1)
        codes = pad(codes, (0, n_columns - codes.shape[1]))
        planes = codes.view(len(codes), segment.n_blocks, segment.planes_per_block, segment.plane_width)
        words[rows] = _words_from_planes(planes.to(torch.int32), segment.bits).flatten(1).to(torch.int16)


def _field_bits(n_planes: int, bits: int, device: torch.device) -> Tensor:
    """Bit position of each plane inside its word, ``[n_planes, 1]``; 3 bits: of the first 12 planes, at most."""
    plane = torch.arange(n_planes, device=device, dtype=torch.int32)
    pair = plane // 2 % 2 if bits == 3 else plane // 2
    return (plane % 2 * 8 + pair * bits)[:, None]


def _words_from_planes(planes: Tensor, bits: int) -> Tensor:
    """int32 ``[rows, blocks, E, W]`` to words ``[rows, blocks, W]`` (3 bits: ``[rows, blocks, 3, W]``)."""
    if bits != 3:
        return torch.sum(planes << _field_bits(planes.shape[2], bits, planes.device), 2, dtype=torch.int32)
    fields = planes[:, :, :12] << _field_bits(12, 3, planes.device)
    words = torch.sum(fields.view(*planes.shape[:2], 3, 4, -1), 3, dtype=torch.int32)
    byte = torch.tensor([0, 8], device=planes.device, dtype=torch.int32)[:, None]
    for first, word, spare in ((12, 0, 6), (14, 2, 7)):  # two low bits in `word`, the third in bit `spare` of word 1
        pair = planes[:, :, first : first + 2]
        words[:, :, word] += torch.sum((pair & 3) << (byte + 6), 2, dtype=torch.int32)
        words[:, :, 1] += torch.sum((pair >> 2) << (byte + spare), 2, dtype=torch.int32)
    return words


def _planes_from_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `_words_from_planes`: int32 words to uint8 codes ``[rows, blocks, E, W]``."""
    if bits != 3:
        return (words.unsqueeze(2) >> _field_bits(16 // bits, bits, words.device) & (1 << bits) - 1).to(torch.uint8)
    fields = words.repeat_interleave(4, 2) >> _field_bits(12, 3, words.device) & 7
    byte = torch.tensor([0, 8], device=words.device, dtype=torch.int32)[:, None]
    pairs = [
        (words[:, :, [word]] >> (byte + 6) & 3) | (words[:, :, [1]] >> (byte + spare) & 1) << 2
        for word, spare in ((0, 6), (2, 7))
    ]
    return torch.cat([fields, *pairs], dim=2).to(torch.uint8)


def _pack_columns(words: Tensor, segment: PlanarSegment, columns: slice, bits: int) -> Tensor:
    """The bit stream ``[rows, bytes]`` of some columns of a segment."""
    parts = (3,) if segment.bits == 3 else ()
    packed = []
    for rows in _row_chunks(len(words), segment.n_blocks * segment.planes_per_block * segment.plane_width):
        chunk = words[rows].to(torch.int32) & 0xFFFF
        planes = _planes_from_words(chunk.view(len(chunk), -1, *parts, segment.plane_width), segment.bits)
        packed.append(pack_bits(planes.flatten(1)[:, columns], bits))
    return torch.cat(packed)
