"""Pages of quantized keys and values: the storage format of the KV cache.

A page holds up to 128 tokens of every KV head of one layer. Codes are packed in int16 words, planar along tokens: with
``E = 16 / bits`` fields in a word and runs of ``R = 128 / E`` tokens, field ``e`` of word ``j`` is token ``e * R + j``.

    bits = 4, E = 4, R = 32          bit 15   12 11    8 7     4 3     0
    word j of a channel               | token  | token  | token | token |
                                      | 96 + j | 64 + j |32 + j |   j   |

    key_words     int16 [heads, pages, R, head_dim]      a row of one token of each run, channels contiguous
    value_words   int16 [heads, pages, head_dim, R]      a row of one channel, tokens contiguous

so that one AND yields the codes of R consecutive tokens, ready as a matrix operand in both products of attention. A
code c stands for ``scale * c + offset``; a symmetric grid has no stored offset, it is ``-scale * (2**bits - 1) / 2``.
Scales and offsets are float16, and the codes were computed with the rounded ones:

    per token      [heads, head_dim / group, pages * 128]   `group` channels of a token share a scale
                   [1, 1, pages * 128]                      all heads share it (`shared`)
                   in a page: those of the E tokens of word 0, of word 1, ... (`scale_places`)
    per channel    [heads, pages * 128 / group, head_dim]   `group` consecutive tokens share it

Keys and values lie in tensors of their own, so that an estimate of the attention scores can be made from the key codes
alone (sparse attention), and per-channel key scales bound a page's keys: offset <= key <= offset + scale * (2**bits-1).
Fields of tokens that are not there yet are zero, and so are their scales.

>>> spec = PageSpec(heads=1, head_dim=2, bits=4, keys=GridSpec(group=2), values=GridSpec(group=2))
>>> [hex(int(word)) for word in pack_keys(torch.tensor([[[1, 2]] + [[0, 0]] * 31 + [[3, 4]]]), spec)[0, 0, 0]]
['0x31', '0x42']
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor

PAGE = 128  # tokens
WIDTHS = (2, 4, 8)  # bits of a code: fields do not cross words

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSpec:
    """Which elements share a scale."""

    axis: Literal["token", "channel"] = "token"
    group: int  # token: channels of one token that share a scale; channel: consecutive tokens that do
    offsets: bool = False  # stored, else the grid is symmetric about 0
    shared: bool = False  # token only: one scale for all heads and channels

    def for_head(self, head_dim: int) -> GridSpec:
        """The grid with a group per token that is the head: where it was 0, or larger than the head."""
        whole = self.axis == "token" and not 0 < self.group <= head_dim
        return replace(self, group=head_dim) if whole else self


@dataclass(frozen=True, slots=True, kw_only=True)
class PageSpec:
    """Shape and storage of the pages of one precision."""

    heads: int
    head_dim: int
    bits: int
    keys: GridSpec
    values: GridSpec

    def __post_init__(self) -> None:
        assert self.bits in WIDTHS
        for grid in (self.keys, self.values):
            divided = self.head_dim if grid.axis == "token" else PAGE
            assert grid.shared or divided % grid.group == 0, (self.head_dim, grid)

    @property
    def fields(self) -> int:
        """Codes in a word."""
        return 16 // self.bits

    @property
    def run(self) -> int:
        """Consecutive tokens of one field."""
        return PAGE // self.fields

    def layout(self, n_pages: int) -> Layout:
        """Name, dtype and shape of every stored tensor."""
        layout: Layout = {
            "key_words": (torch.int16, (self.heads, n_pages, self.run, self.head_dim)),
            "value_words": (torch.int16, (self.heads, n_pages, self.head_dim, self.run)),
        }
        for name, grid in (("key", self.keys), ("value", self.values)):
            shape = self.scale_shape(grid, n_pages)
            layout[f"{name}_scales"] = (torch.float16, shape)
            if grid.offsets:
                layout[f"{name}_offsets"] = (torch.float16, shape)
        return layout

    def scale_shape(self, grid: GridSpec, n_pages: int) -> tuple[int, ...]:
        """Shape of the scales of a grid; see the picture above."""
        n = n_pages * PAGE
        if grid.shared:
            return (1, 1, n)
        return (
            (self.heads, self.head_dim // grid.group, n)
            if grid.axis == "token"
            else (self.heads, n // grid.group, self.head_dim)
        )

    def page_bytes(self) -> int:
        """Bytes of one page: codes, scales, offsets."""
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.layout(1).values())

    @property
    def bits_per_element(self) -> float:
        """Stored bits for each element of a full page, keys and values together."""
        return 8 * self.page_bytes() / (2 * PAGE * self.heads * self.head_dim)


def pack_keys(codes: Tensor, spec: PageSpec) -> Tensor:
    """Integer codes [heads, n, head_dim], from the start of a page on, to int16 words; missing tokens are 0."""
    planes = _planes(codes, spec)  # [heads, pages, fields, run, head_dim]
    return _join(planes, spec)


def pack_values(codes: Tensor, spec: PageSpec) -> Tensor:
    """As `pack_keys`, with the words of a channel contiguous."""
    return _join(_planes(codes, spec).transpose(-1, -2), spec)


def _planes(codes: Tensor, spec: PageSpec) -> Tensor:
    heads, n, head_dim = codes.shape
    padded = torch.nn.functional.pad(codes, (0, 0, 0, -n % PAGE))
    return padded.reshape(heads, -1, spec.fields, spec.run, head_dim)


def _join(planes: Tensor, spec: PageSpec) -> Tensor:
    shifts = torch.arange(spec.fields, device=planes.device, dtype=torch.int32)[:, None, None] * spec.bits
    return (planes.to(torch.int32) << shifts).sum(2, dtype=torch.int32).to(torch.int16)  # wraps into the sign bit


def unpack_keys(words: Tensor, spec: PageSpec) -> Tensor:
    """int16 [heads, pages, run, head_dim] to codes uint8 [heads, pages * 128, head_dim]."""
    return _split(words, spec).reshape(words.shape[0], -1, spec.head_dim)


def unpack_values(words: Tensor, spec: PageSpec) -> Tensor:
    """int16 [heads, pages, head_dim, run] to codes uint8 [heads, pages * 128, head_dim]."""
    return _split(words.transpose(-1, -2), spec).reshape(words.shape[0], -1, spec.head_dim)


def _split(words: Tensor, spec: PageSpec) -> Tensor:
    """[heads, pages, run, head_dim] to [heads, pages, fields, run, head_dim]."""
    shifts = torch.arange(spec.fields, device=words.device, dtype=torch.int16)[:, None, None] * spec.bits
    return ((words.unsqueeze(2) >> shifts) & ((1 << spec.bits) - 1)).to(torch.uint8)


def scale_places(start: int, stop: int, spec: PageSpec, device: torch.device) -> Tensor:
    """Where the scales per token of the slots start .. stop - 1 lie: those of the tokens of a word are neighbours.

    >>> spec = PageSpec(heads=1, head_dim=2, bits=4, keys=GridSpec(group=2), values=GridSpec(group=2))
    >>> scale_places(127, 130, spec, torch.device("cpu")).tolist()
    [127, 128, 132]
    """
    slot = torch.arange(start, stop, device=device)
    places: Tensor = slot // PAGE * PAGE + slot % spec.run * spec.fields + slot % PAGE // spec.run
    return places


def dequantize(tensors: dict[str, Tensor], spec: PageSpec, which: str, pages: slice) -> Tensor:
    """float32 [heads, n, head_dim]: the keys or the values (``which``) of some pages."""
    is_key = which == "key"
    grid = spec.keys if is_key else spec.values
    words = tensors[f"{which}_words"][:, pages]
    codes = (unpack_keys if is_key else unpack_values)(words, spec).float()
    slots = slice(pages.start * PAGE, pages.start * PAGE + codes.shape[1])
    scale = _spread(tensors[f"{which}_scales"], grid, spec, slots)
    if not grid.offsets:
        return (codes - ((1 << spec.bits) - 1) / 2) * scale
    return codes * scale + _spread(tensors[f"{which}_offsets"], grid, spec, slots)


def _spread(scales: Tensor, grid: GridSpec, spec: PageSpec, slots: slice) -> Tensor:
    """float32 scales that broadcast to [heads, n, head_dim], of the tokens in the slots, which are whole pages."""
    if grid.axis == "token":
        words = scales[:, :, slots].reshape(*scales.shape[:2], -1, spec.run, spec.fields)
        by_token: Tensor = words.transpose(-1, -2).flatten(2).transpose(1, 2).float()
        return by_token if by_token.shape[2] == 1 else by_token.repeat_interleave(grid.group, 2)
    groups = slice(slots.start // grid.group, -(-slots.stop // grid.group))
    return scales[:, groups].float().repeat_interleave(grid.group, 1)
