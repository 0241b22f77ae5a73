"""Mixture-of-experts blocks as ordinary linears.

transformers keeps the experts of nearly every family in one module with two stacked parameters,

    gate_up_proj [n_experts, 2 * intermediate, hidden]        down_proj [n_experts, hidden, intermediate]

which no per-linear method sees. `unfuse_experts` replaces such a module by one with a ``gate_proj``, ``up_proj`` and
``down_proj`` linear per expert, named like the tensors of the published checkpoints: ``experts.7.gate_proj.weight``.
The function is unchanged: expert e maps x to ``down_e(act(gate_e x) * up_e x)``, summed with the router's weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert's three linears."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        act_fn: Callable[[Tensor], Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.gate_proj: nn.Module = nn.Linear(hidden, intermediate, bias=False, device=device, dtype=dtype)
        self.up_proj: nn.Module = nn.Linear(hidden, intermediate, bias=False, device=device, dtype=dtype)
        self.down_proj: nn.Module = nn.Linear(intermediate, hidden, bias=False, device=device, dtype=dtype)
        self.act_fn = act_fn

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return hidden


class UnfusedExperts(nn.Module):
    """Children ``"0"`` to ``"n_experts - 1"``; called like the fused module that it replaces."""

    def __init__(
        self,
        n_experts: int,
        hidden: int,
        intermediate: int,
        act_fn: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_experts = n_experts
        for index in range(n_experts):
            self.add_module(str(index), Expert(hidden, intermediate, act_fn, device, dtype))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts.

        Args:
            hidden_states: ``[n_tokens, hidden]``.
            top_k_index: int64 ``[n_tokens, k]``; the index ``n_experts`` means no expert.
            top_k_weights: ``[n_tokens, k]``.

        Returns:
            ``[n_tokens, hidden]`` in the dtype of ``hidden_states``.
        """
        out = torch.zeros_like(hidden_states)
        for index in torch.unique(top_k_index).tolist():
            if index == self.num_experts:
                continue
            token, choice = torch.where(top_k_index == index)
            expert_out = self.get_submodule(str(index))(hidden_states[token]) * top_k_weights[token, choice, None]
            out.index_add_(0, token, expert_out.to(out.dtype))
        return out


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module of ``model`` in place, keeping device (meta too), dtype and weights.

    A module is taken when its structure says that it computes what `UnfusedExperts` computes: exactly the two stacked
    parameters above, an ``act_fn``, no other child, and transformers' default gate. Experts with biases, transposed
    weights, clamped gates or extra norms are left as they are.

    Returns:
        The runtime names of the replaced modules, in model order.
    """
    names = [name for name, module in model.named_modules() if _is_fused(module)]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _unfuse(model.get_submodule(name)))
    return names


def _is_fused(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    act_fn = getattr(module, "act_fn", None)
    if set(parameters) != {"gate_up_proj", "down_proj"} or not callable(act_fn):
        return False
    if any(child is not act_fn for child in module.children()):
        return False
    gate = getattr(module, "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return False
    if getattr(module, "is_transposed", False) or not getattr(module, "is_concatenated", True):
        return False
    gate_up, down = parameters["gate_up_proj"], parameters["down_proj"]
    if gate_up.ndim != 3 or down.ndim != 3:
        return False
    n_experts, hidden, intermediate = down.shape
    return gate_up.shape == (n_experts, 2 * intermediate, hidden)


def _unfuse(fused: nn.Module) -> UnfusedExperts:
    gate_up, down = fused.get_parameter("gate_up_proj"), fused.get_parameter("down_proj")
    n_experts, hidden, intermediate = down.shape
    act_fn = fused.act_fn
    assert callable(act_fn)
    unfused = UnfusedExperts(n_experts, hidden, intermediate, act_fn, device=torch.device("meta"), dtype=down.dtype)
    for index in range(n_experts):
        parts = {
            "gate_proj": gate_up[index, :intermediate],
            "up_proj": gate_up[index, intermediate:],
            "down_proj": down[index],
        }
        for name, part in parts.items():  # copies: views would keep the whole stack alive and cannot be saved
            weight = nn.Parameter(part.detach().clone(), requires_grad=down.requires_grad)
            unfused.get_submodule(f"{index}.{name}").weight = weight
    return unfused.train(fused.training)
