"""Where a model keeps its decoder blocks, and which linears of a block are quantized: structure, not family names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from quantkit.errors import RequestError


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear of a decoder block."""

    name: str  # runtime name in the whole model
    path: str  # name inside the block
    out_features: int
    in_features: int

    @property
    def n_weights(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block: its runtime name, the linears to quantize, and those left alone with the reason."""

    name: str
    linears: tuple[Linear, ...]
    skipped: tuple[tuple[str, str], ...]  # (runtime name, why)


def kind_of(path: str) -> str:
    """The name of a module or parameter inside its block, the same for all experts."""
    return re.sub(r"\.\d+\.", ".*.", path)


def find_block_list(model: nn.Module) -> str:
    """Runtime name of the list of decoder blocks.

    It is the longest outermost ``nn.ModuleList`` of the text decoder whose members hold linears and are called one
    after the other; lists inside it (experts) belong to a block.

    Raises:
        RequestError: the model has no such list.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    lists: list[tuple[int, str]] = []
    for name, module in decoder.named_modules():
        nested = any(name.startswith(f"{outer}.") for _, outer in lists)
        if isinstance(module, nn.ModuleList) and not nested and _has_linear(module):
            lists.append((len(module), name))
    if not lists:
        raise RequestError(
            f"{type(model).__name__}: found no list of decoder blocks with linear layers; "
            "this architecture is not supported"
        )
    _, name = max(lists, key=lambda item: item[0])
    return f"{prefix}.{name}" if prefix else name


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Linear) for child in module.modules())


def describe_blocks(model: nn.Module, block_list: str) -> list[Block]:
    """The blocks in the order in which they run, with their linears in the order in which they are defined."""
    blocks = model.get_submodule(block_list)
    assert isinstance(blocks, nn.ModuleList)
    return [_describe(f"{block_list}.{index}", block) for index, block in enumerate(blocks)]


def _describe(name: str, block: nn.Module) -> Block:
    linears, skipped = [], []
    for path, module in block.named_modules():
        if not any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            continue
        full = f"{name}.{path}" if path else name
        reason = _skip_reason(path, module, block)
        if reason:
            skipped.append((full, reason))
        else:
            assert isinstance(module, nn.Linear)
            linears.append(Linear(full, path, module.out_features, module.in_features))
    return Block(name, tuple(linears), tuple(skipped))


def _skip_reason(path: str, module: nn.Module, block: nn.Module) -> str:
    parent = block.get_submodule(path.rpartition(".")[0])
    has_experts = any(child == "experts" for child, _ in parent.named_children())
    if has_experts and path.rpartition(".")[2] in ("gate", "router", "shared_expert_gate"):
        return "router: its few weights decide which experts run"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not a linear layer"
    return "a single output" if module.out_features == 1 else ""
