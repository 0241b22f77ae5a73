"""`PackedEmbedding`: an ``nn.Embedding`` on a packed table, and the head of a model that ties it to its embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantkit.formats.grouped_int import GroupedIntSpec
from quantkit.kernels.lookup import lookup
from quantkit.runtime.packed_linear import PackedWeight


class PackedEmbedding(PackedWeight):
    """Rows of a packed table; only those that are looked up are ever decoded.

    Args:
        spec: shape ``[num_embeddings, embedding_dim]`` and storage of the table.
        scale: factor on every looked-up row, where the model's own embedding has one.
        dtype: of the rows; follows conversions of the model.
        device: of all tensors, uninitialized until loaded; "meta" works.
    """

    spec: GroupedIntSpec

    def __init__(
        self,
        spec: GroupedIntSpec,
        *,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec, dtype=dtype, device=device)
        self.num_embeddings, self.embedding_dim = spec.out_features, spec.in_features
        self.scale, self.dtype = scale, dtype

    def forward(self, x: Tensor, bias: Tensor | None = None, as_head: bool = False) -> Tensor:
        """Token ids ``[...]`` to rows ``[..., embedding_dim]``; as a head, hidden states to logits.

        A tied head calls this module, and not its kernel, so that a table that is offloaded or elsewhere is brought
        in (by the hooks that accelerate puts around a call) for both uses.
        """
        if as_head:
            return self.kernel.matmul(x, self.spec, self.packed_tensors(), bias)
        rows = lookup(x, self.spec, self.packed_tensors(), self.dtype)
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=rows.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


class TiedHead(nn.Module):
    """The output head of a model whose embedding is packed and serves as head too: one stored table, used by both.

    Args:
        embedding: held without being a submodule, so that a state dict has its tensors once.
        bias: of the head, or None.
    """

    weight: Tensor
    bias: nn.Parameter | None

    def __init__(self, embedding: PackedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        dummy = torch.empty(0, dtype=embedding.dtype, device=embedding.weight.device)
        self.register_buffer("weight", dummy, persistent=False)  # for code that peeks at its dtype and device
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to logits ``[..., out_features]`` in the dtype of ``x``."""
        logits: Tensor = self._embedding[0](x, self.bias, as_head=True)
        return logits

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, tied to the packed embedding"
