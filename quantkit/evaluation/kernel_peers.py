"""Other people's low-bit products, where they are installed: what our kernels are measured against.

    cublas     torch's dense product in bfloat16, for every format
    tinygemm   ``aten::_weight_int4pack_mm`` of torch: 4 bits, bfloat16
    gemlite    1, 2, 4, 8 bits, float16; its settings for the H100 are loaded on any Hopper device, and it searches its
               short list (or with ``search`` its whole list, minutes per shape) for what they lack
    humming    1 to 8 bits, float16, its own heuristics; compiles with NVRTC on first use

Each takes a symmetric `grouped_int` weight of one width. Converting a weight to the peer's layout is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from quantkit.errors import first_line
from quantkit.formats.grouped_int import GroupedInt

Product = Callable[..., Tensor]  # (x, *tensors) to y


@dataclass(frozen=True, slots=True)
class PeerWeight:
    """A weight in a peer's layout."""

    product: Product
    tensors: list[Tensor]
    dense: Tensor  # float32: what the product has to multiply by


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a peer applies and how it takes a weight."""

    name: str
    dtype: torch.dtype  # of activations
    widths: tuple[int, ...]
    most_tokens: int
    convert: Callable[[GroupedInt, bool], PeerWeight]


def unavailable(peer: Peer) -> str | None:
    """Why a peer cannot run in this process, in one line; None if it can be imported."""
    module = {"gemlite": "gemlite", "humming": "humming"}.get(peer.name)
    if module is None:
        return None
    try:
        import_module(module)
    except Exception as error:  # foreign code: whatever it raises, the line is shown and the peer is left out
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"[:200]


def dense_weight(dense: Tensor) -> PeerWeight:
    """The original, in bfloat16."""
    return PeerWeight(lambda x, weight: linear(x, weight), [dense.bfloat16()], dense)


def _tinygemm(weight: GroupedInt, search: bool) -> PeerWeight:
    """weight = (code - 8) * scale, which is our symmetric grid; scales in bfloat16."""
    packed = torch.ops.aten._convert_weight_to_int4pack(weight.codes[:, ::2] << 4 | weight.codes[:, 1::2], 8)
    scales = weight.scales.t().bfloat16()
    pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    group_size = weight.group_size

    def product(x: Tensor, packed: Tensor, pairs: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, group_size, pairs)
        return result

    return PeerWeight(product, [packed, pairs], weight.dequantize())


def _gemlite(weight: GroupedInt, search: bool) -> PeerWeight:
    gemlite: Any = import_module("gemlite")
    if search:
        gemlite.set_autotune("max")
    else:
        gemlite.load_config(str(resources.files("gemlite") / "configs" / "h100.json"))
    gemlite.set_kernel_caching(True)  # one memset in 256 calls instead of one per call
    layer = gemlite.helper.A16Wn(device="cuda", dtype=torch.float16).from_weights(
        weight.codes, weight.scales.half(), weight.zeros.half(), weight.bits[0], weight.group_size
    )
    tensors, meta = layer.get_tensor_args(), layer.get_meta_args()

    def product(x: Tensor, *tensors: Tensor) -> Tensor:
        result: Tensor = gemlite.forward_functional(x, None, list(tensors), meta)
        return result

    return PeerWeight(product, list(tensors), weight.dequantize())


def _humming(weight: GroupedInt, search: bool) -> PeerWeight:
    """Its codes count from ``2 ** (bits - 1)``, at one bit from 1."""
    layer_module: Any = import_module("humming.layer")
    ops: Any = import_module("humming.ops")
    bits = weight.bits[0]
    rows, columns = weight.codes.shape
    layer = layer_module.HummingLayer(
        shape_n=rows,
        shape_k=columns,
        weight_config={"dtype": f"uint{bits}", "group_size": weight.group_size},
        torch_dtype=torch.float16,
    ).cuda()
    codes = ops.pack_weight(weight.codes.int().contiguous(), bits)
    layer.load_from_tensors({"weight": codes, "weight_scale": weight.scales.half()})
    layer.transform()
    config, forward = layer.humming_config, import_module("humming.forward").humming_forward

    def product(x: Tensor, packed: Tensor, scales: Tensor, locks: Tensor) -> Tensor:
        result: Tensor = forward(config, x, packed, scales, locks=locks)
        return result

    grouped = weight.codes.view(rows, -1, weight.group_size).float() - 2.0 ** (bits - 1)
    dense = (weight.scales[:, :, None] * grouped).view(rows, columns)
    return PeerWeight(product, [layer.weight.data, layer.weight_scale.data, layer.locks], dense)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("tinygemm", torch.bfloat16, (4,), 64, _tinygemm),
        Peer("gemlite", torch.float16, (1, 2, 4, 8), 1 << 20, _gemlite),
        Peer("humming", torch.float16, (1, 2, 3, 4, 5, 6, 7, 8), 1 << 20, _humming),
    )
}
