"""Queries, keys and values of one sequence, head by head, from what a block's attention module was called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantkit.calib.rotary import Rotary, no_rotary, rotary
from quantkit.models.attention import Projection


class CalledSequence:
    """One sequence of a call: what the hooks caught of it, in float32."""

    def __init__(self, call: dict[str, Any], index: int) -> None:
        self._call, self._index = call, index

    def inputs(self, path: str) -> Tensor:
        return self._pick(self._call[f"input {path}"]).float()

    def heads(self, projection: Projection) -> Tensor:
        """[heads, seq_len, head_dim], before norm and rotation."""
        output = self._pick(self._call[f"output {projection.path}"]).float()
        rows = projection.rows().to(output.device)
        return output[:, rows].reshape(-1, projection.heads, projection.head_dim).transpose(0, 1)

    def rotary(self, head_dim: int, neighbours: bool) -> Rotary | None:
        """None when the position embeddings have an unknown form."""
        given = self._call.get("position_embeddings")
        if given is None:
            output = next(value for key, value in self._call.items() if key.startswith("output "))
            return no_rotary(output.shape[1], head_dim, output.device)
        if not (
            isinstance(given, tuple) and len(given) == 2 and all(isinstance(x, Tensor) and x.ndim == 3 for x in given)
        ):
            return None
        cos, sin = (self._pick(part) for part in given)
        if cos.shape[1] > head_dim or cos.shape[1] % 2:
            return None
        return rotary(cos, sin, head_dim, neighbours=neighbours)

    def mask(self, seq_len: int, device: torch.device) -> Tensor:
        """Added to the logits: 0 or -inf, [seq_len, seq_len]."""
        given = self._call.get("attention_mask")
        if given is None:
            return torch.full((seq_len, seq_len), -torch.inf, device=device).triu(1)
        given = self._pick(given)[0]
        if given.dtype == torch.bool:
            return torch.zeros(given.shape, device=device).masked_fill(~given, -torch.inf)
        return given.float()

    def _pick(self, part: Tensor) -> Tensor:
        """The sequence's share; what is the same for all sequences has a batch size of one."""
        return part[min(self._index, part.shape[0] - 1)].detach()


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    """A query or key norm over x [heads, n, head_dim]: of every head alone, or of all heads of a token together."""
    if norm is None:
        return x
    weight: Tensor = norm.weight  # type: ignore[assignment]
    tokens = x.transpose(0, 1)  # [n, heads, head_dim]
    flat = weight.ndim == 1 and weight.shape[0] != x.shape[2]
    parameters = {name: parameter.detach().float() for name, parameter in norm.named_parameters()}
    normed: Tensor = torch.func.functional_call(norm, parameters, (tokens.flatten(1) if flat else tokens,))
    return normed.reshape(tokens.shape).transpose(0, 1)


def jacobian_transposed(norm: nn.Module | None, x: Tensor, head: int, y: Tensor) -> Tensor:
    """J^T y, J the head's block of the norm's Jacobian at each token: x [heads, n, head_dim], y [k, n, head_dim]."""
    if norm is None:
        return y

    def one_head(own: Tensor) -> Tensor:
        return normed(norm, torch.cat((x[:head], own.unsqueeze(0), x[head + 1 :])))[head]

    pull = torch.func.vjp(one_head, x[head])[1]
    pulled: Tensor = torch.func.vmap(lambda cotangent: pull(cotangent)[0])(y)
    return pulled
