"""The attention of a decoder block, as its modules show it: which weight rows make which head's query, key and value.

What structure cannot show (a bias on the logits, another order of norm and rotation, attention sinks) is found where
the block runs: `quantkit.calib.attention` recomputes the block's attention from this description and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv"))
_FUSED = ("qkv_proj", "Wqkv", "query_key_value")
_OUTPUT = ("o_proj", "out_proj", "dense", "wo")
_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))


@dataclass(frozen=True, slots=True)
class Projection:
    """The rows of one linear that compute the queries, keys or values, head by head.

    Row r of head h is row ``start + (h // group) * stride + (h % group) * head_dim + r`` of the linear's weight.
    """

    path: str  # of the linear, inside the block
    heads: int
    head_dim: int
    start: int = 0
    group: int = 1  # heads that follow each other without a gap
    stride: int = 0

    def rows(self) -> Tensor:
        """int64 ``[heads * head_dim]``: the linear's rows, head after head."""
        head = torch.arange(self.heads).unsqueeze(1)
        first = self.start + head // self.group * self.stride + head % self.group * self.head_dim
        return (first + torch.arange(self.head_dim)).flatten()


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(scaling * q k^T) v of one block; query head h reads key and value head h // (heads // kv_heads)."""

    path: str  # of the attention module, inside the block
    q: Projection
    k: Projection
    v: Projection
    output: str  # path of the output projection
    scaling: float
    softcap: float | None  # logits go through softcap * tanh(logits / softcap)
    q_norm: str | None  # paths of the norms between projection and rotation
    k_norm: str | None

    @property
    def heads(self) -> int:
        return self.q.heads

    @property
    def kv_heads(self) -> int:
        return self.k.heads

    @property
    def head_dim(self) -> int:
        return self.q.head_dim

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the linears that compute queries, keys and values; one, if they are fused."""
        return tuple(dict.fromkeys((self.q.path, self.k.path, self.v.path)))


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a block's attention cannot be described so."""

    reason: str


def find_attention(block: nn.Module) -> Attention | Unsupported:
    """The self-attention of a decoder block.

    Returns:
        The description, or why there is none: no query, key and value linears, several of them, low-rank ones, shapes
        that are not heads, norms of another kind.
    """
    found = [(path, module) for path, module in block.named_modules() if _holds_projections(module)]
    if len(found) != 1:
        how_many = "several modules" if found else "no module"
        return Unsupported(f"{how_many} with query, key and value linears")
    path, module = found[0]
    return _describe(path, module)


def _holds_projections(module: nn.Module) -> bool:
    return _separate_names(module) is not None or _fused_name(module) is not None


def _separate_names(module: nn.Module) -> tuple[str, str, str] | None:
    return next((names for names in _SEPARATE if all(_is_linear(module, name) for name in names)), None)


def _fused_name(module: nn.Module) -> str | None:
    return next((name for name in _FUSED if _is_linear(module, name)), None)


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear)


def _describe(path: str, module: nn.Module) -> Attention | Unsupported:
    prefix = f"{path}." if path else ""
    output = next((name for name in _OUTPUT if _is_linear(module, name)), None)
    if output is None:
        return Unsupported("no output projection beside the query, key and value linears")
    heads = _setting(module, ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    if not heads or module.get_submodule(output).in_features % heads:
        return Unsupported("the number of query heads is unknown")
    head_dim = module.get_submodule(output).in_features // heads
    projections = _projections(prefix, module, int(heads), int(head_dim))
    if isinstance(projections, Unsupported):
        return projections
    q, k, v = projections
    norms = next((pair for pair in _NORMS if all(getattr(module, name, None) is not None for name in pair)), None)
    q_norm, k_norm = norms or (None, None)
    for name, projection in ((q_norm, q), (k_norm, k)):
        if name is not None and not _is_norm(module.get_submodule(name), projection):
            return Unsupported(f"its {name} is a {type(module.get_submodule(name)).__name__}, not one norm over heads")
    softcap = _setting(module, ("attn_logit_softcapping",))
    return Attention(
        path=path,
        q=q,
        k=k,
        v=v,
        output=f"{prefix}{output}",
        scaling=float(_own(module, "scaling") or head_dim**-0.5),
        softcap=float(softcap) if softcap else None,
        q_norm=f"{prefix}{q_norm}" if q_norm else None,
        k_norm=f"{prefix}{k_norm}" if k_norm else None,
    )


def _projections(
    prefix: str, module: nn.Module, heads: int, head_dim: int
) -> tuple[Projection, Projection, Projection] | Unsupported:
    names = _separate_names(module)
    if names is not None:
        sizes = [getattr(module, name).out_features for name in names]
        kv_heads = sizes[1] // head_dim
        if sizes != [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim] or not kv_heads or heads % kv_heads:
            return Unsupported(f"{sizes} query, key and value rows are not {heads} heads of {head_dim}")
        counts = (heads, kv_heads, kv_heads)
        q, k, v = (
            Projection(f"{prefix}{name}", count, head_dim, 0, count) for name, count in zip(names, counts, strict=True)
        )
        return q, k, v
    name = _fused_name(module)
    assert name is not None
    n_rows = getattr(module, name).out_features
    kv_heads = (n_rows // head_dim - heads) // 2
    if kv_heads < 1 or heads % kv_heads or n_rows != (heads + 2 * kv_heads) * head_dim:
        return Unsupported(f"{n_rows} rows of {name} are not {heads} query heads of {head_dim} with keys and values")
    path = f"{prefix}{name}"
    if name == "query_key_value":  # per key head: its queries, the key, the value
        group = heads // kv_heads
        stride = (group + 2) * head_dim
        return (
            Projection(path, heads, head_dim, 0, group, stride),
            Projection(path, kv_heads, head_dim, group * head_dim, 1, stride),
            Projection(path, kv_heads, head_dim, (group + 1) * head_dim, 1, stride),
        )
    return (
        Projection(path, heads, head_dim, 0, heads),
        Projection(path, kv_heads, head_dim, heads * head_dim, kv_heads),
        Projection(path, kv_heads, head_dim, (heads + kv_heads) * head_dim, kv_heads),
    )


def _is_norm(norm: nn.Module, projection: Projection) -> bool:
    weight = getattr(norm, "weight", None)
    heads, head_dim = projection.heads, projection.head_dim
    return isinstance(weight, Tensor) and tuple(weight.shape) in ((head_dim,), (heads * head_dim,), (heads, head_dim))


def _own(module: nn.Module, name: str) -> Any:
    value = getattr(module, name, None)
    return value if isinstance(value, (int, float)) else None


def _setting(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of ``names`` that the module or its config holds as a number."""
    holders = (module, getattr(module, "config", None))
    values = (getattr(holder, name, None) for holder in holders for name in names)
    return next((value for value in values if isinstance(value, (int, float)) and value), None)
