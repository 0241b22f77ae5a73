"""A model of the same shape in little memory: the real modules, with random factors of low rank in place of linears.

It runs the model's own forward on a CPU within a second, reads no weight, and shows what is connected to what. Blocks
that are built alike stand for one another; vocabulary and positions are cut to a few rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.errors import RequestError
from quantkit.models.skeleton import Skeleton, derived_buffers, recompute_buffers
from quantkit.models.structure import kind_of

N_TOKENS = 8
_RANK = 8
_N_ROWS = 16  # of embeddings: token ids, and positions with an offset
_MOST_NUMBERS = 1 << 24  # of a parameter that is neither a linear's nor an embedding's


class LowRank(nn.Linear):
    """x right^T left^T + bias in place of a linear; its weight stays on the meta device."""

    left: Tensor
    right: Tensor

    def __init__(self, linear: nn.Linear, generator: torch.Generator) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.register_buffer("left", torch.randn(self.out_features, _RANK, generator=generator) / _RANK**0.5)
        self.register_buffer("right", torch.randn(_RANK, self.in_features, generator=generator) / self.in_features**0.5)
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.randn(self.out_features, generator=generator), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        hidden = input @ self.right.T @ self.left.T
        return hidden if self.bias is None else hidden + self.bias


class Miniature:
    """Built from a skeleton, which is left as it is.

    Attributes:
        model: the small model, on the CPU, in float32.
        kinds: for each of its blocks, the blocks of the skeleton that it stands for.

    Raises:
        RequestError: a parameter that cannot be made small.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        kinds: dict[Any, list[int]] = {}
        for index in range(len(skeleton.blocks)):
            kinds.setdefault(_signature(skeleton.block_module(index)), []).append(index)
        self.kinds = list(kinds.values())
        self.block_list = skeleton.block_list
        few = nn.ModuleList([copy.deepcopy(skeleton.block_module(indices[0])) for indices in self.kinds])
        blocks = skeleton.model.get_submodule(skeleton.block_list)
        self.model: Any = copy.deepcopy(skeleton.model, {id(blocks): few})
        generator = torch.Generator().manual_seed(0)
        for name, module in list(self.model.named_modules()):
            self._materialize(name, module, generator)

    def run(self) -> Tensor:
        """Logits ``[N_TOKENS, vocabulary]``."""
        logits: Tensor = self.model(input_ids=torch.arange(N_TOKENS).unsqueeze(0), use_cache=False).logits
        return logits[0]

    def names(self, name: str) -> list[str]:
        """The skeleton's names of what is called ``name`` here."""
        index, path = self._place(name)
        if index is None:
            return [name]
        return [f"{self.block_list}.{original}.{path}" for original in self.kinds[index]]

    def kind(self, name: str) -> tuple[int | None, str]:
        """Equal for the same module of all experts of a block."""
        index, path = self._place(name)
        return index, kind_of(path)

    def _place(self, name: str) -> tuple[int | None, str]:
        """Number of the block, and the path inside it; None and the name itself for what is outside the blocks."""
        prefix = f"{self.block_list}."
        if not name.startswith(prefix):
            return None, name
        index, _, path = name.removeprefix(prefix).partition(".")
        return int(index), path

    @contextmanager
    def watching(self, wanted: Callable[[nn.Module], bool]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Rows ``[n, features]`` that enter and leave the wanted modules when the model runs in this context."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                entering = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
                leaving = output if isinstance(output, Tensor) else output[0]
                seen[name] = (entering.flatten(0, -2), leaving.flatten(0, -2))

            return keep

        modules = [(name, module) for name, module in self.model.named_modules() if wanted(module)]
        handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _materialize(self, name: str, module: nn.Module, generator: torch.Generator) -> None:
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, LowRank(module, generator))
            return
        for key, parameter in list(module.named_parameters(recurse=False)):
            shape = tuple(parameter.shape)
            if isinstance(module, nn.Embedding):
                shape, module.padding_idx = (min(_N_ROWS, shape[0]), *shape[1:]), None
            elif parameter.numel() > _MOST_NUMBERS:
                raise RequestError(f"its {name} ({type(module).__name__}) keeps weights in another form than linears")
            module._parameters[key] = nn.Parameter(_random(shape, generator), requires_grad=False)
        derived = derived_buffers(module)
        if derived:
            recompute_buffers(self.model, module, name, derived, torch.device("cpu"))
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _signature(block: nn.Module) -> Any:
    """Equal for blocks that are built alike."""
    modules = tuple((path, type(module).__qualname__) for path, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gains around one; matrices that keep the size of what they multiply."""
    normal = torch.randn(shape, generator=generator)
    return 1 + 0.3 * normal if len(shape) < 2 else normal / shape[-1] ** 0.5
