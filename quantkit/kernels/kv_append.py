"""Coding of tokens into pages on a GPU: one launch for keys, one for values. The torch twin is coding.py's `encode`."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quantkit.formats.kv_page import PAGE, GridSpec, PageSpec

START = {2: 0.996, 4: 0.335, 8: 0.0308}  # the best uniform step for normal data, in standard deviations


def supports_append(tokens: Tensor, grid: GridSpec) -> bool:
    """Whether the kernel can code these: CUDA, float16, a scale for each token and head."""
    head_dim = tokens.shape[2]
    return (
        tokens.is_cuda
        and tokens.dtype == torch.float16
        and find_spec("triton") is not None
        and grid.axis == "token"
        and not grid.shared
        and grid.group == head_dim
        and head_dim in (64, 128, 256)
    )


def append_launch(
    which: str,
    tokens: Tensor,
    start: int,
    tensors: dict[str, Tensor],
    spec: PageSpec,
    *,
    rotate: bool,
    mean: Tensor | None,
    channel_scales: Tensor | None,
    clip: float,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and arguments of `append_kernel` for keys or values (``which``).

    Args:
        which: "key" or "value".
        tokens: float16 [heads, n, head_dim], original basis; those of a head contiguous.
        start: the slot of the first token; slots from there on are empty, and their pages exist.
        tensors: of the pages, written.
        spec: of the pages.
        rotate, mean, channel_scales: the transform; vectors float16 [heads, 1, head_dim] or None.
        clip: of the range.
    """
    heads, n, head_dim = tokens.shape
    grid = spec.keys if which == "key" else spec.values
    words, scales = tensors[f"{which}_words"], tensors[f"{which}_scales"]
    n_pages = -(-(start + n) // PAGE) - start // PAGE
    return (n_pages, heads), {
        "tokens": tokens,
        "mean": tokens if mean is None else mean,
        "channel_scales": tokens if channel_scales is None else channel_scales,
        "words": words,
        "scales": scales,
        "offsets": tensors.get(f"{which}_offsets", scales),
        "start": start,
        "n_tokens": n,
        "clip": clip,
        "token_stride": tokens.stride(0),
        "word_stride": words.stride(0),
        "scale_stride": scales.stride(0),
        "D": head_dim,
        "BITS": spec.bits,
        "IS_KEY": which == "key",
        "ROTATE": rotate,
        "OFFSETS": grid.offsets,
        "MEAN": mean is not None,
        "CHANNEL_SCALES": channel_scales is not None,
        "START": START[spec.bits],
        "num_warps": 4,
    }


class Appender:
    """Codes tokens into pages on a GPU. What Triton compiled is kept: binding arguments anew takes it longer than the
    device needs for a launch."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def append(
        self, which: str, tokens: Tensor, start: int, tensors: dict[str, Tensor], spec: PageSpec, **options: Any
    ) -> None:
        """Arguments as `append_launch`."""
        kernel = import_module("quantkit.kernels.kv_append_triton").append_kernel
        head_dim = tokens.shape[2]
        if tokens.stride()[1:] != (head_dim, 1):
            tokens = tokens.contiguous()
        grid, arguments = append_launch(which, tokens, start, tensors, spec, **options)
        aligned = tokens.data_ptr() % 16 == 0 and tokens.stride(0) % 16 == 0  # what is compiled may rely on it
        kind = (which, spec, aligned, tokens.device, *_flags(options))
        with torch.cuda.device(tokens.device):
            compiled = self._compiled.get(kind)
            if compiled is None:
                self._compiled[kind] = kernel[grid](**arguments)
            else:
                compiled[(*grid, 1)](*(arguments[name] for name in kernel.arg_names))


def _flags(options: dict[str, Any]) -> tuple[bool, ...]:
    """Which parts of the transform there are."""
    return options["rotate"], options["mean"] is not None, options["channel_scales"] is not None
