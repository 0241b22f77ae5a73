"""Where every byte of a model went: packed linears, embeddings, output head, norms, and what is left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from quantkit.formats.checkpoint import PackedModule
from quantkit.formats.safetensors_io import TensorRef

QUANTIZED = "quantized"  # packed linears: those of the blocks, and of a vision tower
_KINDS = (("norms", r"norm|\bln_"), ("head", r"\b(lm_head|embed_out)\b"), ("embeddings", r"embed|\bwte\b|\bwpe\b"))
_IN_BLOCK = re.compile(r"\.\d+\.")


@dataclass(slots=True)
class Account:
    """Bytes by kind, and the number of parameters (of the unquantized model) that they store."""

    bytes: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys((QUANTIZED, *(kind for kind, _ in reversed(_KINDS)), "other"), 0)
    )
    n_parameters: int = 0

    def add(self, kind: str, n_bytes: int, n_parameters: int) -> None:
        self.bytes[kind] += n_bytes
        self.n_parameters += n_parameters

    @property
    def n_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def bits_per_parameter(self) -> float:
        """Of everything that the files hold, not of the quantized linears alone."""
        return 8 * self.n_bytes / self.n_parameters


def is_end(name: str) -> bool:
    """Whether a packed module is the embedding or the head, and no linear between them.

    >>> is_end("model.layers.7.mlp.up_proj"), is_end("model.embed_tokens"), is_end("lm_head")
    (False, True, True)
    """
    return _IN_BLOCK.search(name) is None and kind_of(name) in ("embeddings", "head")


def kind_of(name: str) -> str:
    """The kind of a tensor, by what its name says; of those that are no packed linear of a block.

    >>> kind_of("model.embed_tokens.weight"), kind_of("lm_head.codes_8b"), kind_of("model.norm.weight")
    ('embeddings', 'head', 'norms')
    """
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


def account(modules: Iterable[PackedModule], tensors: Iterable[TensorRef]) -> Account:
    """Add up the tensors of a packed folder."""
    total = Account()
    packed: set[str] = set()
    for module in modules:
        kind = kind_of(module.name) if is_end(module.name) else QUANTIZED
        total.add(kind, module.spec.n_bytes, module.spec.n_weights)
        packed |= {f"{module.prefix}.{key}" for key in module.spec.tensor_layout()}
    for ref in tensors:
        if ref.name not in packed:
            total.add(kind_of(ref.name), ref.n_bytes, prod(ref.shape))
    return total
